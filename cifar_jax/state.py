"""The training state: one pytree of arrays, and its flat, named form for checkpoints."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cifar_jax.errors import UserError
from cifar_jax.optim import leaf_name
from cifar_jax.recipe import Recipe

MODEL_PARTS = ("params", "batch_stats")
EMA = "ema."  # what the names of averaged parts begin with


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and changes, as pure arrays, and how to read them."""

    step: jax.Array  # int32 [], finished updates: update k takes batch k and the keys of k
    seed: jax.Array  # uint32 [], of dropout and augmentation
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: optax.OptState
    ema: dict[str, Any]  # averages of params and batch_stats; empty without `recipe.ema_decay`
    graphdef: nnx.GraphDef = flax.struct.field(pytree_node=False)
    optimizer: optax.GradientTransformation = flax.struct.field(pytree_node=False)
    recipe: Recipe = flax.struct.field(pytree_node=False)

    @property
    def parts(self) -> dict[str, Any]:
        """The model's arrays as {part: nested dictionary} of `MODEL_PARTS`."""
        return {part: getattr(self, part) for part in MODEL_PARTS}

    def start_from(self, parts: dict[str, Any]) -> "TrainState":
        """Returns the state before the first update of a model with these arrays."""
        ema = jax.tree.map(jnp.copy, parts) if self.recipe.ema_decay else {}
        return self.replace(**parts, opt_state=self.optimizer.init(parts["params"]), ema=ema)


def create_state(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
) -> TrainState:
    """Splits a model into arrays and structure, and starts the optimizer.

    Args:
      model: variables of types `nnx.Param` and `nnx.BatchStat` only.
      optimizer: an optax transformation.
      seed: of dropout and augmentation, 0 to 2**32 - 1.
      recipe: what a step does beside.
    """
    graphdef, parts = split_model(model)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        **parts,
        opt_state=(),
        ema={},
        graphdef=graphdef,
        optimizer=optimizer,
        recipe=recipe,
    )
    return state.start_from(parts)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Returns a model's structure, and its arrays as {part: nested dictionary} of `MODEL_PARTS`."""
    graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, dict(zip(MODEL_PARTS, map(nnx.to_pure_dict, states), strict=True))


def model_leaves(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a split model's leaves by the model's own names ("dense1.kernel"), in tree order."""
    return {name.partition(".")[2]: leaf for name, leaf in named_leaves(parts).items()}


def fill(template: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Puts values by the model's own names, as `model_leaves` gives them, into its parts."""
    leaves = [values[name] for name in model_leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def trained_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns what a checkpoint holds of the model: {"params.dense1.kernel": array, ...}.

    Where averages were kept, those: they are what was evaluated.
    """
    averaged = any(name.startswith(EMA) for name in arrays)
    of_model = {
        without_ema(name): array
        for name, array in arrays.items()
        if name.startswith(EMA) == averaged
    }
    return {name: x for name, x in of_model.items() if name.split(".")[0] in MODEL_PARTS}


def without_ema(name: str) -> str:
    """Returns the name of what "ema.params..." averages; other names as they are."""
    return name.removeprefix(EMA)


def count_parameters(state: TrainState) -> int:
    """Returns the number of parameters, frozen ones among them; statistics are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree as {"params.dense1.kernel": leaf, ...}, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaf_name(path): leaf for path, leaf in leaves}


def to_arrays(tree: Any) -> dict[str, np.ndarray]:
    """Copies a tree of arrays to the host, by name.

    The copies are ours: a device buffer that is donated later cannot change them.
    """
    return {name: np.array(leaf) for name, leaf in named_leaves(tree).items()}


def from_arrays(template: Any, arrays: Mapping[str, np.ndarray], *, origin: str) -> Any:
    """Puts named arrays into a tree like `template`, strictly.

    Args:
      template: a tree whose leaves have `shape` and `dtype`.
      arrays: as `to_arrays` gives them.
      origin: what the arrays come from, for the message.

    Returns:
      A tree like `template` with the arrays (host) as leaves.

    Raises:
      UserError: listing every missing or surplus name and every difference in shape or dtype.
    """
    leaves = named_leaves(template)
    differences = [f"{name} is missing" for name in leaves if name not in arrays]
    differences += [f"{name} is not known here" for name in arrays if name not in leaves]
    for name, leaf in leaves.items():
        found = arrays.get(name)
        if found is not None and (found.shape, found.dtype) != (leaf.shape, leaf.dtype):
            differences.append(
                f"{name} is {found.dtype}{list(found.shape)}, "
                f"expected {leaf.dtype}{list(leaf.shape)}"
            )
    if differences:
        raise UserError(f"{origin} does not fit the model: {'; '.join(differences)}")
    return jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in leaves])
