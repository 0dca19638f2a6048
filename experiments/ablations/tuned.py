"""What the runs around `configs/resnet50_cpu.py` share: 5,000 images, four epochs at 64 px.

    python -m cifar_jax.sweep experiments/ablations/tuned.toml \\
      --config=experiments/ablations/tuned.py --workdir=runs/tuned --config.model.pretrained=FILE
"""

import ml_collections

from configs import resnet50_cpu
from experiments.ablations.finetuned import shorten


def get_config() -> ml_collections.ConfigDict:
    """Returns that recipe on fewer images, all of them small."""
    return shorten(resnet50_cpu.get_config())
