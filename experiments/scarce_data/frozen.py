"""What the heads on frozen features of few images share: one linear layer, 64 px, 1,000 steps.

    python -m cifar_jax.sweep experiments/scarce_data/frozen.toml \\
      --config=experiments/scarce_data/frozen.py --workdir=runs/scarce/frozen \\
      --config.model.pretrained=FILE
"""

import ml_collections

from configs import resnet50_probe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of `configs/resnet50_probe.py` at 64 px, evaluated at its end."""
    config = resnet50_probe.get_config()
    config.data.protocol = "standard"
    config.train_for = "1000 steps"
    config.batch_size = 64
    config.steps_per_call = 50
    config.evaluate_every = "1000 steps"
    config.log_every = "250 steps"
    config.checkpoint_every = "1000 steps"
    config.model.upsampling = 2
    return config
