"""A folder for one writer at a time."""

import contextlib
import pathlib
from collections.abc import Iterator

import filelock

from cifar_jax.errors import UserError


@contextlib.contextmanager
def locked(folder: pathlib.Path, *, setting: str) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it.

    Args:
      folder: to hold a lock file.
      setting: what names another folder, for messages.

    Raises:
      UserError: where another process has it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock").acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(
            f"{folder} is in use by another run; wait for it or use another {setting}"
        ) from None
    except OSError as error:
        raise UserError(
            f"{setting}: {folder} cannot be written ({error.strerror}); use another {setting}"
        ) from error
    with lock:
        yield
