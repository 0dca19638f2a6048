"""What the runs around `one_cycle`'s recipe share: 5,000 images, four epochs at 64 px.

    python -m cifar_jax.sweep experiments/ablations/tuned.toml \\
      --config=experiments/ablations/tuned.py --workdir=runs/tuned --config.model.pretrained=FILE
"""

import ml_collections

from experiments.ablations.finetuned import shorten
from experiments.time_to_accuracy import config as one_cycle


def get_config() -> ml_collections.ConfigDict:
    """Returns that recipe on fewer images, all of them small."""
    return shorten(one_cycle.get_config())
