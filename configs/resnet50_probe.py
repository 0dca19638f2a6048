"""A linear probe: one layer on the frozen, pretrained ResNet-50's features at 128 px, 20 epochs.

    python -m cifar_jax.features --config=configs/resnet50_probe.py --workdir=runs/probe

Bilinear upsampling x4, torchvision's ResNet50 with its ImageNet weights and its own preprocessing.
The features are computed once, in one forward pass over the images; the head then takes seconds.
Accuracy: experiments/linear_probe/.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the linear probe."""
    config = common.get_config()
    config.train_for = "20 epochs"
    config.batch_size = 256
    config.eval_batch_size = 128  # of the backbone's pass too
    config.steps_per_call = 35  # 4 calls an epoch of 36,000 images, 5 of 45,000
    config.log_every = "35 steps"
    config.model.name = "resnet50"
    config.model.variant = "torchvision"
    config.model.pretrained = "torchvision"
    config.model.preprocessing = "torchvision"
    config.model.upsampling = 4
    config.model.interpolation = "bilinear"
    config.model.head = "pooled"
    config.model.dropout = 0.0
    config.model.batch_norm = "frozen"
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.epsilon = 1e-8
    config.schedule.name = "cosine"
    return config
