"""Training from a configuration to a result: build, restore, loop, test."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax
from flax import nnx

from cifar_jax import config as configuration
from cifar_jax.checkpoint import Checkpointer, has_checkpoints
from cifar_jax.data.sources import Dataset, load
from cifar_jax.data.splits import Split, duplicates_across, fingerprint, make_splits
from cifar_jax.errors import UserError, tell
from cifar_jax.initial import find_weights, load_initial_weights, start_state
from cifar_jax.lock import locked
from cifar_jax.loop import PROFILE_FOLDER, History, Loop
from cifar_jax.models.registry import create_model
from cifar_jax.optim import OptimizerConfig, make_optimizer, make_schedule
from cifar_jax.parallel import check_batch_size, check_devices, create_execution
from cifar_jax.plan import Plan, make_plan
from cifar_jax.pretrained.load import Loaded
from cifar_jax.recording.metrics_log import JSONL_NAME
from cifar_jax.recording.recorder import open_recorder
from cifar_jax.recording.run_record import (
    count_test_read,
    describe_environment,
    field,
    read_run_record,
    update_run_record,
)
from cifar_jax.signals import StopSignal
from cifar_jax.state import (
    MODEL_PARTS,
    TrainState,
    count_parameters,
    create_state,
    from_arrays,
    model_leaves,
)
from cifar_jax.workdir import check_workdir


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to."""

    step: int  # finished updates
    stopped_by: int | None  # the signal that ended it early
    record: dict[str, Any]  # run.json
    rows: list[dict[str, Any]]  # metrics.jsonl


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, *, profile: bool = False
) -> Result:
    """Trains, or goes on training, and reads the test split once at the end.

    Args:
      config: as `configs/common.py` gives it.
      workdir: takes checkpoints, metrics, figure and record; a run found there is resumed.
      profile: writes a trace of a few calls to `workdir/profile`.

    Raises:
      UserError: for a wrong configuration, missing weights or data, a workdir in use or of another
        run.
      RunError: when the loss is not finite or a checkpoint cannot be written.
    """
    configuration.check(config)
    workdir = pathlib.Path(workdir).expanduser().absolute()
    check_devices()
    plain = configuration.to_dict(config)
    if not has_checkpoints(workdir):
        find_weights(plain["model"])  # a file that is missing is told before images are fetched
    with jax.default_matmul_precision(config.matmul_precision):
        setup = set_up(plain, lambda: create_model(plain["model"], seed=plain["seed"]))
        with locked(workdir, setting="--workdir"), StopSignal() as stop:
            return run(setup, workdir, stop=stop, profile=profile)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run starts from, before its workdir is touched."""

    config: dict[str, Any]
    data: Dataset
    splits: dict[str, Split]
    inputs: dict[str, Split]  # the splits' rows of what the model reads: images, or features
    plan: Plan
    schedule: optax.Schedule
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


def set_up(config: dict[str, Any], model: Callable[[], nnx.Module]) -> Setup:
    """Finds the images and plans the run; nothing is written, and no weights are drawn or read.

    Args:
      config: as `config.to_dict` gives it.
      model: creates what is trained.

    Raises:
      UserError: without the images, or for numbers that do not fit them.
    """
    data = load(config["data"]["source"], config["data"]["directory"])
    splits = make_splits(
        data, protocol=config["data"]["protocol"], seed=config["data"]["split_seed"]
    )
    for key in ("batch_size", "eval_batch_size"):
        check_batch_size(config[key], key=key)
    plan = make_plan(config, train_count=len(splits["train"]))
    schedule = make_schedule(
        config["optimizer"]["learning_rate"],
        name=config["schedule"]["name"],
        warmup=plan.warmup,
        steps=plan.total,
        final_fraction=config["schedule"]["final_fraction"],
    )
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), schedule)

    def create():
        return create_state(model(), optimizer, seed=config["seed"])

    template = jax.eval_shape(create)
    expected = model_leaves({part: getattr(template, part) for part in MODEL_PARTS})
    return Setup(
        config=config,
        data=data,
        splits=splits,
        inputs=splits,
        plan=plan,
        schedule=schedule,
        template=template,
        create=create,
        pretrained=lambda: load_initial_weights(expected, config["model"], tell=tell),
    )


def run(setup: Setup, workdir: pathlib.Path, *, stop: StopSignal, profile: bool) -> Result:
    """Makes a run, or what is left of it, in a workdir that is locked for it."""
    plan = setup.plan
    record = check_workdir(
        workdir, setup.config, features=setup.features, checkpoints=setup.checkpoints
    )
    checkpointer = Checkpointer(workdir / setup.checkpoints, keep=setup.config["keep_checkpoints"])
    setup, state, history, weights = _restore(setup, checkpointer, workdir, record=record)
    _record_start(setup, workdir, record, step=int(state.step), weights=weights)
    with open_recorder(
        workdir,
        title=_title(setup),
        start_step=int(state.step),
        start_rows=history.rows,
        total_steps=plan.total,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.batch_size,
    ) as recorder:
        if missing := history.rows - len(recorder.rows):
            recorder.message(f"warning: {workdir / JSONL_NAME} lacks {missing} rows of this run")
            history.rows -= missing
        recorder.message(_describe_start(setup, step=int(state.step)))
        loop = Loop(
            state=state,
            history=history,
            plan=plan,
            schedule=setup.schedule,
            splits=setup.inputs,
            execution=create_execution(setup.config["execution"]),
            on_device=setup.config["data"]["on_device"],
            checkpointer=checkpointer,
            checkpoint_extra=setup.identity(),
            recorder=recorder,
            stop=stop,
        )
        loop.fit(workdir / PROFILE_FOLDER if profile else None)
        record = _test(loop, workdir)
        checkpointer.close()
        return Result(loop.step, stop.received, record, recorder.rows)


def _restore(
    setup: Setup, checkpointer: Checkpointer, workdir: pathlib.Path, *, record: dict[str, Any]
) -> tuple[Setup, TrainState, History, dict[str, Any] | None]:
    """Starts from the workdir's latest whole checkpoint, or pretrained weights, or from scratch.

    Returns:
      The setup of the run as it was first started, its state and history, and what its weights are.
    """
    restored = checkpointer.restore_latest(lambda text: tell(f"warning: {text}"))
    if restored is None:
        loaded = setup.pretrained()
        about = loaded and dataclasses.asdict(loaded.header)
        return setup, start_state(setup.create, loaded and loaded.values), History(), about
    step, arrays, saved = restored
    ours = setup.identity()
    configuration.check_same_run(ours["config"], saved["config"], workdir=str(workdir))
    # Kaggle's form has no labelled test images, and so no hash of them.
    hashes = saved["data_sha256"].items()
    same_images = all(ours["data_sha256"].get(name, found) == found for name, found in hashes)
    if not same_images or saved["splits_sha256"] != ours["splits_sha256"]:
        raise UserError(
            f"{workdir} holds a run on other images or splits; use the data that it was started "
            "with (config.data.source, config.data.directory) or another --workdir"
        )
    if step > setup.plan.total:
        raise UserError(
            f'config.train_for is "{setup.config["train_for"]}", {setup.plan.total} steps; '
            f"{workdir} holds a run of {step} steps already"
        )
    checkpointer.move_aside_after(step)
    state = from_arrays(setup.template, arrays, origin=f"checkpoint {step} of {workdir}")
    setup = dataclasses.replace(setup, config=_with_origin(setup.config, saved["config"]))
    return setup, state, History.from_json(saved["history"]), record.get("weights")


def _with_origin(config: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Keeps where the weights came from: they were read once, by the first start."""
    asked, origin = (each["model"]["pretrained"] for each in (config, saved))
    if asked != origin:
        tell(f'note: config.model.pretrained is "{asked}"; this run started from "{origin}"')
    return {**config, "model": {**config["model"], "pretrained": origin}}


