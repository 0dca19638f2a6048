"""What `one_cycle` and the runs around it share: norms wholly frozen, a quicker head, 3.5 epochs.

    python -m cifar_jax.main --config=experiments/time_to_accuracy/config.py \\
      --workdir=runs/one_cycle --config.model.pretrained=FILE

`configs/resnet50_cpu.py` came of it.
"""

import ml_collections

from configs import resnet50_cpu


def get_config() -> ml_collections.ConfigDict:
    """Returns that recipe, of 64 minutes of training."""
    config = resnet50_cpu.get_config()
    config.train_for = "3.5 epochs"
    config.progressive = "2 until 0.75 epochs, 3 until 1.5 epochs"
    config.evaluate_every = "0.75 epochs"
    config.model.batch_norm = "frozen"
    config.optimizer.head_rate = 3.0
    return config
