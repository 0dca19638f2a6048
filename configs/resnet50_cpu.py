"""Fine-tunes on two CPU cores in 80 minutes: small images first, 4.5 epochs.

    python -m cifar_jax.main --config=configs/resnet50_cpu.py --workdir=runs/resnet50_cpu

Two epochs at 64 px, one at 96 px, 1.5 at 128 px: what the layers must learn first they learn where
a step costs a quarter, and the rate is still a quarter of its peak where the last size begins. SGD
at a high rate that a cosine takes to 0, the head at three times the rate, flipped images. Official
test images. What it reaches, and what two further epochs add: experiments/time_to_accuracy/.
"""

import ml_collections

from configs import resnet50_laptop


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the progressive transfer run."""
    config = resnet50_laptop.get_config()
    config.data.protocol = "standard"
    config.train_for = "4.5 epochs"
    config.progressive = "2 until 2 epochs, 3 until 3 epochs"
    config.evaluate_every = "1.5 epochs"
    config.log_every = "25 steps"
    config.checkpoint_every = "100 steps"
    config.model.test_time_flip = True
    config.augment.flip = True
    config.label_smoothing = 0.1
    config.optimizer.nesterov = True
    config.optimizer.head_rate = 3.0
    config.schedule.warmup = "100 steps"
    return config
