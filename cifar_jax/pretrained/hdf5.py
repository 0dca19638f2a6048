"""The arrays of an HDF5 file that may be hostile: none from outside it, none beyond its size.

libhdf5 parses the file, and bytes made for the purpose can hang it; the other formats are safe.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.pretrained.names import printable

_MOST_OBJECTS = 20_000  # a fine-tuned Keras model with its optimizer has under 2,000
_DEEPEST = 16
# What h5py raises on files that libhdf5 finds damaged.
_DAMAGED = (OSError, KeyError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Tree:
    """An open HDF5 file: its datasets and its groups' attributes, by path without leading slash."""

    path: str
    datasets: dict[str, Any]  # h5py.Dataset
    attributes: dict[str, Mapping[str, Any]]  # "" is the root

    def read(self, name: str) -> np.ndarray:
        """Returns one dataset.

        Raises:
            UserError: where it is damaged.
        """
        with _damage_is_told(self.path):
            return self.datasets[name][()]

    def strings(self, group: str, attribute: str) -> list[str] | None:
        """Returns an attribute that holds names; None where the group lacks it.

        Keras cuts a list of more than 64 KB into `attribute0`, `attribute1`, ...
        """
        with _damage_is_told(self.path):
            attributes = self.attributes.get(group, {})
            if attribute in attributes:
                pieces = [attributes[attribute]]
            else:
                pieces = []
                while f"{attribute}{len(pieces)}" in attributes:
                    pieces.append(attributes[f"{attribute}{len(pieces)}"])
                if not pieces:
                    return None
            return [_text(item) for piece in pieces for item in np.atleast_1d(piece)]

    def text(self, group: str, attribute: str) -> str | None:
        """Returns an attribute that holds one name; None where the group lacks it."""
        found = self.strings(group, attribute)
        return found[0] if found else None


@contextlib.contextmanager
def open_tree(source: str | os.PathLike | io.BytesIO, *, path: str, size: int) -> Iterator[Tree]:
    """Opens an HDF5 file.

    Args:
        source: the file, or its content.
        path: what messages call it.
        size: its size in bytes; datasets that declare more than this together are refused.

    Raises:
        UserError: where it is damaged, or not self-contained.
    """
    import h5py  # 0.3 s, and only files of Keras need it

    with contextlib.ExitStack() as stack:
        with _damage_is_told(path):
            file = stack.enter_context(h5py.File(source, "r"))
            tree = Tree(path, datasets={}, attributes={})
            _walk(file, "", tree=tree, depth=0)
            declared = sum(dataset.nbytes for dataset in tree.datasets.values())
        if declared > size:
            raise UserError(
                f"{path}: damaged: its datasets declare {declared:,} bytes, the file has {size:,}"
            )
        yield tree


def _walk(group: Any, name: str, *, tree: Tree, depth: int) -> None:
    import h5py

    tree.attributes[name] = group.attrs
    for key in group:
        path = f"{name}/{key}".lstrip("/")
        if len(tree.attributes) + len(tree.datasets) > _MOST_OBJECTS or depth > _DEEPEST:
            raise UserError(f"{tree.path}: too many or too deeply nested groups for a model")
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise UserError(f"{tree.path}: {printable(path)} is a link to somewhere else: refused")
        found = group[key]
        if isinstance(found, h5py.Group):
            _walk(found, path, tree=tree, depth=depth + 1)
        elif not isinstance(found, h5py.Dataset):
            raise UserError(f"{tree.path}: {printable(path)} is neither group nor dataset")
        elif found.external or found.is_virtual:
            raise UserError(f"{tree.path}: {printable(path)} keeps its numbers in another file")
        elif found.shape is None or found.dtype.kind not in "fiub":
            raise UserError(f"{tree.path}: {printable(path)} is no array of numbers")
        else:
            tree.datasets[path] = found


@contextlib.contextmanager
def _damage_is_told(path: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{path}: damaged or truncated HDF5 file: {reason}") from error


def _text(item: Any) -> str:
    return item.decode("utf-8") if isinstance(item, bytes) else str(item)
