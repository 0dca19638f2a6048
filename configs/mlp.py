"""The notebook's MLP: Flatten, Dense 64 relu, Dense 64 relu, Dense 10; 36,000 images, 10 epochs.

    python -m cifar_jax.main --config=configs/mlp.py --workdir=runs/mlp

The notebook does not name its MLP's optimizer: ours is RMSprop at Keras's default rate.
Expected accuracy and time, with the machine they were measured on: experiments/mlp_baseline/.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the MLP baseline."""
    config = common.get_config()
    config.model.name = "mlp"
    config.steps_per_call = 225  # 5 calls an epoch; one step is too short to be dispatched alone
    config.log_every = "225 steps"
    return config
