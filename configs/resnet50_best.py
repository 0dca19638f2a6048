"""The best that we expect of one GPU or a TPU slice: 224 px, 100 epochs, all regularisers.

    python -m cifar_jax.main --config=configs/resnet50_best.py --workdir=runs/resnet50_best

NOT RUN to its end: only five epochs of a shorter one on an H200, never evaluated; compiled for one
and eight H100s (experiments/gpu/) and eight chips of a TPU v5e (experiments/tpu/). Expected, not
measured: above 0.975 on the official test images from torchvision's published weights. Where each
choice comes from stands beside it.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the long transfer run."""
    config = common.get_config()
    config.data.protocol = "standard"  # the test images that published numbers are of
    config.data.on_device = True  # 154 MB; the host then sends row numbers only
    # 256 images a step, SGD with Nesterov momentum, cosine, the size of ImageNet training, about
    # 20,000 steps: Kornblith, Shlens and Le, "Do Better ImageNet Models Transfer Better?", 2019.
    config.train_for = "100 epochs"  # 17,500 steps
    config.batch_size = 256
    config.eval_batch_size = 512
    config.evaluate_every = "2 epochs"
    config.log_every = "35 steps"
    config.checkpoint_every = "5 epochs"
    config.matmul_precision = "default"  # TF32 or bfloat16 products, as PyTorch's AMP has them
    config.model.name = "resnet50"
    config.model.variant = "torchvision"
    config.model.pretrained = "torchvision"
    config.model.preprocessing = "torchvision"
    config.model.compute_dtype = "bfloat16"  # half the time of TF32: experiments/gpu/
    config.model.upsampling = 7  # 224 px
    # As these weights were trained: torchvision resizes bilinearly, normalises by ImageNet's mean
    # and deviation, and has one linear layer on the mean, without dropout.
    config.model.interpolation = "bilinear"
    config.model.head = "pooled"
    config.model.dropout = 0.0
    # Norms learn, as in Kornblith et al.; on two cores, with batches of 64 and 5,000 images, norms
    # that keep the file's statistics were better (experiments/ablations/, "eval" above "frozen").
    # Which holds here has not been tried.
    config.model.batch_norm = "train"
    config.model.test_time_flip = True  # Krizhevsky et al., 2012: mirrored crops averaged
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.02  # within the range that paper searches
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.optimizer.weight_decay = 1e-3  # outside the momentum: ten times the usual 1e-4 inside
    config.optimizer.head_rate = 1.0  # better than 3 and 10 in experiments/ablations/
    config.schedule.name = "cosine"
    config.schedule.warmup = "5 epochs"  # Goyal et al., "Accurate, Large Minibatch SGD", 2017
    # Usual for CIFAR-10, at their papers' strengths: He et al. 2015 (flip and crop), Müller and
    # Hutter 2021 (TrivialAugment), Szegedy et al. 2016 (smoothing). CutMix on every image is what
    # Yun et al. 2019 do on ImageNet; on CIFAR they mix every second batch. Of these only crops
    # and smoothing have been tried in this project, on 5,000 images (experiments/ablations/).
    config.augment.flip = True
    config.augment.crop_padding = 4
    config.augment.policy = "trivial"
    config.augment.cutmix = 1.0
    config.label_smoothing = 0.1
    # Evaluated on a running average, as by Szegedy et al. 2016; over how long is our own choice:
    # the last thousand steps, six epochs.
    config.ema_decay = 0.999
    return config
