"""What the MLPs on few images share: the notebook's MLP, with a step budget by size.

    python -m cifar_jax.sweep experiments/scarce_data/mlp.toml \\
      --config=experiments/scarce_data/mlp.py --workdir=runs/scarce/mlp
"""

import ml_collections

from configs import mlp


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of `configs/mlp.py`, evaluated at its end."""
    config = mlp.get_config()
    config.data.protocol = "standard"
    config.evaluate_every = "12500 steps"
    config.log_every = "500 steps"
    config.checkpoint_every = "12500 steps"
    return config
