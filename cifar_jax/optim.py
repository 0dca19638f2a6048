"""The optimizer: schedules and the optax chain, from plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import optax

GROUPS = ("head", "stage4", "stage3", "stage2", "stage1", "stem")  # from the loss backwards

# What only some optimizers and schedules read: its value in configs/common.py, and which they are.
READ_BY = {
    "optimizer.momentum": (0.0, ("rmsprop", "sgd")),
    "optimizer.nesterov": (False, ("sgd",)),
    "optimizer.decay": (0.9, ("rmsprop",)),
    "optimizer.beta1": (0.9, ("adam", "adamw")),
    "optimizer.beta2": (0.999, ("adam", "adamw")),
    "optimizer.epsilon": (1e-7, ("rmsprop", "adam", "adamw")),
    "schedule.final_fraction": (0.0, ("cosine", "linear")),
}


def unread(config: Mapping[str, Any]) -> list[str]:
    """Returns a line for each field of optimizer and schedule that is set and has no effect.

    Args:
      config: as `config.to_dict` gives it.
    """
    lines = []
    for key, (default, readers) in READ_BY.items():
        of, field = key.split(".")
        name, value = config[of]["name"], config[of][field]
        if value != default and name not in readers:
            lines.append(
                f'config.{key} is {value!r}, which config.{of}.name="{name}" does not read'
            )
    return lines


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
    head_rate: float = 1.0
    layer_decay: float = 1.0
    accumulate: int = 1


def make_schedule(
    learning_rate: float, *, name: str, warmup: int, steps: int, final_fraction: float
) -> optax.Schedule:
    """Returns the learning rate of update k, k = 0, 1, ...

    Args:
      learning_rate: the highest rate.
      name: "constant", or "cosine" or "linear" (to `final_fraction` of the rate at update `steps`).
      warmup: updates of linear warm-up from 0; update `warmup` is the first at the full rate.
      steps: updates of the whole run.
      final_fraction: of the rate, where a cosine or a line ends.
    """
    left = max(steps - warmup, 1)
    if name == "constant":
        after = optax.constant_schedule(learning_rate)
    elif name == "linear":
        after = optax.linear_schedule(learning_rate, final_fraction * learning_rate, left)
    else:
        after = optax.cosine_decay_schedule(learning_rate, left, final_fraction)
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, learning_rate, warmup), after], boundaries=[warmup]
    )


def leaf_name(path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf of nested dictionaries: "stage1.block2.conv1.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_kernel(path: tuple[Any, ...], _: Any) -> bool:
    """Tells kernels from biases and norm scales, by name: only kernels are decayed."""
    return getattr(path[-1], "key", None) == "kernel"


def make_optimizer(
    config: OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Returns the chain: clip the whole gradient, scale it, rate, momentum, weight decay, share.

    RMSprop and SGD are Keras's (keras/src/optimizers/rmsprop.py, sgd.py): velocity from 0, epsilon
    inside the root, and momentum over steps that already carry their rate; PyTorch applies the
    rate after the momentum, which is the same while the rate is constant. Adam's epsilon is
    PyTorch's: outside the root, after the bias correction. Weight decay is decoupled for every
    optimizer: an update also takes off rate * weight_decay * kernel, outside the momentum. The
    share of head and stages (`head_rate`, `layer_decay`) scales all of that. With
    `accumulate` an update is made every so many steps, from the mean of their gradients; the
    schedule counts updates.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    scale = {
        "rmsprop": optax.scale_by_rms(config.decay, config.epsilon, eps_in_sqrt=True),
        "sgd": optax.identity(),
        "adam": adam,
        "adamw": adam,
    }[config.name]
    has_momentum = config.momentum and config.name in ("rmsprop", "sgd")
    nesterov = config.nesterov and config.name == "sgd"  # Keras's RMSprop has none
    by_group = optax.stateless(lambda updates, _: _scale_by_group(updates, config))
    decay = optax.add_decayed_weights(
        lambda step: -config.weight_decay * schedule(step),
        mask=lambda params: jax.tree.map_with_path(is_kernel, params),
    )
    chain = optax.chain(
        clip,
        scale,
        optax.scale_by_learning_rate(schedule),
        optax.trace(config.momentum, nesterov) if has_momentum else optax.identity(),
        decay if config.weight_decay else optax.identity(),
        by_group if has_groups(config) else optax.identity(),
    )
    if config.accumulate == 1:
        return chain
    return optax.MultiSteps(chain, config.accumulate).gradient_transformation()


def has_groups(config: OptimizerConfig) -> bool:
    """Tells whether groups of layers learn at rates of their own."""
    return (config.head_rate, config.layer_decay) != (1.0, 1.0)


def group_of(name: str) -> str:
    """Returns the group of GROUPS of a parameter, such as "backbone.stage1.block2.conv1.kernel"."""
    part = name.removeprefix("backbone.").partition(".")[0]
    return part if part in GROUPS else "stem" if part.startswith("stem") else "head"


def rate_of(group: str, config: OptimizerConfig) -> float:
    """Returns a group's share of the learning rate."""
    return config.head_rate if group == "head" else config.layer_decay ** GROUPS.index(group)


def _scale_by_group(updates: Any, config: OptimizerConfig) -> Any:
    rates = {group: rate_of(group, config) for group in GROUPS}
    return jax.tree.map_with_path(lambda path, x: x * rates[group_of(leaf_name(path))], updates)
