"""What a running loop tells: rows, the figure, progress. Silent on all hosts but the first."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from cifar_jax.recording.figures import draw_curves
from cifar_jax.recording.metrics_log import MetricsLog
from cifar_jax.recording.progress import Batches, Progress, counted

CURVES = "curves.png"


class Recorder:
    """The log, the figure and the progress display of one start of a run."""

    def __init__(self, workdir: pathlib.Path, *, title: str, log: MetricsLog, progress: Progress):
        self._workdir = workdir
        self._title = title
        self._log = log
        self.update = progress.update
        self.message = progress.message

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run so far."""
        return self._log.rows

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row; an evaluation's is also shown and redraws the figure."""
        self._log.write(row)
        if row["event"] == "evaluation":
            self.message(
                f"epoch {row['epoch']:g}: "
                f"train loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.4f}; "
                f"validation loss {row['validation_loss']:.4f}, "
                f"accuracy {row['validation_accuracy']:.4f}"
            )
            draw_curves(self.rows, self._workdir / CURVES, self._title)

    def counted(self, batches: Batches, *, name: str, total: int) -> Batches:
        """Passes on the batches of an evaluation, and shows how far it is if it takes long."""
        return counted(batches, name=name, total=total, nested=True)


class SilentRecorder:
    """The recorder of the other hosts."""

    rows: list[dict[str, Any]] = []

    def counted(self, batches: Batches, **_: Any) -> Batches:
        """Shows nothing."""
        return batches

    def update(self, *_: Any, **__: Any) -> None:
        """Shows nothing."""

    message = write = update


@contextlib.contextmanager
def open_recorder(
    workdir: pathlib.Path, *, title: str, start_step: int, start_rows: int, **progress: Any
) -> Iterator[Recorder | SilentRecorder]:
    """Opens the log, cut back to what the restored step knew, and the progress; closes both.

    Args:
      workdir: of the run.
      title: of the figure.
      start_step: finished updates.
      start_rows: rows of the log at that step.
      **progress: what else `Progress` is to know.
    """
    if jax.process_index() != 0:
        yield SilentRecorder()
        return
    log = MetricsLog(workdir, resume_step=start_step, resume_rows=start_rows)
    bar = Progress(start_step=start_step, **progress)
    try:
        yield Recorder(workdir, title=title, log=log, progress=bar)
    finally:
        bar.close()
        log.close()
