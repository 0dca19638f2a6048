"""What the fine-tuned runs of the ablations share: 5,000 images, four epochs at 64 px.

    python -m cifar_jax.sweep experiments/ablations/finetuned.toml \\
      --config=experiments/ablations/finetuned.py --workdir=runs/finetuned \\
      --config.model.pretrained=FILE
"""

import ml_collections

from experiments.transfer_laptop import config as laptop


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of `experiments/transfer_laptop/` on fewer and smaller images."""
    return shorten(laptop.get_config())


def shorten(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the configuration, changed to 5,000 images and four epochs of 64 px."""
    config.data.protocol = "standard"
    config.data.images_a_class = 500
    config.train_for = "4 epochs"
    config.evaluate_every = "4 epochs"
    config.log_every = "1 epoch"
    config.checkpoint_every = "4 epochs"
    config.progressive = ""
    config.model.upsampling = 2
    config.schedule.warmup = "20 steps"
    return config
