"""What a training step does beside the model and the optimizer."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from cifar_jax.augment import Augment
from cifar_jax.optim import leaf_name
from cifar_jax.phases import Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Fixed while a program is compiled; the defaults are a plain step."""

    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    accumulate: int = 1  # steps an update
    augment: Augment = Augment()
    frozen: tuple[str, ...] = ()  # patterns of parameters' names, as `is_frozen` reads them
    resized_at: int = 0  # the step from which on images have their present size

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Recipe":
        """Reads a configuration, as `config.to_dict` gives it; the rest comes with the phase."""
        return cls(
            label_smoothing=config["label_smoothing"],
            ema_decay=config["ema_decay"],
            accumulate=config["optimizer"]["accumulate"],
            augment=Augment(**config["augment"]),
        )

    def in_phase(self, phase: Phase) -> "Recipe":
        """Returns what a step does in a phase of the run."""
        return dataclasses.replace(self, frozen=phase.frozen, resized_at=phase.resized_at)


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Tells whether a parameter is frozen.

    Args:
      name: such as "backbone.stage1.block2.conv1.kernel".
      patterns: each begins a part of a name, such as "stage1" or "stage?.block1.norm*.scale".
    """
    return any(fnmatch.fnmatchcase(f".{name}", f"*.{pattern}*") for pattern in patterns)


def where_frozen(params: Any, patterns: Iterable[str]) -> Any:
    """Returns a tree like `params` of bools: True where a parameter is frozen."""
    return jax.tree.map_with_path(lambda path, _: is_frozen(leaf_name(path), patterns), params)
