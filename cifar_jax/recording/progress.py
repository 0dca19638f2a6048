"""How far training is: a bar on a terminal, a plain line now and then in a file or pipe."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

import numpy as np
from tqdm import tqdm

from cifar_jax.errors import LastingStream

SECONDS_BETWEEN_LINES = 30.0
SECONDS_REMEMBERED = 60.0  # the speed shown is that of about so long
Batches = Iterator[Mapping[str, np.ndarray]]


class Counter:
    """Shows how many images are done, how fast, and the time left, where there are no steps.

    In a file or pipe what is done before the first line is due leaves none.
    """

    def __init__(
        self,
        label: str,
        *,
        total: int,
        start: int,
        nested: bool = False,
        stream: TextIO | None = None,
    ):
        """Starts at `start`.

        Args:
            label: what is done.
            total: all images.
            start: those that were done before.
            nested: below the bar of the training, where it takes more than a second, and gone then.
            stream: where to write; standard error where not given.
        """
        self._label, self._total, self._done = label, total, start
        self._stream = LastingStream(stream or sys.stderr)
        self._printed_time, self._has_printed = time.monotonic(), False
        self._first: tuple[int, float] | None = None  # the first update comes after a compilation
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                desc=label,
                total=total,
                initial=start,
                unit=" images",
                leave=not nested,
                delay=1.0 if nested else 0.0,
                file=self._stream,
                dynamic_ncols=True,
            )

    def update(self, count: int) -> None:
        """Reports `count` more images."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        self._first = self._first or (self._done, now)
        waited = now - self._printed_time >= SECONDS_BETWEEN_LINES
        if waited or (self._has_printed and self._done == self._total):
            self._printed_time, self._has_printed = now, True
            line = f"{self._label}: {self._done:,}/{self._total:,} images{self._speed(now)}"
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Ends the bar's line."""
        if self._bar is not None:
            self._bar.close()

    def _speed(self, now: float) -> str:
        done, since = self._first
        if done == self._done:
            return ""
        speed = (self._done - done) / (now - since)
        return (
            f", {speed:.1f} img/s, ETA {tqdm.format_interval((self._total - self._done) / speed)}"
        )


def counted(batches: Batches, *, name: str, total: int, nested: bool = False) -> Batches:
    """Passes on the masked batches of an evaluation, and shows how far it is if it takes long."""
    counter = Counter(f"evaluation on the {name} split", total=total, start=0, nested=nested)
    with contextlib.closing(counter):
        for batch in batches:
            yield batch
            counter.update(int(batch["mask"].sum()))


class Progress:
    """Shows epoch, step, speed, loss, accuracy and the time left. For one process (host 0) only."""

    def __init__(
        self,
        *,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        start_step: int,
        costs: Sequence[tuple[int, float]] = ((0, 1.0),),
        stream: TextIO | None = None,
    ):
        """Starts at `start_step`.

        Args:
            total_steps: steps of the whole run.
            steps_per_epoch: steps of one epoch.
            batch_size: images of one step, over all devices.
            start_step: finished steps (a resumed run's are not 0).
            costs: (first step, cost of each from there on), in order, in any unit: larger images
                take longer.
            stream: where to write; standard error where not given.
        """
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._step = start_step
        self._costs = costs
        # Each call counts the less, the longer ago it was.
        self._recent_steps = self._recent_cost = self._recent_seconds = 0.0
        self._printed_time = time.monotonic()
        self._stream = LastingStream(stream or sys.stderr)
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                miniters=1,
                bar_format=self._line("|{bar}|"),
            )

    def update(
        self, step: int, *, loss: float, accuracy: float, seconds: float, steps: int
    ) -> None:
        """Reports one finished call of the training step.

        Args:
            step: finished steps, those of this call included.
            loss: mean training loss of the call.
            accuracy: training accuracy of the call, 0..1.
            seconds: what the call took, without compilation.
            steps: steps of the call.
        """
        kept = math.exp(-seconds / SECONDS_REMEMBERED)
        self._recent_steps = kept * self._recent_steps + steps
        self._recent_cost = kept * self._recent_cost + self._cost(step - steps, step)
        self._recent_seconds = kept * self._recent_seconds + seconds
        before, self._step = self._step, step
        status = f"{self._speed()} loss {loss:.4f} acc {accuracy:.4f}"
        if self._bar is not None:
            self._bar.bar_format = self._line("|{bar}|") + status
            self._bar.update(step - before)
            return
        epoch_ended = step // self._steps_per_epoch > before // self._steps_per_epoch
        waited = time.monotonic() - self._printed_time >= SECONDS_BETWEEN_LINES
        if epoch_ended or waited or step == self._total_steps:
            self._printed_time = time.monotonic()
            self.message(self._line("step") + status)

    def message(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, middle: str) -> str:
        """The epoch that the last finished step belongs to, counted from 1, and that step."""
        epoch = max(1, -(-self._step // self._steps_per_epoch))
        epochs = -(-self._total_steps // self._steps_per_epoch)
        return f"epoch {epoch}/{epochs} {middle} {self._step}/{self._total_steps}"

    def _speed(self) -> str:
        """Time left and speed.

        They come first and are short, so that a terminal of 80 columns has room for everything.
        """
        seconds = self._recent_seconds
        left = self._cost(self._step, self._total_steps) * seconds / self._recent_cost
        speed = tqdm.format_sizeof(self._recent_steps / seconds * self._batch_size)
        return f" ETA {tqdm.format_interval(left)} {speed} img/s"

    def _cost(self, start: int, end: int) -> float:
        """Of the steps from `start` to `end`."""
        edges = [first for first, _ in self._costs[1:]] + [math.inf]
        return sum(
            cost * max(0, min(end, edge) - max(start, first))
            for (first, cost), edge in zip(self._costs, edges, strict=True)
        )
