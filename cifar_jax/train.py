"""Training from a configuration to a result: build, restore, loop, test."""

import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections

from cifar_jax import config as configuration
from cifar_jax.checkpoint import Checkpointer, has_checkpoints
from cifar_jax.data.splits import duplicates_across, fingerprint
from cifar_jax.errors import UserError, tell
from cifar_jax.initial import find_weights, start_state
from cifar_jax.lock import locked
from cifar_jax.loop import PROFILE_FOLDER, History, Loop
from cifar_jax.models.registry import create_model
from cifar_jax.parallel import check_devices, create_execution
from cifar_jax.recording.metrics_log import JSONL_NAME
from cifar_jax.recording.recorder import open_recorder
from cifar_jax.recording.run_record import (
    count_test_read,
    field,
    read_run_record,
    record_end,
    update_run_record,
)
from cifar_jax.setup import Setup, check_same_images, describe_start, set_up, title
from cifar_jax.signals import StopSignal
from cifar_jax.state import TrainState, count_parameters, from_arrays
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
    plain = configuration.to_dict(config)
    configuration.check_whole_model(plain)
    workdir = pathlib.Path(workdir).expanduser().absolute()
    check_devices()
    if not has_checkpoints(workdir):
        find_weights(plain["model"])  # a file that is missing is told before images are fetched
    with jax.default_matmul_precision(config.matmul_precision):
        setup = set_up(plain, lambda config: create_model(config, seed=plain["seed"]))
        if not has_checkpoints(workdir):
            loaded = setup.pretrained()  # a file that does not fit is told before all is written
            setup = dataclasses.replace(setup, pretrained=lambda: loaded)
        with locked(workdir, setting="--workdir"), StopSignal() as stop:
            return run(setup, workdir, stop=stop, profile=profile)


def run(setup: Setup, workdir: pathlib.Path, *, stop: StopSignal, profile: bool) -> Result:
    """Makes a run, or what is left of it, in a workdir that is locked for it."""
    plan = setup.plan
    record = check_workdir(
        workdir, setup.config, features=setup.features, checkpoints=setup.checkpoints
    )
    checkpointer = Checkpointer(workdir / setup.checkpoints, keep=setup.config["keep_checkpoints"])
    setup, state, history, weights = _restore(setup, checkpointer, workdir, record=record)
    start = int(state.step)
    _record_start(setup, workdir, record, step=start, weights=weights)
    with open_recorder(
        workdir,
        title=title(setup),
        start_step=start,
        start_rows=history.rows,
        total_steps=plan.total,
        steps_per_epoch=plan.steps_per_epoch,
        batch_size=plan.batch_size,
        costs=[(phase.start, phase.upsampling**2) for phase in plan.phases],
    ) as recorder:
        if missing := history.rows - len(recorder.rows):
            recorder.message(f"warning: {workdir / JSONL_NAME} lacks {missing} rows of this run")
            history.rows -= missing
        recorder.message(describe_start(setup, step=start))
        loop = Loop(
            state=state,
            history=history,
            plan=plan,
            schedule=setup.schedule,
            structures=setup.structures,
            splits=setup.inputs,
            execution=create_execution(setup.config["execution"]),
            on_device=setup.config["data"]["on_device"],
            checkpointer=checkpointer,
            checkpoint_extra=setup.identity(),
            recorder=recorder,
            stop=stop,
        )
        del state  # on the host, where the loop has its own on the devices
        loop.fit(workdir / PROFILE_FOLDER if profile else None)
        _test(setup, loop, workdir)
        checkpointer.close()
        record = record_end(workdir)
        evaluated = loop.history.evaluated_step == plan.total
        tested = field(record, "result.step") == plan.total or not setup.config["test"]
        # A signal that came when all was done has stopped nothing.
        stopped_by = None if evaluated and tested else stop.received
        return Result(loop.step, stopped_by, record, recorder.rows)


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
    configuration.check_same_run(setup.config, saved["config"], workdir=str(workdir))
    check_same_images(setup.data, setup.splits, saved, workdir=str(workdir))
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
        total_steps=setup.plan.total,
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
        starts=[*(record.get("starts") or []), {"step": step, **setup.environment}],
        # Of a shorter run, or of a checkpoint that is gone, it is not this run's.
        result=record.get("result")
        if field(record, "result.step") == step == setup.plan.total
        else None,
    )


def _test(setup: Setup, loop: Loop, workdir: pathlib.Path) -> None:
    """Reads the test split, where that is asked for and the run, at its end, has not done so."""
    done = field(read_run_record(workdir), "result.step") == loop.step
    if loop.stop.received is not None or done or not setup.config["test"]:
        return
    # Noted first: a reading that is cut short counts.
    before = count_test_read(workdir, {"step": loop.step, "checkpoint": "latest"})
    if before:
        loop.recorder.message(f"note: the test split has been read before, {before} time(s)")
    totals = loop.evaluate(loop.splits["test"])
    if totals is None:
        return
    result = {
        **totals.means("test_"),
        "test_count": totals.count,
        "train_seconds": loop.history.train_seconds,
        "step": loop.step,
    }
    update_run_record(workdir, result=result)
