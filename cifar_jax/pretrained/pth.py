"""Tensors from a file of `torch.save`, without PyTorch and without running anything the file says.

Both layouts of torch/serialization.py are read: the zip archive (since 1.6), and the older stream
of pickles followed by raw storages.
"""

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.pretrained.archive import open_archive, read_member
from cifar_jax.pretrained.names import printable
from cifar_jax.pretrained.unpickle import MalformedError, Storage, Tensor, expect, unpickle

STREAM_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, pickled
_STREAM_PROTOCOL = 1001
_CHECKPOINT_KEYS = ("state_dict", "model", "model_state_dict")  # training scripts' usual names
_MOST_PICKLE_BYTES = 4 << 20  # a ResNet-50's has about 45 KB


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads a state_dict, or the one that a checkpoint holds beside other things.

    Args:
        path: a file that `torch.save(model.state_dict(), path)` wrote, or `torch.save` of
            {"state_dict": model.state_dict(), "epoch": 3, ...}.

    Returns:
        {name: array}, which may share memory and need not be contiguous; and the names of a
        checkpoint's other entries.

    Raises:
        UserError: where the file is damaged, asks for anything but tensors, or is no state_dict.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.read(len(STREAM_MAGIC)) == STREAM_MAGIC:
                return _read_stream(file, path.stat().st_size)
        return _read_zip(path)
    except MalformedError as error:
        raise UserError(f"{path}: {error}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{path}: damaged file of PyTorch: {reason}") from error


def _read_zip(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    with open_archive(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise MalformedError("a zip archive without the data.pkl of torch.save")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            if read_member(archive, f"{folder}byteorder", path=path) != b"little":
                raise MalformedError("written on a big-endian machine; save it on another one")
        if archive.getinfo(pickles[0]).file_size > _MOST_PICKLE_BYTES:
            raise MalformedError(f"its pickle is longer than {_MOST_PICKLE_BYTES:,} bytes")
        tree = unpickle(io.BytesIO(read_member(archive, pickles[0], path=path)))
        storages: dict[str, bytes] = {}

        def content(storage: Storage) -> bytes:
            if storage.key not in storages:
                member = f"{folder}data/{storage.key}"
                if member not in archive.namelist():
                    raise MalformedError(f"storage {printable(storage.key)} is missing")
                storages[storage.key] = read_member(archive, member, path=path)
            return storages[storage.key]

        tensors, others = _state_dict(tree)
        return _arrays(tensors, content), others


def _read_stream(file: BinaryIO, size: int) -> tuple[dict[str, np.ndarray], list[str]]:
    file.seek(0)
    head = io.BytesIO(file.read(_MOST_PICKLE_BYTES))
    dtypes: dict[str, np.dtype] = {}
    _magic, protocol, system, tree, keys = (unpickle(head, dtypes) for _ in range(5))
    if protocol != _STREAM_PROTOCOL or not isinstance(keys, list):
        raise MalformedError("an unknown release of torch.save wrote this; save it again")
    if isinstance(system, dict) and system.get("little_endian") is not True:
        raise MalformedError("written on a big-endian machine; save it on another one")
    file.seek(head.tell())
    tensors, others = _state_dict(tree)
    wanted = {tensor.storage.key for tensor in tensors.values()}
    storages: dict[str, bytes] = {}
    for key in (expect(key, str) for key in keys):
        numbers = int.from_bytes(file.read(8), "little")
        if key not in dtypes or key in storages:
            raise MalformedError(f"storage {printable(key)} belongs to no tensor")
        length = numbers * dtypes[key].itemsize
        if length > size - file.tell():
            raise MalformedError(f"truncated: storage {printable(key)} ends beyond the file")
        if key in wanted:
            storages[key] = file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)
    return _arrays(tensors, lambda storage: storages[storage.key]), others


def _state_dict(tree: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the tensors, and the names of what else there is."""
    if _holds_tensors(tree):
        return tree, []
    checkpoint = tree if isinstance(tree, dict) else {}
    inner = [key for key in _CHECKPOINT_KEYS if _holds_tensors(checkpoint.get(key) or None)]
    if len(inner) != 1:
        raise MalformedError(
            "is no state_dict of tensors, nor a checkpoint with just one of "
            f"{', '.join(_CHECKPOINT_KEYS)}; save it with torch.save(model.state_dict(), path)"
        )
    return checkpoint[inner[0]], [str(key) for key in checkpoint if key != inner[0]]


def _holds_tensors(tree: Any) -> bool:
    return isinstance(tree, dict) and all(
        isinstance(name, str) and isinstance(item, Tensor) for name, item in tree.items()
    )


def _arrays(
    tensors: dict[str, Tensor], content: Callable[[Storage], bytes]
) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in tensors.items():
        flat = np.frombuffer(content(tensor.storage), tensor.storage.dtype)
        if flat.size != tensor.storage.numbers:
            raise MalformedError(
                f"{printable(name)}: its storage has {flat.size:,} numbers, "
                f"{tensor.storage.numbers:,} are declared"
            )
        arrays[name] = _strided(flat, tensor, name)
    return arrays


def _strided(flat: np.ndarray, tensor: Tensor, name: str) -> np.ndarray:
    size = math.prod(tensor.shape)
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if size > flat.size or (size and tensor.offset + last >= flat.size):
        raise MalformedError(
            f"{printable(name)}: shape {tensor.shape} does not fit into its {flat.size:,} numbers"
        )
    return np.lib.stride_tricks.as_strided(
        flat[tensor.offset :] if size else flat,
        shape=tensor.shape,
        strides=[stride * flat.itemsize for stride in tensor.strides],
        writeable=False,
    )
