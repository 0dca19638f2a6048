"""Features on disk: computed once, appended row by row, read back only whole and intact.

`<directory>/features/<16 hex digits>/` belongs to one key, all that the features depend on, which
stands in its `about.json`. Each set is `<name>.npy`, float32 [N, h, w, C] in the original order.
While it is computed its finished rows are `<name>.partial`; a process that is killed leaves them
for the next one.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.data.sources import ARCHIVES
from cifar_jax.errors import UserError
from cifar_jax.lock import locked
from cifar_jax.recording.files import write_atomically, writing

FOLDER = "features"
ABOUT_NAME = "about.json"
DTYPE = np.dtype("<f4")
Shape = tuple[int, ...]


class FeatureCache:
    """The features of one key."""

    def __init__(self, directory: str | os.PathLike, key: Mapping[str, Any]):
        """Names the folder; nothing is read or written.

        Args:
            directory: of the data; where it is an archive of them, the folder beside it.
            key: JSON values.
        """
        self.key = dict(key)
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        directory = Path(directory).expanduser()
        if directory.is_file() and directory.name.endswith(ARCHIVES):
            directory = directory.parent
        self.folder = directory / FOLDER / digest[:16]

    def path(self, name: str) -> Path:
        """The file of a set."""
        return self.folder / f"{name}.npy"

    def read(self, name: str, shape: Shape) -> np.ndarray | None:
        """Maps a set into memory, after its content was compared with its SHA-256.

        Args:
            name: of the set.
            shape: what it must have.

        Returns:
            float32 of that shape, None where the set is not there. Writing to it leaves the file
            as it is (TensorFlow takes no array that is read-only).

        Raises:
            UserError: the file is damaged.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            features = np.load(path, mmap_mode="c")
            if (features.shape, features.dtype) != (shape, DTYPE):
                found = f"{features.dtype}{list(features.shape)}"
                raise ValueError(f"it holds {found}, expected {DTYPE}{list(shape)}")
            if self._sha256().get(name) != _digest(path):
                raise ValueError(f"its content does not match the SHA-256 in {ABOUT_NAME}")
        # NumPy raises the last two, and others of its header's parser, for a file cut short.
        except (ValueError, OSError, EOFError, SyntaxError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is damaged ({reason}); delete it and run again") from error
        return features

    def check_space(self, shapes: Mapping[str, Shape]) -> None:
        """Refuses to start what the disk has no room for.

        Args:
            shapes: of the sets that are wanted; what is there already needs no more room.

        Raises:
            UserError: with what is needed and what is free, or as `fill`.
        """
        needed = 0
        for name, shape in shapes.items():
            if not self.path(name).exists():
                partial = self._partial(name)
                done = partial.stat().st_size if partial.exists() else 0
                needed += max(len(_header(shape)) + _bytes(shape) - done, 0)
        with self._locked():
            free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: the features need {_gigabytes(needed)}, the disk has "
                f"{_gigabytes(free)} free; free space or set config.data.directory to another disk"
            )

    def fill(
        self,
        name: str,
        shape: Shape,
        *,
        batch_size: int,
        compute: Callable[[int], Iterable[np.ndarray]],
    ) -> None:
        """Computes what a set still lacks.

        Args:
            name: of the set.
            shape: of the whole set.
            batch_size: rows that are computed together: a set goes on at a multiple of it, so that
                an interrupted one ends with the same bytes.
            compute: (first row) -> the rows from there on, in blocks, none at the end; if it ends
                early, the next call goes on where it ended.

        Raises:
            UserError: another process writes to this folder, or it cannot be made.
            RunError: the disk is full.
        """
        partial = self._partial(name)
        with self._locked(), writing(partial):
            if self.path(name).exists():  # since this process looked
                return
            header = _header(shape)
            row_bytes = _bytes(shape[1:])
            with open(partial, "r+b" if partial.exists() else "w+b") as file:
                started = file.read(len(header)) == header
                rows = (partial.stat().st_size - len(header)) // row_bytes if started else 0
                if rows < shape[0]:
                    rows -= rows % batch_size
                file.seek(0)
                file.write(header)
                file.truncate(len(header) + rows * row_bytes)
                file.seek(0, os.SEEK_END)
                for block in compute(rows):
                    file.write(np.ascontiguousarray(block, DTYPE).data)
                    file.flush()
                    rows += len(block)
                os.fsync(file.fileno())
            if rows == shape[0]:
                self._finish(name)

    def _finish(self, name: str) -> None:
        partial = self._partial(name)
        about = {"key": self.key, "sha256": {**self._sha256(), name: _digest(partial)}}
        write_atomically(self.folder / ABOUT_NAME, json.dumps(about, indent=2).encode() + b"\n")
        os.replace(partial, self.path(name))

    def _sha256(self) -> dict[str, str]:
        """The digests in `about.json`; none where it is missing or damaged."""
        try:
            return json.loads((self.folder / ABOUT_NAME).read_bytes())["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}.partial"

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.folder, setting="config.data.directory")


def _header(shape: Shape) -> bytes:
    """What an .npy file of that shape begins with."""
    header = io.BytesIO()
    fields = {"descr": DTYPE.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _bytes(shape: Shape) -> int:
    return math.prod(shape) * DTYPE.itemsize


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
