"""What a model is in each phase of a run, and which of its parameters learn at what rate."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax import nnx

from cifar_jax.errors import UserError
from cifar_jax.models.batch_norm import BatchNorm
from cifar_jax.optim import GROUPS, OptimizerConfig, group_of, rate_of
from cifar_jax.phases import FREEZE, Phase
from cifar_jax.recipe import is_frozen
from cifar_jax.state import model_leaves, split_model

CreateModel = Callable[[Mapping[str, Any]], nnx.Module]  # of `config.model`


def make_structures(
    create: CreateModel, config: Mapping[str, Any], phases: tuple[Phase, ...]
) -> dict[Phase, nnx.GraphDef]:
    """Returns the model's structure in each phase: same arrays, other sizes and frozen norms.

    Args:
      create: the model of a `config.model`.
      config: as `config.to_dict` gives it.
      phases: of the run.

    Raises:
      UserError: for a pattern that no parameter has in its name, or where none is left to train.
    """
    return {phase: _structure(create, config, phase) for phase in phases}


def _structure(create: CreateModel, config: Mapping[str, Any], phase: Phase) -> nnx.GraphDef:
    model_config = {**config["model"], "upsampling": phase.upsampling}
    model = nnx.eval_shape(lambda: create(model_config))
    _check_patterns(model, phase, batch_norm=config["model"]["batch_norm"])
    if config["freeze"]["batch_norm"] == "frozen":
        for path, module in nnx.iter_modules(model):
            names = (".".join(map(str, (*path, leaf))) for leaf in ("scale", "bias"))
            if isinstance(module, BatchNorm):
                module.frozen = all(is_frozen(name, phase.frozen) for name in names)
    return split_model(model)[0]


def _check_patterns(model: nnx.Module, phase: Phase, *, batch_norm: str) -> None:
    parts = split_model(model)[1]
    names = _parameters(parts)
    found = f'config.{FREEZE} has "{{}}"'
    for pattern in phase.frozen:
        if not any(is_frozen(name, [pattern]) for name in names):
            tops = dict.fromkeys(name.removeprefix("backbone.").split(".")[0] for name in names)
            raise UserError(
                f"{found.format(pattern)}, with which no part of a parameter's name begins; "
                f"expected such as {', '.join(tops)}"
            )
    if not count_learning(parts, phase.frozen, batch_norm=batch_norm):
        raise UserError(f"{found.format(' '.join(phase.frozen))}, which leaves nothing to train")


def describe_groups(
    parts: Mapping[str, Any],
    optimizer: OptimizerConfig,
    phases: tuple[Phase, ...],
    *,
    batch_norm: str,
) -> str:
    """Says what learns, in numbers: a line a phase.

    Args:
      parts: of the model, as `split_model` gives them.
      optimizer: which has the groups' rates.
      phases: of the run.
      batch_norm: `config.model.batch_norm`.
    """
    described = (_describe(parts, optimizer, phase, batch_norm) for phase in phases)
    return "\n".join(described)


def count_learning(parts: Mapping[str, Any], frozen: Collection[str], *, batch_norm: str) -> int:
    """Returns how many parameters learn.

    Args:
      parts: of the model, as `split_model` gives them.
      frozen: patterns, as `recipe.is_frozen` reads them.
      batch_norm: `config.model.batch_norm`; "frozen" ones of the backbone do not learn.
    """
    return sum(_learning(parts, frozen, batch_norm).values())


def _learning(parts: Mapping[str, Any], frozen: Collection[str], batch_norm: str) -> dict[str, int]:
    sizes = _parameters(parts)
    norms = {name.removesuffix(".scale") for name in sizes if name.endswith(".scale")}

    def learns(name: str) -> bool:
        is_norm = name.startswith("backbone.") and name.rpartition(".")[0] in norms
        return not is_frozen(name, frozen) and not (is_norm and batch_norm == "frozen")

    return {name: size for name, size in sizes.items() if learns(name)}


def _describe(
    parts: Mapping[str, Any], optimizer: OptimizerConfig, phase: Phase, batch_norm: str
) -> str:
    learning, frozen = (dict.fromkeys(GROUPS, 0) for _ in range(2))
    learns = _learning(parts, phase.frozen, batch_norm)
    for name, size in _parameters(parts).items():
        (learning if name in learns else frozen)[group_of(name)] += size
    rates = ", ".join(
        f"{group} {count:,} at {rate_of(group, optimizer):g}"
        for group, count in learning.items()
        if count
    )
    kept = ", ".join(f"{group} {count:,}" for group, count in frozen.items() if count) or "none"
    return f"{phase.describe()}; parameters and shares of the rate: {rates}; not learning: {kept}"


def _parameters(parts: Mapping[str, Any]) -> dict[str, int]:
    return {name: leaf.size for name, leaf in model_leaves({"params": parts["params"]}).items()}
