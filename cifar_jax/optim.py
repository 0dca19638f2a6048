"""The optimizer: schedules and the optax chain, from plain values."""

import dataclasses
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`config.optimizer`, field by field; see `configs/common.py` for units."""

    name: str
    learning_rate: float
    momentum: float
    nesterov: bool
    decay: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float


def make_schedule(
    learning_rate: float, *, name: str, warmup: int, steps: int, final_fraction: float
) -> optax.Schedule:
    """Returns the learning rate of update k, k = 0, 1, ...

    Args:
      learning_rate: the highest rate.
      name: "constant" or "cosine" (to `final_fraction` of the rate at update `steps`).
      warmup: updates of linear warm-up from 0; update `warmup` is the first at the full rate.
      steps: updates of the whole run.
      final_fraction: of the rate, for the cosine's end.
    """
    if name == "constant":
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(learning_rate, max(steps - warmup, 1), final_fraction)
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, warmup), after], boundaries=[warmup]
    )


def is_kernel(path: tuple[Any, ...], _: Any) -> bool:
    """Tells kernels from biases and norm scales, by name: only kernels are decayed."""
    return getattr(path[-1], "key", None) == "kernel"


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the chain: clip the whole gradient, scale, decay the kernels, apply the rate.

    RMSprop is Keras's: velocity from 0, epsilon inside the root, momentum after the rate's scale
    (keras/src/optimizers/rmsprop.py). SGD's momentum is Keras's with a constant rate and PyTorch's
    always. Adam's epsilon is PyTorch's: outside the root, after the bias correction. Weight decay
    is decoupled for every optimizer: it adds `weight_decay * kernel` before the rate.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    momentum = config.momentum or None
    scale = {
        "rmsprop": lambda: optax.chain(
            optax.scale_by_rms(config.decay, config.epsilon, eps_in_sqrt=True),
            optax.trace(momentum) if momentum else optax.identity(),
        ),
        "sgd": lambda: optax.trace(momentum, config.nesterov) if momentum else optax.identity(),
        "adam": lambda: optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        "adamw": lambda: optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    }[config.name]()
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map_with_path(is_kernel, params)
    )
    return optax.chain(
        clip,
        scale,
        decay if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )
