"""The weights that a new run starts from: pretrained ones, or those the model was created with."""

from collections.abc import Callable, Mapping
from typing import Any

from cifar_jax.errors import UserError
from cifar_jax.pretrained.fetch import resolve
from cifar_jax.pretrained.load import load_pretrained
from cifar_jax.state import MODEL_PARTS, TrainState, from_arrays, named_leaves


def load_initial_weights(
    state: TrainState, config: Mapping[str, Any], *, tell: Callable[[str], None]
) -> TrainState:
    """Puts the pretrained weights of `config.model.pretrained` into a new state.

    Args:
      state: as created; its head keeps its initial values where the file has none.
      config: `config.model`.
      tell: is told what was loaded, and of a preprocessing that is not the weights' own.

    Returns:
      The state, with host arrays where weights were loaded; as it is for "none".

    Raises:
      UserError: if the file is missing, damaged, of another variant, or does not fit the model.
    """
    if config["name"] != "resnet50" or config["pretrained"] == "none":
        return state
    path = resolve(config["pretrained"])
    parts = {part: named_leaves(getattr(state, part)) for part in MODEL_PARTS}
    loaded = load_pretrained({k: v for part in parts.values() for k, v in part.items()}, path)
    header = loaded.header
    if header.variant != config["variant"]:
        raise UserError(
            f'config.model.variant is "{config["variant"]}", but {path} holds weights of the '
            f'"{header.variant}" variant; set config.model.variant={header.variant}'
        )
    fresh = f"; the head ({len(loaded.fresh)} tensors) starts anew" if loaded.fresh else ""
    tell(f"{len(loaded.values)} pretrained tensors from {path}{fresh}")
    if config["preprocessing"] != header.preprocessing:
        tell(
            f'note: config.model.preprocessing is "{config["preprocessing"]}"; these weights were '
            f'trained with "{header.preprocessing}"'
        )
    filled = {
        part: from_arrays(
            getattr(state, part),
            {name: loaded.values.get(name, leaf) for name, leaf in leaves.items()},
            origin=str(path),
        )
        for part, leaves in parts.items()
    }
    return state.replace(**filled)
