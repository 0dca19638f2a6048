"""Training from a configuration to a result: build, restore, loop, test."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import filelock
import jax
import ml_collections

from cifar_jax import config as configuration
from cifar_jax.checkpoint import Checkpointer
from cifar_jax.data.sources import Dataset, load
from cifar_jax.data.splits import Split, duplicates_across, fingerprint, make_splits
from cifar_jax.errors import RunError, UserError
from cifar_jax.loop import PROFILE_FOLDER, History, Loop, Plan
from cifar_jax.models.registry import create_model
from cifar_jax.optim import OptimizerConfig, make_optimizer, make_schedule
from cifar_jax.parallel import check_batch_size, create_execution
from cifar_jax.recording.recorder import open_recorder
from cifar_jax.recording.run_record import (
    count_test_read,
    describe_environment,
    has_run_record,
    read_run_record,
    update_run_record,
)
from cifar_jax.signals import StopSignal
from cifar_jax.state import TrainState, count_parameters, create_state, from_arrays


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
      UserError: for a wrong configuration, missing data, a workdir in use or of another run.
      RunError: when the loss is not finite or a checkpoint cannot be written.
    """
    configuration.check(config)
    workdir = pathlib.Path(workdir).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / ".lock", timeout=0)
        precision = jax.default_matmul_precision(config.matmul_precision)
        with lock, StopSignal() as stop, precision:
            return _train(configuration.to_dict(config), workdir, stop=stop, profile=profile)
    except filelock.Timeout:
        raise UserError(
            f"{workdir} is in use by another run; wait for it or use another --workdir"
        ) from None
    except OSError as error:
        raise RunError(f"{error.filename or workdir}: {error.strerror or error}") from error


def _train(
    config: dict[str, Any], workdir: pathlib.Path, *, stop: StopSignal, profile: bool
) -> Result:
    data = load(config["data"]["source"], config["data"]["directory"])
    splits = make_splits(
        data, protocol=config["data"]["protocol"], seed=config["data"]["split_seed"]
    )
    plan = _make_plan(config, train_count=len(splits["train"]))
    schedule, state = _create(config, plan)
    checkpointer = Checkpointer(workdir, keep=config["keep_checkpoints"])
    extra = {"config": config, "splits_sha256": fingerprint(splits), "data_sha256": data.sha256}
    state, history = _restore(state, checkpointer, extra, workdir=workdir)
    _record_start(config, workdir, data=data, splits=splits, state=state)
    with open_recorder(
        workdir,
        title=_title(config, data),
        start_step=int(state.step),
        start_rows=history.rows,
        total_steps=plan.total,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.batch_size,
    ) as recorder:
        recorder.message(_describe_start(splits, plan, start_step=int(state.step)))
        loop = Loop(
            state=state,
            history=history,
            plan=plan,
            schedule=schedule,
            splits=splits,
            execution=create_execution(config["execution"]),
            checkpointer=checkpointer,
            checkpoint_extra=extra,
            recorder=recorder,
            stop=stop,
        )
        loop.fit(workdir / PROFILE_FOLDER if profile else None)
        record = _test(loop, workdir)
        checkpointer.close()
        return Result(loop.step, stop.received, record, recorder.rows)


def _make_plan(config: dict[str, Any], *, train_count: int) -> Plan:
    batch_size = config["batch_size"]
    check_batch_size(batch_size, key="batch_size")
    check_batch_size(config["eval_batch_size"], key="eval_batch_size")
    steps_per_epoch = train_count // batch_size
    if not steps_per_epoch:
        raise UserError(
            f"config.batch_size is {batch_size}; expected at most the {train_count} training images"
        )
    steps = configuration.durations_in_steps(config, steps_per_epoch)
    return Plan(
        seed=config["seed"],
        batch_size=batch_size,
        eval_batch_size=config["eval_batch_size"],
        steps_per_call=config["steps_per_call"],
        steps_per_epoch=steps_per_epoch,
        total=steps["train_for"],
        warmup=steps["warmup"],
        evaluate_every=steps["evaluate_every"],
        log_every=steps["log_every"],
        checkpoint_every=steps["checkpoint_every"],
    )


def _create(config: dict[str, Any], plan: Plan) -> tuple[Callable[[int], float], TrainState]:
    schedule = make_schedule(
        config["optimizer"]["learning_rate"],
        name=config["schedule"]["name"],
        warmup=plan.warmup,
        steps=plan.total,
        final_fraction=config["schedule"]["final_fraction"],
    )
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), schedule)
    model = create_model(config["model"], seed=config["seed"])
    return schedule, create_state(model, optimizer, seed=config["seed"])


def _restore(
    state: TrainState, checkpointer: Checkpointer, extra: dict[str, Any], *, workdir: pathlib.Path
) -> tuple[TrainState, History]:
    """Starts from the workdir's latest whole checkpoint, or from scratch."""
    restored = checkpointer.restore_latest(warn=_warn)
    if restored is None:
        return state, History()
    step, arrays, saved = restored
    configuration.check_same_run(extra["config"], saved["config"], workdir=str(workdir))
    for key, what in (("data_sha256", "images"), ("splits_sha256", "splits")):
        if saved[key] != extra[key]:
            raise UserError(
                f"{workdir} holds a run on other {what}; use the data that it was started "
                "with (config.data.source, config.data.directory) or another --workdir"
            )
    origin = f"checkpoint {step} of {workdir}"
    return from_arrays(state, arrays, origin=origin), History.from_json(saved["history"])


def _record_start(
    config: dict[str, Any],
    workdir: pathlib.Path,
    *,
    data: Dataset,
    splits: dict[str, Split],
    state: TrainState,
) -> None:
    if jax.process_index() != 0:
        return
    starts = read_run_record(workdir).get("starts", []) if has_run_record(workdir) else []
    update_run_record(
        workdir,
        config=config,
        parameters=count_parameters(state),
        data={"source": data.source, "is_sample": data.is_sample, "sha256": data.sha256},
        splits={
            "protocol": config["data"]["protocol"],
            "sizes": {name: len(split) for name, split in splits.items()},
            "sha256": fingerprint(splits),
            "duplicates": duplicates_across(splits),
        },
        starts=[*starts, {"step": int(state.step), **describe_environment()}],
    )


def _title(config: dict[str, Any], data: Dataset) -> str:
    sample = f"; SAMPLE of {len(data.train_images):,} images" if data.is_sample else ""
    return f"{config['model']['name']} on CIFAR-10, {config['data']['protocol']} splits{sample}"


def _describe_start(splits: dict[str, Split], plan: Plan, *, start_step: int) -> str:
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    left_out = len(splits["train"]) - plan.steps_per_epoch * plan.batch_size
    return (
        f"images: {sizes}; {plan.steps_per_epoch} steps an epoch, {left_out} images left out of "
        f"each; {jax.device_count()} {jax.devices()[0].device_kind} device(s); "
        f"starting after step {start_step} of {plan.total}"
    )


def _test(loop: Loop, workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the test split, if the run is at its end and has not read it there before."""
    record = read_run_record(workdir)
    if loop.stop.received is not None or record.get("result", {}).get("step") == loop.step:
        return record
    count_test_read(workdir, {"step": loop.step, "checkpoint": "latest"})  # also if cut short
    totals = loop.evaluate(loop.splits["test"])
    if totals is None:
        return record
    means = totals.means("test_")
    result = {
        **means,
        "test_count": totals.count,
        "train_seconds": loop.history.train_seconds,
        "step": loop.step,
    }
    return update_run_record(workdir, result=result)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
