"""Bad input is told in one line and ends with exit code 2, never with a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something the user can mend.

    The message names the file or config key, what was found, what was expected and what to do, in
    one line.
    """

    exit_code = 2


class RunError(UserError):
    """A run that cannot go on, though nothing was wrong with what it was given at first."""

    exit_code = 1


def one_line(error: BaseException, limit: int = 300) -> str:
    """Returns an error's type and text as one line; of a long one the beginning and the end."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turns a `UserError` inside the block into one line on stderr and its exit code."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
