"""What the runs around the recipe of the 74 minutes share: 5,000 images, four epochs at 64 px.

    python -m cifar_jax.sweep experiments/ablations/tuned.toml \\
      --config=experiments/ablations/tuned.py --workdir=runs/tuned --config.model.pretrained=FILE
"""

import ml_collections

from configs import resnet50_cpu
from experiments.ablations.finetuned import shorten


def get_config() -> ml_collections.ConfigDict:
    """Returns that recipe on fewer images, all of them small."""
    config = shorten(resnet50_cpu.get_config())
    # What these runs found to be better is in configs/resnet50_cpu.py now.
    config.model.batch_norm = "frozen"
    config.optimizer.head_rate = 3.0
    return config
