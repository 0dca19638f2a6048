"""What the runs around `configs/resnet50_cpu.py` share: 5,000 images, four epochs at 64 px.

    python -m cifar_jax.sweep experiments/ablations/tuned.toml \\
      --config=experiments/ablations/tuned.py --workdir=runs/tuned --config.model.pretrained=FILE
"""

import ml_collections

from configs import resnet50_cpu


def get_config() -> ml_collections.ConfigDict:
    """Returns that recipe on fewer images, all of them small."""
    config = resnet50_cpu.get_config()
    config.data.images_a_class = 500
    config.train_for = "4 epochs"
    config.evaluate_every = "4 epochs"
    config.log_every = "1 epoch"
    config.checkpoint_every = "4 epochs"
    config.progressive = ""
    config.model.upsampling = 2
    config.schedule.warmup = "20 steps"
    return config
