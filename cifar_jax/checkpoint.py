"""Checkpoints by orbax: asynchronous, atomic, the latest few and the best on validation.

A checkpoint is `<workdir>/checkpoints/<step>/`. Its "state" is every array by name, as host arrays
without any device axis, so that one format serves every execution and number of devices. Its
"extra" is JSON: the configuration, the running totals, and a digest of the arrays.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from cifar_jax.errors import RunError, UserError, is_failing_read, one_line, tell

FOLDER = "checkpoints"
CORRUPT_FOLDER = "corrupt_checkpoints"
HEAD_FOLDER = "head"  # in a workdir of cifar_jax.features: checkpoints of what it trains alone
REPLACED = ".replaced_checkpoint_"  # with the step, while that is saved again
METRIC = "validation_accuracy"
Arrays = dict[str, np.ndarray]


class Damaged(UserError):
    """A file that is not what was saved; `what` is the message without what to do."""

    def __init__(self, what: str):
        self.what = what
        super().__init__(
            f"{what}; restore it from a backup, name another checkpoint of the run (--checkpoint), "
            "or train on with the run's own command, which goes back to the one before"
        )


def digest(arrays: Mapping[str, np.ndarray], extra: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of all names, types, shapes and values, and of the JSON beside them."""
    sha256 = hashlib.sha256(json.dumps(extra, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha256.update(f"{name} {array.dtype} {array.shape}\n".encode())
        sha256.update(array.reshape(-1).view(np.uint8))
    return sha256.hexdigest()


class Checkpointer:
    """The checkpoints of one workdir, for the run that writes them."""

    def __init__(self, workdir: pathlib.Path, *, keep: int):
        self.workdir = workdir
        for aside in workdir.glob(f"{REPLACED}*"):  # of a process that was killed meanwhile
            place = workdir / FOLDER / aside.name.removeprefix(REPLACED)
            shutil.rmtree(aside) if place.exists() else aside.rename(place)
        self._move_damaged_metrics_aside()
        latest = policies.LatestN(keep)
        best = policies.BestN(get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_accuracy,  # without it, orbax does not write the metrics down
            preservation_policy=policies.AnyPreservationPolicy([latest, best]),
            cleanup_tmp_directories=True,
        )
        self.manager = _guard(
            workdir, lambda: ocp.CheckpointManager(workdir / FOLDER, options=options)
        )

    def save(
        self, step: int, arrays: Arrays, extra: Mapping[str, Any], *, accuracy: float | None
    ) -> None:
        """Starts to save, after the previous save has ended.

        Args:
          step: finished updates.
          arrays: host arrays that nobody changes any more.
          extra: JSON values.
          accuracy: on validation, where it was measured at this step; the best one is kept.

        Raises:
          RunError: if this or the previous save fails, or an array holds NaN or Inf.
        """
        for name, array in arrays.items():
            if not np.all(np.isfinite(array)):
                raise RunError(
                    f"{name} holds NaN or Inf after step {step}; not saved. "
                    f"The last good checkpoint is {self.describe_latest()}"
                )
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            extra=ocp.args.JsonSave({**extra, "sha256": digest(arrays, extra)}),
        )
        metrics = None if accuracy is None else {METRIC: accuracy}

        def save():
            # A signal may have saved this step before its evaluation.
            again = step in self.manager.all_steps()
            with self._moved_aside(step) if again else contextlib.nullcontext():
                self.manager.save(step, args=args, metrics=metrics)

        _guard(self.workdir, save)

    @contextlib.contextmanager
    def _moved_aside(self, step: int) -> Iterator[None]:
        """Waits for what the block saves in a checkpoint's place; if that fails, puts it back."""
        place, aside = self.workdir / FOLDER / str(step), self.workdir / f"{REPLACED}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
        self.manager.reload()
        try:
            yield
            self.manager.wait_until_finished()
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)
            raise
        shutil.rmtree(aside)

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
          RunError: if it failed.
        """
        _guard(self.workdir, self.manager.wait_until_finished)

    def describe_latest(self) -> str:
        """Returns "step 1125 in <folder>", or "none", for messages."""
        step = self.manager.latest_step()
        return "none" if step is None else f"step {step} in {self.workdir / FOLDER}"

    def restore_latest(self, warn: Callable[[str], None]) -> tuple[int, Arrays, dict] | None:
        """Reads the latest checkpoint that is whole.

        Args:
          warn: is told of every checkpoint that is passed over.

        Returns:
          Step, arrays and extra, or None where there is no checkpoint.

        Raises:
          UserError: where checkpoints exist and none is whole.
          RunError: where the system does not let one be read, which may be whole.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for step in steps:
            try:
                arrays, extra = read_checkpoint(self.workdir, step)
            except Damaged as error:
                warn(f"{error.what}; going back to the checkpoint before it")
                continue
            return step, arrays, extra
        if steps:
            raise UserError(
                f"{self.workdir / FOLDER}: none of the checkpoints {steps} can be read; "
                "restore one from a backup or use another --workdir"
            )
        return None

    def move_aside_after(self, step: int) -> None:
        """Moves the checkpoints after `step`, which are damaged, out of the way of new ones."""
        damaged = [later for later in self.manager.all_steps() if later > step]
        target = self.workdir / CORRUPT_FOLDER
        for later in damaged:
            target.mkdir(exist_ok=True)
            shutil.rmtree(target / str(later), ignore_errors=True)
            (self.workdir / FOLDER / str(later)).rename(target / str(later))
        if damaged:
            self.manager.reload()

    def _move_damaged_metrics_aside(self) -> None:
        """Which costs a checkpoint its claim to be the best; orbax would read none beside them."""
        for step in _steps(self.workdir):
            try:
                read_accuracy(self.workdir, step)
            except Damaged as error:
                target = self.workdir / CORRUPT_FOLDER / f"{step}_metrics"
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                (self.workdir / FOLDER / str(step) / "metrics").rename(target)
                tell(f"warning: {error.what}; moved to {target}")

    def close(self) -> None:
        """Releases the manager's threads."""
        self.manager.close()


