"""The state that a new run starts from: pretrained weights, and else what the model draws."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.pretrained.fetch import resolve
from cifar_jax.pretrained.load import Loaded, load_pretrained
from cifar_jax.pretrained.names import VARIANTS
from cifar_jax.state import TrainState, fill, model_leaves


def find_weights(config: Mapping[str, Any]) -> Path | None:
    """Returns the file that `config.model.pretrained` means, downloaded if need be.

    Args:
      config: `config.model`.

    Returns:
      Its path; None where the model starts without one.

    Raises:
      UserError: where it is missing and cannot be had, or has not the published hash; where there
        is none and the batch norms are to keep its statistics.
    """
    pretrained, variant = config["pretrained"], config["variant"]
    if pretrained == "none":
        if config["batch_norm"] != "train":
            raise UserError(
                f'config.model.batch_norm is "{config["batch_norm"]}", which keeps a file\'s '
                'statistics; with config.model.pretrained="none" set config.model.batch_norm=train'
            )
        return None
    if pretrained in VARIANTS and pretrained != variant:  # told without a download
        raise UserError(
            f'config.model.variant is "{variant}", but config.model.pretrained="{pretrained}" are '
            f'weights of the "{pretrained}" variant; set config.model.variant={pretrained}'
        )
    try:
        return resolve(pretrained)
    except UserError as error:
        raise type(error)(f"config.model.pretrained: {error}") from error


def load_initial_weights(
    expected: Mapping[str, Any], config: Mapping[str, Any], *, tell: Callable[[str], None]
) -> Loaded | None:
    """Reads the pretrained weights of `config.model.pretrained`.

    Args:
      expected: {name: anything with shape and dtype} of the model's parameters and statistics.
      config: `config.model`.
      tell: is told what was loaded, and of settings that are not the weights' own.

    Returns:
      What the file gives; None for "none".

    Raises:
      UserError: if the file is missing, damaged, of another variant, or does not fit the model.
    """
    path = find_weights(config)
    if path is None:
        if config["name"] == "resnet50":
            tell('all weights start at random: config.model.pretrained is "none"')
        return None
    loaded = load_pretrained(expected, path, variant=config["variant"], head=config["head"])
    fresh = f"; the head ({len(loaded.fresh)} tensors) starts anew" if loaded.fresh else ""
    unused = f"; not used: {', '.join(loaded.unused)}" if loaded.unused else ""
    tell(f"{len(loaded.values)} pretrained tensors from {path}{fresh}{unused}")
    for note in _notes(loaded, config, path):
        tell(f"note: {note}")
    return loaded


def _notes(loaded: Loaded, config: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Yields what the weights were trained with, where `config.model` says otherwise."""
    header = loaded.header
    if header.preprocessing == "unknown":
        yield f"{path} does not say which preprocessing it was trained with"
    elif config["preprocessing"] != header.preprocessing:
        yield (
            f'config.model.preprocessing is "{config["preprocessing"]}"; these weights were '
            f'trained with "{header.preprocessing}"'
        )
    if "head.logits.kernel" in loaded.values:
        known = {"upsampling": header.upsampling, "interpolation": header.interpolation}
        others = [name for name, value in known.items() if value not in (None, config[name])]
        if others:
            asked, own = (", ".join(f"{key} {of[key]}" for key in others) for of in (config, known))
            yield f"config.model has {asked}; the head of these weights was trained with {own}"


def start_state(
    create: Callable[[], TrainState], pretrained: Mapping[str, np.ndarray] | None
) -> TrainState:
    """Returns the state before the first update.

    Args:
      create: draws a whole state.
      pretrained: what takes the place of drawn parameters and statistics, by the model's names.
    """
    if pretrained is None:
        return create()

    # Compiled, because only what is used is drawn then: of a pretrained model the head.
    @jax.jit
    def start(pretrained):
        state = create()
        return state.start_from(fill(state.parts, model_leaves(state.parts) | pretrained))

    return start(dict(pretrained))
