"""Fine-tunes the whole ResNet-50 on two CPU cores in an hour, small images first.

    python -m cifar_jax.main --config=configs/resnet50_cpu.py --workdir=runs/resnet50_cpu

An epoch at 64 px, one at 96 px, one at 128 px: what the layers must learn first they learn where a
step costs a quarter. What the weights were trained with (their own preprocessing, a linear layer on
the pooled maps), bilinear upsampling, SGD at a high rate that a cosine takes to 0, flipped images.
Batch norms keep the file's statistics, which experiments/ablations/ found to be worth more than
anything but larger images, and learn scale and bias. Official test images. What it reaches:
experiments/time_to_accuracy/; over 5.75 epochs, in two hours: experiments/ten_hours/.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the progressive transfer run."""
    config = common.get_config()
    config.data.protocol = "standard"
    config.train_for = "3 epochs"
    config.progressive = "2 until 1 epoch, 3 until 2 epochs"
    config.batch_size = 64
    config.eval_batch_size = 100
    config.evaluate_every = "1 epoch"
    config.log_every = "25 steps"
    config.checkpoint_every = "100 steps"
    config.model.name = "resnet50"
    config.model.variant = "torchvision"
    config.model.pretrained = "torchvision"
    config.model.preprocessing = "torchvision"
    config.model.upsampling = 4
    config.model.interpolation = "bilinear"
    config.model.head = "pooled"
    config.model.dropout = 0.0
    config.model.batch_norm = "eval"
    config.model.test_time_flip = True
    config.augment.flip = True
    config.label_smoothing = 0.1
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03
    config.optimizer.momentum = 0.9
    config.optimizer.nesterov = True
    config.schedule.name = "cosine"
    config.schedule.warmup = "0.15 epochs"
    return config
