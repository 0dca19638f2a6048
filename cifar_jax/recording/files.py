"""Writing a file whole or not at all, with failures told in one line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import RunError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block (a full disk, say) into a `RunError` naming `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"{path}: cannot be written ({reason}); free space or mend permissions, "
            "then run the same command again"
        ) from error


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replaces `path` by `content`; whoever reads it meanwhile sees the old file or the new one.

    Args:
        path: the file; its folder exists.
        content: all of the new file.

    Raises:
        RunError: the file cannot be written; the old one is untouched.
    """
    path = Path(path)
    # One fixed name, so that a killed process leaves at most one such file and the next removes it.
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
