"""Fine-tunes the whole ResNet-50 in about an hour on two CPU cores.

    python -m cifar_jax.main --config=experiments/transfer_laptop/config.py --workdir=runs/laptop

Less of everything that the notebook's recipe spends: 128 px instead of 256, 0.6 epochs instead of
10. In exchange, what the weights were trained with (their own preprocessing, a linear layer on the
pooled maps), bilinear upsampling, and SGD with momentum at a high rate that a cosine takes to 0.
`configs/resnet50_cpu.py` came of it.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the transfer run for a laptop."""
    config = common.get_config()
    config.train_for = "0.6 epochs"
    config.batch_size = 64
    config.eval_batch_size = 100
    config.evaluate_every = "0.3 epochs"
    config.log_every = "10 steps"
    config.checkpoint_every = "25 steps"
    config.model.name = "resnet50"
    config.model.variant = "torchvision"
    config.model.pretrained = "torchvision"
    config.model.preprocessing = "torchvision"
    config.model.upsampling = 4
    config.model.interpolation = "bilinear"
    config.model.head = "pooled"
    config.model.dropout = 0.0
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03
    config.optimizer.momentum = 0.9
    config.schedule.name = "cosine"
    config.schedule.warmup = "50 steps"
    return config
