"""What two CPU cores fine-tune in about an hour: ResNet-50 (torchvision's form) at 128 px.

    python -m cifar_jax.main --config=configs/resnet50_laptop.py --workdir=runs/laptop \
        --config.model.pretrained=WEIGHTS.safetensors

Bilinear upsampling x4, the weights' own preprocessing, a pooled head, half an epoch of SGD with
momentum. Its accuracy and minutes, with the machine and weights: experiments/transfer_laptop/.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the laptop's transfer run."""
    config = common.get_config()
    config.train_for = "0.5 epochs"
    config.evaluate_every = "0.5 epochs"
    config.log_every = "25 steps"
    config.checkpoint_every = "100 steps"
    config.eval_batch_size = 128

    model = config.model
    model.name = "resnet50"
    model.variant = "torchvision"
    model.pretrained = "torchvision"
    model.preprocessing = "torchvision"
    model.upsampling = 4
    model.interpolation = "bilinear"
    model.head = "pooled"
    model.dropout = 0.0

    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.02
    config.optimizer.momentum = 0.9
    config.schedule.name = "cosine"
    config.schedule.warmup = "50 steps"
    return config