def read_checkpoint(workdir: pathlib.Path, step: int) -> tuple[Arrays, dict[str, Any]]:
    """Reads and verifies one checkpoint.

    Raises:
      Damaged: if anything is missing, unreadable or not what was saved.
      RunError: if the system does not let it be read, as when too many files are open.
    """
    folder = workdir / FOLDER / str(step)
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            arrays = checkpointer.restore(folder / "state")
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            extra = checkpointer.restore(folder / "extra")
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        intact = extra.pop("sha256") == digest(arrays, extra)
    # A damaged file surfaces as whatever the layer below it raises.
    except Exception as error:
        raise _failed_read(folder, error) from error
    if not intact:
        raise Damaged(f"{folder} is damaged (its content does not match its SHA-256)")
    return arrays, extra


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Tells whether a run has left one; also one that a killed process had moved aside."""
    return bool(_steps(workdir)) or any(workdir.glob(f"{REPLACED}*"))


def find_steps(workdir: pathlib.Path, which: str) -> list[int]:
    """Returns the steps of "all" checkpoints in order, or that of `find_step` alone.

    Raises:
      UserError: where there is none.
    """
    if which != "all":
        return [find_step(workdir, which)]
    find_step(workdir, "latest")  # or there is none
    return sorted(_steps(workdir))


def find_step(workdir: pathlib.Path, which: str) -> int:
    """Returns the step of the "latest" checkpoint, or of the "best" on validation.

    Raises:
      UserError: where there is none.
      Damaged, RunError: as `read_accuracy`.
    """
    folder, steps = workdir / FOLDER, _steps(workdir)
    if which == "best":
        accuracies = {step: read_accuracy(workdir, step) for step in steps}
        ranks = {step: (value, step) for step, value in accuracies.items() if value is not None}
    else:
        ranks = {step: step for step in steps}
    if not ranks:
        raise UserError(
            f"{folder} holds no {which} checkpoint; train until one has been saved, "
            "or name the folder of another run"
        )
    return max(ranks, key=ranks.get)


def _steps(workdir: pathlib.Path) -> list[int]:
    folder = workdir / FOLDER
    return ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def read_accuracy(workdir: pathlib.Path, step: int) -> float | None:
    """Returns a checkpoint's on validation, 0..1; None where it was saved without.

    Raises:
      Damaged: if it is not what was saved.
      RunError: if the system does not let it be read.
    """
    file = workdir / FOLDER / str(step) / "metrics" / "metrics"
    if not file.parent.exists():
        return None
    try:
        return float(json.loads(file.read_text())[METRIC])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _failed_read(file, error) from error


def _failed_read(path: pathlib.Path, error: Exception) -> UserError:
    if is_failing_read(error):
        return RunError(
            f"{path} cannot be read ({one_line(error)}); it was left as it is: mend that, then run "
            "the same command again"
        )
    return Damaged(f"{path} is damaged ({one_line(error)})")


def _accuracy(metrics: Mapping[str, float]) -> float:
    return metrics[METRIC]


def _guard(workdir: pathlib.Path, action: Callable[[], Any]) -> Any:
    """Runs a write and turns its failure, a full disk above all, into one line."""
    try:
        return action()
    # Failures of the background write come wrapped in whatever orbax and tensorstore raise.
    except Exception as error:
        folder = workdir / FOLDER
        earlier = "; earlier checkpoints are untouched" if has_checkpoints(workdir) else ""
        raise RunError(
            f"{folder}: the checkpoint could not be written ({one_line(error)}){earlier}"
        ) from error
