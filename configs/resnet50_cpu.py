"""Fine-tunes on two CPU cores in 74 minutes: small images first, frozen batch norms.

    python -m cifar_jax.main --config=configs/resnet50_cpu.py --workdir=runs/resnet50_cpu

Three quarters of an epoch at 64 px, as much at 96 px, two at 128 px: what the layers must learn
first they learn where a step costs a quarter. Batch norms keep the file's statistics, which
experiments/ablations/ found to be worth most. SGD at a high rate that a cosine takes to 0, the head
at three times the rate, flipped images. Official test images. What it reaches:
experiments/time_to_accuracy/.
"""

import ml_collections

from configs import resnet50_laptop


def get_config() -> ml_collections.ConfigDict:
    """Returns the configuration of the progressive transfer run."""
    config = resnet50_laptop.get_config()
    config.data.protocol = "standard"
    config.train_for = "3.5 epochs"
    config.progressive = "2 until 0.75 epochs, 3 until 1.5 epochs"
    config.evaluate_every = "0.75 epochs"
    config.log_every = "25 steps"
    config.checkpoint_every = "100 steps"
    config.model.batch_norm = "frozen"
    config.model.test_time_flip = True
    config.augment.flip = True
    config.label_smoothing = 0.1
    config.optimizer.nesterov = True
    config.optimizer.head_rate = 3.0
    config.schedule.warmup = "100 steps"
    return config
