"""The metrics of a run: `metrics.jsonl` is the record, `metrics.csv` and TensorBoard its views.

A row is one line with a JSON object: `step` (finished updates), `epoch` (may be a fraction),
`event` ("train" | "evaluation"), then numbers under the names that the run gives them
(`train_loss`, `validation_accuracy`, `learning_rate`, ...).
"""

import csv
import io
import json
import os
import time
from numbers import Real
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from cifar_jax.errors import UserError
from cifar_jax.recording.files import write_atomically, writing

JSONL_NAME = "metrics.jsonl"
CSV_NAME = "metrics.csv"
TENSORBOARD_NAME = "tensorboard"


def read_rows(workdir: str | os.PathLike) -> list[dict]:
    """Reads the rows of a run, oldest first.

    A last line that was torn while it was written (the process was killed) does not count.

    Args:
        workdir: the run's folder.

    Returns:
        The rows as they were written; none where the run has logged nothing.

    Raises:
        UserError: a line is not a row of metrics.
    """
    path = Path(workdir) / JSONL_NAME
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):  # what follows the last line break is empty or torn
            raise UserError(
                f"{path}: line {number} is not a row of metrics ({line[:40]!r}); "
                "mend or delete that line"
            )
    return rows


def evaluation_rows(rows: list[dict]) -> list[dict]:
    """Those of `rows` that hold an evaluation."""
    return [row for row in rows if row["event"] == "evaluation"]


class MetricsLog:
    """Appends rows to a run's record and keeps its views up to date. For one process (host 0) only.

    Nothing is buffered: when `write` returns, a kill loses no row.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int, resume_rows: int):
        """Opens the log and takes back what was logged after the step that the run restarts from.

        Args:
            workdir: the run's folder, created where it is missing.
            resume_step: finished updates of the restored state, 0 for a new run.
            resume_rows: rows that the restored state knew of; later ones will be written again.

        Raises:
            UserError: a line of the log is malformed.
            RunError: the log cannot be written.
        """
        self._workdir = Path(workdir)
        tensorboard = self._workdir / TENSORBOARD_NAME
        with writing(tensorboard):
            tensorboard.mkdir(parents=True, exist_ok=True)
        known = read_rows(workdir)[:resume_rows]
        # Where somebody deleted lines, the number alone would keep rows that come again.
        self.rows = [row for row in known if row["step"] <= resume_step]
        write_atomically(self._workdir / JSONL_NAME, b"".join(map(_serialize, self.rows)))
        self._write_csv()
        with writing(tensorboard):
            # tensorboardX's SummaryWriter writes from a thread which a full disk ends, and then
            # blocks whoever feeds it; its EventsWriter is the same without the thread. The suffix
            # keeps a run restarted within the second from overwriting its first event file.
            self._events = EventsWriter(
                str(tensorboard / "events"), filename_suffix=f".{time.time_ns()}"
            )
            # TensorBoard forgets the earlier files' events from this step on.
            self._write_event(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._events.flush()

    def write(self, row: dict) -> None:
        """Appends one row.

        Args:
            row: `step`, `epoch`, `event` and numbers (Python's, NumPy's or one-element arrays).

        Raises:
            RunError: a file cannot be written (the disk is full).
        """
        row = {name: _plain(value) for name, value in row.items()}
        path = self._workdir / JSONL_NAME
        with writing(path), open(path, "ab") as file:
            file.write(_serialize(row))
        self.rows.append(row)
        if row["event"] == "evaluation":
            self._write_csv()
        with writing(self._workdir / TENSORBOARD_NAME):
            for name, value in row.items():
                if name not in ("step", "event"):
                    self._write_event(row["step"], summary=scalar(_tag(name), value))
            self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        with writing(self._workdir / TENSORBOARD_NAME):
            self._events.close()

    def _write_event(self, step: int, **content) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def _write_csv(self) -> None:
        rows = evaluation_rows(self.rows)
        columns = dict.fromkeys(name for row in rows for name in row if name != "event")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self._workdir / CSV_NAME, text.getvalue().encode())


def _plain(value) -> int | float | str:
    """The plain Python value of a NumPy or JAX scalar; float32 widens without loss."""
    return value.item() if hasattr(value, "item") else value


def _serialize(row: dict) -> bytes:
    # Python writes the shortest digits that read back as the same float.
    return json.dumps(row).encode() + b"\n"


def _parse(line: bytes) -> dict | None:
    """The row that a line holds, or None."""
    try:
        row = json.loads(line.decode())
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    numbers = [value for name, value in row.items() if name != "event"]
    if row.get("event") not in ("train", "evaluation") or "epoch" not in row:
        return None
    return row if all(isinstance(number, Real) for number in numbers) else None


def _tag(name: str) -> str:
    """TensorBoard's name of a metric: those of one split share a section."""
    split, _, metric = name.partition("_")
    return f"{split}/{metric}" if split in ("train", "validation", "test") else name