def _record_start(
    setup: Setup, workdir: pathlib.Path, record: dict, *, step: int, weights: dict | None
) -> None:
    data, splits = setup.data, setup.splits
    update_run_record(
        workdir,
        config=setup.config,
        parameters=count_parameters(setup.template),
        features=setup.features,
        weights=weights,
        data={"source": data.source, "is_sample": data.is_sample, "sha256": data.sha256},
        splits={
            "protocol": setup.config["data"]["protocol"],
            "sizes": {name: len(split) for name, split in splits.items()},
            "sha256": fingerprint(splits),
            "duplicates": duplicates_across(splits),
        },
        starts=[*(record.get("starts") or []), {"step": step, **describe_environment()}],
        # Another step's, of a shorter run or a checkpoint that is gone, is not this state's.
        result=record.get("result") if field(record, "result.step") == step else None,
    )


def _title(setup: Setup) -> str:
    config, data = setup.config, setup.data
    sample = f"; SAMPLE of {len(data.train_images):,} images" if data.is_sample else ""
    model = config["model"]["name"] + (", frozen backbone" if setup.features else "")
    return f"{model} on CIFAR-10, {config['data']['protocol']} splits{sample}"


def _describe_start(setup: Setup, *, step: int) -> str:
    plan, splits = setup.plan, setup.splits
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    left_out = len(splits["train"]) - plan.steps_per_epoch * plan.batch_size
    sample = "the small SAMPLE of CIFAR-10; " if setup.data.is_sample else ""
    return (
        f"{sample}images: {sizes}; {plan.steps_per_epoch} steps an epoch, {left_out} images left "
        f"out of each; {jax.device_count()} {jax.devices()[0].device_kind} device(s); "
        f"starting after step {step} of {plan.total}"
    )


def _test(loop: Loop, workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the test split, if the run is at its end and has not read it there before."""
    record = read_run_record(workdir)
    if loop.stop.received is not None or field(record, "result.step") == loop.step:
        return record
    count_test_read(workdir, {"step": loop.step, "checkpoint": "latest"})  # also if cut short
    totals = loop.evaluate(loop.splits["test"])
    if totals is None:
        return record
    result = {
        **totals.means("test_"),
        "test_count": totals.count,
        "train_seconds": loop.history.train_seconds,
        "step": loop.step,
    }
    return update_run_record(workdir, result=result)
