"""What a run starts from, made from its configuration: images, plan, optimizer, structures."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from cifar_jax.data.sources import Dataset, load
from cifar_jax.data.splits import Split, fingerprint, make_splits
from cifar_jax.errors import UserError, tell
from cifar_jax.initial import load_initial_weights
from cifar_jax.optim import OptimizerConfig, has_groups, make_optimizer, make_schedule, unread
from cifar_jax.parallel import check_batch_size
from cifar_jax.phases import Phase
from cifar_jax.plan import Plan, make_plan
from cifar_jax.pretrained.load import Loaded
from cifar_jax.recipe import Recipe
from cifar_jax.recording.run_record import describe_environment
from cifar_jax.state import (
    TrainState,
    count_parameters,
    create_state,
    model_leaves,
    split_model,
)
from cifar_jax.structures import CreateModel, count_learning, describe_groups, make_structures

_BATCH_NORMS = {
    "train": "train",
    "eval": "the backbone's keep their statistics",
    "frozen": "the backbone's are frozen",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run starts from, before its workdir is touched."""

    config: dict[str, Any]
    environment: dict[str, Any]  # as `describe_environment` found it
    data: Dataset
    splits: dict[str, Split]
    inputs: dict[str, Split]  # the splits' rows of what the model reads: images, or features
    plan: Plan
    schedule: optax.Schedule  # of steps
    optimizer: OptimizerConfig
    structures: dict[Phase, nnx.GraphDef]
    template: TrainState  # shapes and dtypes only: drawing a ResNet-50 takes seconds
    create: Callable[[], TrainState]
    pretrained: Callable[[], Loaded | None]
    features: dict[str, Any] | None = None  # what the features depend on, if they are the inputs
    checkpoints: str = "."  # where in the workdir

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint must share with the run that goes on from it."""
        return {
            "config": self.config,
            "splits_sha256": fingerprint(self.splits),
            "data_sha256": self.data.sha256,
        }


def load_splits(
    config: Mapping[str, Any], directory: str | os.PathLike | None = None
) -> tuple[Dataset, dict[str, Split]]:
    """Finds the images of `config.data` and says which are for what.

    Args:
      config: as `config.to_dict` gives it.
      directory: in place of `config.data.directory`.

    Raises:
      UserError: without the images, or for splits that they do not allow.
    """
    data = load(config["data"]["source"], directory or config["data"]["directory"])
    splits = make_splits(
        data,
        protocol=config["data"]["protocol"],
        seed=config["data"]["split_seed"],
        images_a_class=config["data"]["images_a_class"],
    )
    return data, splits


def check_same_images(
    data: Dataset, splits: Mapping[str, Split], saved: Mapping[str, Any], *, workdir: str
) -> None:
    """Refuses other images or splits than those that a checkpoint's "extra" tells of.

    Raises:
      UserError: naming the workdir.
    """
    # Kaggle's form has no labelled test images, and so no hash of them.
    hashes = saved["data_sha256"].items()
    same_images = all(data.sha256.get(name, found) == found for name, found in hashes)
    if not same_images or saved["splits_sha256"] != fingerprint(splits):
        raise UserError(
            f"{workdir} holds a run on other images or splits than {data.source} gives; use the "
            "data that it was started with (config.data.source, config.data.directory; --directory)"
        )


def set_up(config: dict[str, Any], model: CreateModel) -> Setup:
    """Finds the images and plans the run; nothing is written, and no weights are drawn or read.

    Args:
      config: as `config.to_dict` gives it.
      model: creates what is trained, from `config.model`.

    Raises:
      UserError: without the images, or for numbers that do not fit them.
    """
    environment = describe_environment()  # and the time: what follows may fetch images
    for line in unread(config):
        tell(f"note: {line}")
    data, splits = load_splits(config)
    for key in ("batch_size", "eval_batch_size"):
        check_batch_size(config[key], key=key)
    plan = make_plan(config, train_count=len(splits["train"]))
    optimizer = OptimizerConfig(**config["optimizer"])
    steps_an_update = optimizer.accumulate
    schedule = make_schedule(
        optimizer.learning_rate,
        name=config["schedule"]["name"],
        warmup=math.ceil(plan.warmup / steps_an_update),
        steps=plan.total // steps_an_update,
        final_fraction=config["schedule"]["final_fraction"],
    )
    update, recipe = make_optimizer(optimizer, schedule), Recipe.of(config)

    def create():
        return create_state(model(config["model"]), update, seed=config["seed"], recipe=recipe)

    template = jax.eval_shape(create)
    return Setup(
        config=config,
        environment=environment,
        data=data,
        splits=splits,
        inputs=splits,
        plan=plan,
        schedule=lambda step: schedule(step // steps_an_update),
        optimizer=optimizer,
        structures=make_structures(model, config, plan.phases),
        template=template,
        create=create,
        pretrained=lambda: load_initial_weights(
            model_leaves(template.parts), config["model"], tell=tell
        ),
    )


def check_model(config: Mapping[str, Any], plan: Plan, model: CreateModel) -> None:
    """Refuses weights and patterns that do not fit the model, without starting a JAX backend.

    Args:
      config: as `config.to_dict` gives it.
      plan: of the run.
      model: creates what is trained, from `config.model`.

    Raises:
      UserError: as at the run's start.
    """
    make_structures(model, config, plan.phases)
    parts = split_model(nnx.eval_shape(lambda: model(config["model"])))[1]
    load_initial_weights(model_leaves(parts), config["model"], tell=lambda line: None)


def title(setup: Setup) -> str:
    """Returns the title of the run's figure."""
    config, data = setup.config, setup.data
    sample = f"; SAMPLE of {len(data.train_images):,} images" if data.is_sample else ""
    frozen = f", frozen up to {config['freeze']['features']}" if setup.features else ""
    model = config["model"]["name"] + frozen
    return f"{model} on CIFAR-10, {config['data']['protocol']} splits{sample}"


