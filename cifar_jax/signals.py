"""Ctrl-C, SIGTERM and SIGHUP end a run in order: after the current call, with a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignal:
    """Notes the first signal for the loop to poll; the second one ends the process at once.

    A context manager. Outside the main thread, where Python delivers no signals, it does nothing.

    Attributes:
      received: the first signal, once there is one.
      pass_on: is given every signal, the one that ends the process too.
    """

    def __init__(self):
        self.received: int | None = None
        self.pass_on: Callable[[int], object] | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # nohup means it: what is ignored as SIGHUP stays so.
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.pass_on is not None:
            self.pass_on(number)
        if self.received is not None:
            if number == signal.SIGHUP:  # a closing terminal sends it twice, with its shell's
                return
            if hasattr(sys, "ps1"):  # a notebook or prompt: its variables must survive
                raise KeyboardInterrupt
            # No clean-up: whoever signals twice does not want to wait for a save under way, and an
            # unfinished one is only a temporary folder.
            os._exit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        # Not print: a handler may interrupt a write to the same stream.
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(
                2, f"\n{name}: saving after the current call; again to leave at once\n".encode()
            )
