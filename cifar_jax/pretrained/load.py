"""A file of weights into a model's parameters: every name, shape and dtype compared both ways."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.pretrained import port
from cifar_jax.pretrained.names import differences, listed
from cifar_jax.pretrained.ours import Header

_BACKBONE = "backbone."
_OPTIONAL = {"top", "head"}


@dataclass(frozen=True)
class Loaded:
    """What goes into the model, and what stays outside on either side, by name."""

    values: dict[str, np.ndarray]  # by the model's names
    header: Header
    unused: tuple[str, ...]  # of the file: a top or head that the model has no place for
    fresh: tuple[str, ...]  # of the model: a new head, which keeps its initial values


def load_pretrained(
    expected: Mapping[str, Any],
    path: str | os.PathLike,
    *,
    variant: str | None = None,
    head: str | None = None,
) -> Loaded:
    """Reads weights for a model.

    A transfer model takes a whole file of its kind, or a ResNet-50 as its backbone: a pooled head
    then takes a top of as many classes, any other head stays as initialised. A ResNet-50 takes a
    ResNet-50, or a transfer model's backbone. Nothing else may be missing or left over.

    Args:
        expected: {name: anything with shape and dtype} of every parameter and statistic, such as
            "stage1.block2.conv1.kernel" or "backbone.stage1.block2.conv1.kernel".
        path: a file of ours, or any that `port_weights` reads.
        variant: that of the model; None leaves it to the names.
        head: the kind of the model's; None leaves it to the names.

    Raises:
        UserError: with every difference.
    """
    return fit(expected, port.read(path), path, variant=variant, head=head)


def fit(
    expected: Mapping[str, Any],
    weights: port.Weights,
    path: str | os.PathLike,
    *,
    variant: str | None = None,
    head: str | None = None,
) -> Loaded:
    """Does what `load_pretrained` does, with weights that have been read from `path`."""
    if variant not in (None, weights.header.variant):
        raise UserError(
            f'config.model.variant is "{variant}", but {path} holds weights of the '
            f'"{weights.header.variant}" variant; set config.model.variant={weights.header.variant}'
        )
    values = _top_as_head(expected, _as_named_in(expected, weights.values))
    of_model, of_file = ({_part(name) for name in names} for names in (expected, values))
    own = weights.header.head
    if "head" in of_file and head is not None and own not in (None, head):
        raise UserError(
            f'config.model.head is "{head}", but {path} holds the weights of a "{own}" head; '
            f"set config.model.head={own}"
        )
    unused = {name for name in values if _part(name) in _OPTIONAL - of_model}
    fresh = {name for name in expected if _part(name) == "head" and "head" not in of_file}
    kept = {name: array for name, array in values.items() if name not in unused}
    wanted = {name: like for name, like in expected.items() if name not in fresh}
    lines = differences(kept, {name: like.shape for name, like in wanted.items()})
    # A wider type holds every float32 exactly.
    lines += [
        f"{name}: float32, the model has {like.dtype}"
        for name, like in wanted.items()
        if not np.can_cast(np.float32, like.dtype, "safe")
    ]
    if lines:
        raise UserError(
            f"{path}: {len(lines)} differences between its {weights.header.variant} weights and "
            f"the model:\n  {listed(lines)}"
        )
    cast = {name: array.astype(wanted[name].dtype, copy=False) for name, array in kept.items()}
    return Loaded(cast, weights.header, unused=tuple(sorted(unused)), fresh=tuple(sorted(fresh)))


def _as_named_in(
    expected: Mapping[str, Any], values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Puts the values of a ResNet-50 into, or takes them out of, a transfer model's backbone."""
    nested = [any(name.startswith(_BACKBONE) for name in names) for names in (expected, values)]
    if nested == [True, False]:
        return {_BACKBONE + name: array for name, array in values.items()}
    if nested == [False, True]:
        return {name.removeprefix(_BACKBONE): array for name, array in values.items()}
    return values


def _top_as_head(
    expected: Mapping[str, Any], values: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Takes a top for the pooled head where it has its shape: both are a layer on the means."""
    head = {f"{_BACKBONE}top.{leaf}": f"head.logits.{leaf}" for leaf in ("kernel", "bias")}
    fits = all(
        top in values and name in expected and values[top].shape == expected[name].shape
        for top, name in head.items()
    )
    if not fits:
        return values
    return {head.get(name, name): array for name, array in values.items()}


def _part(name: str) -> str:
    return name.removeprefix(_BACKBONE).partition(".")[0]
