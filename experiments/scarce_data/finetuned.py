"""What the runs of a whole ResNet-50 on few images share: 64 px, and a step budget by size.

    python -m cifar_jax.sweep experiments/scarce_data/finetuned.toml \\
      --config=experiments/scarce_data/finetuned.py --workdir=runs/scarce/finetuned \\
      --config.model.pretrained=FILE
"""

import ml_collections

from experiments.transfer_laptop import config as laptop


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of `experiments/transfer_laptop/` at 64 px, evaluated at its end."""
    config = laptop.get_config()
    config.data.protocol = "standard"
    config.evaluate_every = "600 steps"
    config.log_every = "50 steps"
    config.checkpoint_every = "600 steps"
    config.model.upsampling = 2
    config.augment.flip = True
    config.schedule.warmup = "20 steps"
    return config
