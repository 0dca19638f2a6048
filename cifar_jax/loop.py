"""The training loop: calls of compiled steps, and at their edges rows, evaluations and saves."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from cifar_jax.checkpoint import Checkpointer
from cifar_jax.data import pipeline
from cifar_jax.data.splits import Split
from cifar_jax.errors import RunError
from cifar_jax.memory import release_freed_memory
from cifar_jax.metrics import Metrics, Totals
from cifar_jax.parallel import JitExecution, PmapExecution
from cifar_jax.phases import Phase
from cifar_jax.plan import Plan, is_due
from cifar_jax.recording.recorder import Recorder, SilentRecorder
from cifar_jax.signals import StopSignal
from cifar_jax.state import TrainState, to_arrays

PROFILE_FOLDER = "profile"
PROFILED_CALLS = slice(1, 4)  # the first one compiles
RATES_AT_ONCE = 4096


@dataclasses.dataclass
class History:
    """What a resumed run must remember beside its arrays."""

    since_evaluation: Totals = dataclasses.field(default_factory=Totals)
    since_log: Totals = dataclasses.field(default_factory=Totals)
    evaluated_step: int = 0
    best_accuracy: float = -1.0
    train_seconds: float = 0.0  # without compilation, evaluation and saves
    rows: int = 0  # written to the log: a resumed run cuts it back to these

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "History":
        """Reads what `dataclasses.asdict` gave."""
        totals = {key: Totals(**saved[key]) for key in ("since_evaluation", "since_log")}
        return cls(**{**saved, **totals})


@dataclasses.dataclass
class PendingCall:
    """A dispatched call whose metrics have not been fetched yet."""

    start: int
    steps: int
    metrics: Metrics  # stacked [steps], on the device
    dispatched: float  # seconds, time.perf_counter


class Loop:
    """Trains a state; `fit` returns at the end of the run or after a stop signal."""

    def __init__(
        self,
        *,
        state: TrainState,
        history: History,
        plan: Plan,
        schedule: optax.Schedule,
        structures: Mapping[Phase, nnx.GraphDef],
        splits: dict[str, Split],
        execution: JitExecution | PmapExecution,
        on_device: bool,
        checkpointer: Checkpointer,
        checkpoint_extra: dict[str, Any],
        recorder: Recorder | SilentRecorder,
        stop: StopSignal,
    ):
        self.step = int(state.step)
        self.structures = structures
        # Of the update that led here: its evaluation may still be due.
        self.phase = plan.phase(max(self.step - 1, 0))
        self.state = execution.place(self._in_phase(state))
        self.history = history
        self.plan = plan
        # Many at once: to compute one waits for the step in flight, and then none is.
        self._learning_rates = functools.lru_cache(maxsize=1)(
            lambda first: np.asarray(jax.vmap(schedule)(first + jnp.arange(RATES_AT_ONCE)))
        )
        self.splits = splits
        self.execution = execution
        self.on_device = on_device
        if on_device:
            train = splits["train"]
            execution.keep({"image": train.images, "label": train.labels})
        self.checkpointer = checkpointer
        self.checkpoint_extra = checkpoint_extra
        self.recorder = recorder
        self.stop = stop
        self.saved_step = self.step
        self._pending: PendingCall | None = None
        self._compiled_lengths: set[int] = set()
        self._settled = time.perf_counter()

    def fit(self, profile_folder: pathlib.Path | None = None) -> None:
        """Runs what is left of the plan.

        Args:
          profile_folder: takes a trace of a few calls, where given.

        Raises:
          RunError: when a loss is not finite or a checkpoint cannot be written.
        """
        self.finish_edge()  # a signal may have come between the last call and its evaluation
        if profile_folder and len([*itertools.islice(self.plan.calls(self.step), 2)]) < 2:
            self.recorder.message(
                "--profile: no trace, fewer than 2 calls are left and the first one compiles; "
                "lower config.steps_per_call or use another --workdir"
            )
        if self.step < self.plan.total:
            self.train(profile_folder)
        if self.saved_step != self.step:
            self.save(accuracy=None)
        self.checkpointer.wait()

    def train(self, profile_folder: pathlib.Path | None) -> None:
        """Makes the calls that are left, as far as no signal comes."""
        plan = self.plan
        split = self.splits["train"]
        rows = pipeline.train_rows(
            split,
            plan.calls(self.step),
            batch_size=plan.batch_size,
            seed=plan.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        batches = rows if self.on_device else pipeline.train_batches(split, rows)
        calls = plan.calls(self.step)
        with contextlib.ExitStack() as trace:
            for number, ((_, steps), batch) in enumerate(zip(calls, batches, strict=True)):
                if self.stop.received is not None:
                    break
                self.enter_phase()
                if profile_folder and number == PROFILED_CALLS.start:
                    trace.enter_context(jax.profiler.trace(str(profile_folder)))
                self.dispatch(batch, steps)
                if number == PROFILED_CALLS.stop - 1:
                    self.settle()
                    trace.close()
                self.finish_edge()
        self.settle()

    def enter_phase(self) -> None:
        """Changes what is trained, and on which size, where a new phase starts."""
        phase = self.plan.phase(self.step)
        if phase != self.phase:
            self.settle()
            self.phase = phase
            self.state = self._in_phase(self.state)
            self._compiled_lengths.clear()
            release_freed_memory()
            self.recorder.message(phase.describe())

    def _in_phase(self, state: TrainState) -> TrainState:
        recipe = state.recipe.in_phase(self.phase)
        return state.replace(graphdef=self.structures[self.phase], recipe=recipe)

    def dispatch(self, batch: dict[str, np.ndarray], steps: int) -> None:
        """Starts a call, then fetches the metrics of the one before it."""
        if steps not in self._compiled_lengths:
            self.settle()
            self.execution.compile_train(self.state, batch)  # apart, so that the call is timed
            self._compiled_lengths.add(steps)
        dispatched = time.perf_counter()
        self.state, metrics = self.execution.train(self.state, batch)
        call = PendingCall(self.step, steps, metrics, dispatched)
        self.step += steps
        self.settle()
        self._pending = call

    def settle(self) -> None:
        """Fetches the metrics of the pending call, adds them up, and writes a row if one is due."""
        call, self._pending = self._pending, None
        if call is None:
            return
        metrics = jax.device_get(call.metrics)
        now = time.perf_counter()
        seconds = now - max(call.dispatched, self._settled)
        self._settled = now
        self.check_finite(call.start, metrics.loss)
        self.history.train_seconds += seconds
        totals = Totals()
        for sums in (totals, self.history.since_evaluation, self.history.since_log):
            sums.add(metrics)
        step = call.start + call.steps
        self.recorder.update(step, **totals.means(), seconds=seconds, steps=call.steps)
        if is_due(step, self.plan.log_every, self.plan.total):
            self.write_row(step, "train", self.history.since_log.means())
            self.history.since_log = Totals()

    def check_finite(self, start: int, losses: np.ndarray) -> None:
        """Stops the run at the first loss that is NaN or Inf.

        Raises:
          RunError: with step, learning rate and last good checkpoint.
        """
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            step = start + int(bad[0])
            self.checkpointer.wait()
            raise RunError(
                f"the training loss is {losses[bad[0]]} at step {step} "
                f"(learning rate {self.learning_rate(step):g}); last good checkpoint: "
                f"{self.checkpointer.describe_latest()}. With another --workdir, lower "
                "config.optimizer.learning_rate or set config.optimizer.clip_norm"
            )

    def finish_edge(self) -> None:
        """Does what is due after the last call: an evaluation, a save."""
        plan, step, accuracy = self.plan, self.step, None
        evaluation_due = is_due(step, plan.evaluate_every, plan.total)
        evaluation_due = evaluation_due and step > self.history.evaluated_step
        checkpoint_due = is_due(step, plan.checkpoint_every, plan.total) and step > self.saved_step
        if evaluation_due or checkpoint_due:
            self.settle()
        if evaluation_due and self.stop.received is None:
            accuracy = self.evaluate_and_record()
            self._settled = time.perf_counter()
        is_best = accuracy is not None and accuracy == self.history.best_accuracy
        # A signal may have saved it before its evaluation, or may come while the row is written.
        is_outdated = evaluation_due and self.saved_step == step == self.history.evaluated_step
        if is_best or is_outdated or (checkpoint_due and self.stop.received is None):
            self.save(accuracy=accuracy)
            self._settled = time.perf_counter()

    def evaluate_and_record(self) -> float | None:
        """Evaluates on validation, writes the row, and gives the accuracy if it may be the best."""
        totals = self.evaluate(self.splits["validation"])
        if totals is None:
            return None
        history = self.history
        validation = totals.means("validation_")
        train = history.since_evaluation.means("train_")
        self.write_row(self.step, "evaluation", train | validation)
        history.since_evaluation = Totals()
        history.evaluated_step = self.step
        if self.phase.upsampling != self.plan.phases[-1].upsampling:
            return None  # no candidate: whoever reads a checkpoint uses the last size
        history.best_accuracy = max(history.best_accuracy, validation["validation_accuracy"])
        return validation["validation_accuracy"]

    def evaluate(self, split: Split) -> Totals | None:
        """Returns the totals over exactly the images of a split; None if a signal cut it short."""
        totals, pending = Totals(), None
        batches = pipeline.eval_batches(
            split,
            batch_size=self.plan.eval_batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        for batch in self.recorder.counted(batches, name=split.name, total=len(split)):
            if self.stop.received is not None:
                return None
            metrics = self.execution.evaluate(self.state, batch)
            if pending is not None:
                totals.add(jax.device_get(pending))
            pending = metrics
        totals.add(jax.device_get(pending))
        assert totals.count == len(split), (totals.count, len(split))
        return totals

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of the update after `step` updates."""
        place = step % RATES_AT_ONCE
        return float(self._learning_rates(step - place)[place])

    def write_row(self, step: int, event: str, metrics: dict[str, float]) -> None:
        """Adds a row to the log."""
        row = {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            "event": event,
            **metrics,
            "learning_rate": self.learning_rate(step - 1),  # of the last update
            "train_seconds": self.history.train_seconds,
        }
        self.recorder.write(row)
        self.history.rows += 1

    def save(self, *, accuracy: float | None) -> None:
        """Starts to save the present state; `accuracy` is its own on validation, if known."""
        arrays = to_arrays(self.execution.to_host_tree(self.state))
        extra = {**self.checkpoint_extra, "history": dataclasses.asdict(self.history)}
        self.checkpointer.save(self.step, arrays, extra, accuracy=accuracy)
        self.saved_step = self.step
