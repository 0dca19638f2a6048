"""What the heads on frozen features share in the ablations: 5,000 images, 40 epochs at 64 px.

    python -m cifar_jax.sweep experiments/ablations/frozen.toml \\
      --config=experiments/ablations/frozen.py --workdir=runs/frozen \\
      --config.model.pretrained=FILE
"""

import ml_collections

from configs import resnet50_probe


def get_config() -> ml_collections.ConfigDict:
    """Returns the recipe of `configs/resnet50_probe.py` on fewer and smaller images."""
    config = resnet50_probe.get_config()
    config.data.protocol = "standard"
    config.data.images_a_class = 500
    config.train_for = "40 epochs"
    config.evaluate_every = "40 epochs"
    config.log_every = "5 epochs"
    config.checkpoint_every = "40 epochs"
    config.steps_per_call = 19
    config.model.upsampling = 2
    return config
