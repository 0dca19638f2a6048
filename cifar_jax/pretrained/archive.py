"""Zip archives that may be hostile: only plainly stored members, as Keras and PyTorch write."""

import contextlib
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import UserError

# What zipfile raises on damaged archives.
_DAMAGED = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    KeyError,
    struct.error,
)


@contextlib.contextmanager
def open_archive(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive whose members are no larger than the archive.

    Raises:
        UserError: where it is damaged, truncated or compressed.
    """
    size = Path(path).stat().st_size
    with contextlib.ExitStack() as stack:
        try:
            archive = stack.enter_context(zipfile.ZipFile(path))
        except _DAMAGED as error:
            raise UserError(f"{path}: damaged or truncated zip archive: {error}") from error
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise UserError(
                f"{path}: has compressed members; save it again with Keras, or with torch.save "
                "(TorchScript? save model.state_dict())"
            )
        if sum(member.file_size for member in members) > size:
            raise UserError(f"{path}: damaged: its members declare more bytes than the file has")
        yield archive


def read_member(archive: zipfile.ZipFile, name: str, *, path: str | os.PathLike) -> bytes:
    """Returns one member, its checksum verified.

    Raises:
        UserError: where it is damaged.
    """
    try:
        return archive.read(name)
    except _DAMAGED as error:
        raise UserError(f"{path}: damaged zip archive: {error}") from error
