"""Every field of a run, once, with its unit. `mlp.py` and `resnet50.py` change a few of them.

A duration is a number and its unit, "10 epochs" or "500 steps": one field, so that two of them
cannot contradict each other. Batch sizes are global: all devices of all hosts together.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the shared defaults, unlocked, for a run's own file to complete."""
    config = ml_collections.ConfigDict()

    config.seed = 0  # initial weights, order of the images, dropout, augmentation
    config.train_for = "10 epochs"
    config.batch_size = 32  # images a step
    config.steps_per_call = 1  # steps in one compiled call (Keras: steps_per_execution)
    config.eval_batch_size = 512  # images; the last batch of a split is padded and masked
    config.evaluate_every = "1 epoch"
    config.log_every = "100 steps"  # training loss and accuracy since the last such row
    config.checkpoint_every = "1 epoch"
    config.keep_checkpoints = 2  # latest ones, at least 2, beside the best on validation
    config.test = True  # read the test split once, at the end; False while recipes are compared

    config.execution = "jit"  # "jit": one sharded program; "pmap": one program a device
    config.matmul_precision = "highest"  # "default" lets a GPU or TPU round its inputs

    config.data = _data()
    config.model = _model()

    config.label_smoothing = 0.0  # share of a label that is spread over all classes; the training
    #                               loss counts it, that of an evaluation does not
    config.ema_decay = 0.0  # an update's share of the old averages of weights and statistics, which
    #                         are evaluated and predict in their place; 0: no averages. At first
    #                         less, (1 + k) / (10 + k) after k updates; for the statistics after
    #                         k updates of the images' present size
    config.progressive = ""  # smaller images first: "2 until 3 epochs, 3 until 4 epochs" is
    #                          upsampling 2, then 3, then model.upsampling (pooled head)

    config.freeze = _freeze()
    config.augment = _augment()
    config.optimizer = _optimizer()
    config.schedule = _schedule()
    return config


def _data() -> ml_collections.ConfigDict:
    """Returns `config.data`: which images, and how they are divided."""
    data = ml_collections.ConfigDict()
    data.source = (
        "auto"  # "auto": whatever lies in the directory, else a download; "sample"; "tfds"
    )
    data.directory = "~/.cache/cifar_jax"
    data.protocol = "notebook"  # "notebook": 36,000/4,000/10,000 of the training images;
    #                             "standard": 45,000/5,000 and the official 10,000 for the test
    data.split_seed = 42
    data.images_a_class = 0  # train on the first so many of each class; 0: on all
    data.on_device = False  # the training set lies on every device (154 MB of images), and the
    #                         host sends row numbers instead of images
    return data


def _model() -> ml_collections.ConfigDict:
    """Returns `config.model`: the network and its weights."""
    model = ml_collections.ConfigDict()
    model.name = "mlp"  # or "resnet50", with the fields below
    model.compute_dtype = "float32"  # or "bfloat16"; parameters stay float32
    model.hidden_sizes = (64, 64)  # mlp
    model.variant = "keras"  # "keras": ResNet v1; "torchvision": v1.5; as the weights are
    model.pretrained = "none"  # "keras", "torchvision": the published weights; or a file's path
    model.preprocessing = "unit"  # /255, the notebook's; or the weights' own, named as the variant
    model.upsampling = 8  # times 32 pixels: 1 to 8
    model.interpolation = "nearest"  # or "bilinear"
    model.head = "flatten"  # the notebook's; or "pooled": mean over pixels, one linear layer
    model.dropout = 0.5  # in the head
    model.batch_norm = "train"  # or "eval": the backbone's norms keep the weights' statistics, and
    #                             scale and bias learn (Keras: training=False); or "frozen": those
    #                             stay too (trainable=False). In frozen layers: freeze.batch_norm
    model.test_time_flip = False  # logits are the mean over image and mirror image
    model.remat = False  # recompute each block's inside on the way back: less memory, more work
    return model


def _freeze() -> ml_collections.ConfigDict:
    """Returns `config.freeze`: what does not learn."""
    freeze = ml_collections.ConfigDict()
    freeze.layers = ""  # what parts of parameters' names begin with: "stem stage1" for the whole
    #                     run, or "backbone until 1 epoch, stem stage1 until 2 epochs"; * stands
    #                     for anything
    freeze.batch_norm = "frozen"  # norms whose scale and bias are frozen keep their statistics;
    #                               "train": they do as model.batch_norm says
    freeze.features = "stage4"  # cifar_jax.features: the last frozen part, "stem" to "stage4", or
    #                             a block within a stage, "stage2.block1"; its maps are cached, and
    #                             what follows is trained on them
    return freeze


def _augment() -> ml_collections.ConfigDict:
    """Returns `config.augment`: what training images go through, on the device."""
    augment = ml_collections.ConfigDict()
    augment.flip = False  # left to right, every second image
    augment.crop_padding = 0  # pixels of 32 that an image moves at most, each way
    augment.policy = "none"  # or "trivial": TrivialAugment, one random operation an image
    augment.mixup = 0.0  # alpha of the Beta of the shares; 0: none; usual: 0.2
    augment.cutmix = 0.0  # the same; usual: 1.0; with both, either one at even odds
    return augment


def _optimizer() -> ml_collections.ConfigDict:
    """Returns `config.optimizer`: how an update is made of gradients."""
    optimizer = ml_collections.ConfigDict()
    optimizer.name = "rmsprop"  # "rmsprop" as Keras computes it, "sgd", "adam", "adamw"
    optimizer.learning_rate = 1e-3
    optimizer.momentum = 0.0  # rmsprop and sgd
    optimizer.nesterov = False  # sgd
    optimizer.decay = 0.9  # rmsprop: of the squared gradients (Keras: rho)
    optimizer.beta1 = 0.9  # adam and adamw
    optimizer.beta2 = 0.999  # adam and adamw
    optimizer.epsilon = 1e-7  # rmsprop: inside the root, as in Keras; adam and adamw: outside
    optimizer.weight_decay = 0.0  # of kernels only; decoupled (so "adam" with it is "adamw", and
    #                               "adamw" without it is "adam"; PyTorch's default is 0.01)
    optimizer.clip_norm = 0.0  # of the whole gradient; 0: no clipping
    optimizer.head_rate = 1.0  # times learning_rate, for the head
    optimizer.layer_decay = 1.0  # times learning_rate once for stage4, twice for stage3, ..., and
    #                              five times for the stem; 1: the same rate for all
    optimizer.accumulate = 1  # steps an update takes the mean gradient of: batch_size x accumulate
    #                           images; warm-up and train_for still count steps, epochs being
    #                           cut to whole updates
    return optimizer


def _schedule() -> ml_collections.ConfigDict:
    """Returns `config.schedule`: the learning rate by step."""
    schedule = ml_collections.ConfigDict()
    schedule.name = "constant"  # "constant", "cosine" or "linear"
    schedule.warmup = "0 steps"  # linear, from 0
    schedule.final_fraction = 0.0  # cosine and linear: of the learning rate, at the end
    return schedule
