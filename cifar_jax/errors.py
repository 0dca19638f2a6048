"""Bad input is told in one line and ends with exit code 2, never with a traceback."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO


class UserError(Exception):
    """Something the user can mend.

    The message names the file or config key, what was found, what was expected and what to do, in
    one line.
    """

    exit_code = 2


class RunError(UserError):
    """A run that cannot go on, though nothing was wrong with what it was given at first."""

    exit_code = 1


_FAILING_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
# What keeps a reader from a file that may be whole.
_FAILING_READ = {
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE),
    *(errno.ENOMEM, errno.ESTALE, errno.EIO),
}


def is_failing_read(error: BaseException) -> bool:
    """Tells a system that does not let a file be read from a file that is damaged."""
    # Tensorstore, below orbax, writes the system's number into its message.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return out_of_memory or number in _FAILING_READ


def kind_of_failed_write(error: BaseException) -> type[UserError]:
    """Returns what to raise: a full or failing disk is nobody's bad input."""
    return RunError if getattr(error, "errno", None) in _FAILING_DISK else UserError


def one_line(error: BaseException) -> str:
    """Returns an error's type and text as one line; of a long one the beginning and the end."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"


class LastingStream:
    """A stream whose reader may leave (a closed pipe or terminal): what follows goes nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Writes, or not."""
        self._try(self._stream.write, text)

    def flush(self) -> None:
        """Flushes, or not."""
        self._try(self._stream.flush)

    def _try(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:
            silence(self._stream)


def silence(stream: TextIO) -> None:
    """Lets a stream of the process, and what waits in its buffer, end nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def tell(text: str) -> None:
    """Prints a line for people."""
    print(text, file=LastingStream(sys.stderr))


def set_up_logging() -> None:
    """Leaves standard error to us: what goes wrong elsewhere reaches the run as an exception."""
    from absl import logging as absl_logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("cifar_jax").setLevel(logging.INFO)
    # TensorFlow only feeds the input pipeline: its notes on CPU features are noise here, and the
    # one on oneDNN comes whatever the log level is.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    absl_logging.set_verbosity(absl_logging.FATAL)
    report = sys.unraisablehook

    def without_late_callbacks(unraisable):
        # Orbax gives up a read or a write at its first failure; what else was under way then ends
        # in a closed event loop, each time with a traceback that says no more than that.
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = without_late_callbacks
    # And of its other writes that failed as well, asyncio tells the same way when they are dropped.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with an exit code, and at most one line on stderr, if the block fails.

    A `UserError` with its own code; Ctrl-C with 130; a reader that has left (`| head`) silently
    with 141; a failed write or too little memory with 1; a path that is too long or begins with an
    unknown ~NAME with 2. Anything else is a defect of ours and
    keeps its traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # paths may hold what is no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error), error.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted; nothing was under way that needs saving", 128 + signal.SIGINT)
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which would fail again.
        silence(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except (OSError, MemoryError) as error:
        is_input = getattr(error, "errno", None) == errno.ENAMETOOLONG
        _exit(one_line(error), (UserError if is_input else RunError).exit_code)
    except RuntimeError as error:  # JAX's own error is one
        if "Could not determine home directory" in str(error):  # pathlib's, which names no path
            _exit("a path begins with ~NAME, and there is no such user", UserError.exit_code)
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _exit(f"out of memory ({one_line(error)}); try smaller sizes", RunError.exit_code)


def _exit(text: str, code: int) -> NoReturn:
    print(f"error: {text}", file=LastingStream(sys.stderr))
    sys.exit(code)