def describe_start(setup: Setup, *, step: int) -> str:
    """Returns what is said at the start: images, devices, and what learns."""
    plan, splits = setup.plan, setup.splits
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    left_out = len(splits["train"]) - plan.steps_per_epoch * plan.batch_size
    sample = "the small SAMPLE of CIFAR-10; " if setup.data.is_sample else ""
    return (
        f"{sample}images: {sizes}; {plan.steps_per_epoch} steps an epoch, {left_out} images left "
        f"out of each; {jax.device_count()} {jax.devices()[0].device_kind} device(s); "
        f"starting after step {step} of {plan.total}" + _describe_learning(setup)
    )


def _describe_learning(setup: Setup) -> str:
    """Says what learns at which rate, and what the batch norms do."""
    phases, config, parts = setup.plan.phases, setup.config, setup.template.parts
    batch_norm = config["model"]["batch_norm"]
    if len(phases) == 1 and not phases[0].frozen and not has_groups(setup.optimizer):
        count = count_parameters(setup.template)
        learning = count_learning(parts, phases[0].frozen, batch_norm=batch_norm)
        text = f"; {count:,} parameters, "
        text += "all of them learn" if learning == count else f"{learning:,} of them learn"
    else:
        text = "\n" + describe_groups(parts, setup.optimizer, phases, batch_norm=batch_norm)
    if setup.features:
        last = config["freeze"]["features"]
        frozen = f"all up to {last}, its norms too, is frozen and computed once"
        text = f"; {frozen}; behind it: {text.removeprefix('; ')}"
    if jax.tree.leaves(setup.template.parts["batch_stats"]):
        text += f"; batch norms: {_BATCH_NORMS[batch_norm]}"
        if batch_norm == "train" and any(phase.frozen for phase in phases):
            text += f", in frozen layers {config['freeze']['batch_norm']}"
    return text
