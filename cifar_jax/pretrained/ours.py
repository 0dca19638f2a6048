"""Our file: one `.safetensors` with our names, whose header says where the numbers come from."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cifar_jax.errors import UserError, kind_of_failed_write
from cifar_jax.models import transfer
from cifar_jax.pretrained.names import VARIANTS, is_printable, printable, wrong_dtypes

FORMAT_VERSION = 1
_CHOICES = {
    "variant": VARIANTS,
    "preprocessing": (*transfer.PREPROCESSINGS, "unknown"),
    "head": (*transfer.HEADS, None),
    "upsampling": (*transfer.UPSAMPLINGS, None),
    "interpolation": (*transfer.INTERPOLATIONS, None),
    "test_time_flip": (False, True),
}
# One key with JSON inside: safetensors writes several keys in random order, and the same port shall
# give the same bytes.
_KEY = "cifar_jax"
_MOST_HEADER_BYTES = 16 << 20  # a ResNet-50's has about 30 KB
_MOST_LEVELS = 64  # of weights that were trained on from weights that were trained on from ...
_DTYPES = {"F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file of ours says about itself: origin, and what it takes to run the model."""

    source: str  # file name; of a run: workdir and step; of an average: those of all
    sha256: str  # of the source file; of a run: its checkpoint's digest; of an average: of those
    md5: str  # of the source file; "none" of a run
    naming: str  # whose names and layout the source had
    variant: str  # "keras" | "torchvision": the form of ResNet-50
    # What the weights were trained with: "keras" | "torchvision" | "unit", or "unknown": a transfer
    # model may have been fine-tuned with any.
    preprocessing: str
    license: str  # "unknown" where the source does not say
    # Of a fine-tuned model, see `models.transfer`; None: not known, or there is no head.
    head: str | None = None
    upsampling: int | None = None
    interpolation: str | None = None
    test_time_flip: bool = False  # logits are the mean over image and mirror image
    # The header of the weights that a run started from.
    initial: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION


def digests(path: str | os.PathLike) -> dict[str, str]:
    """Returns {"sha256": hex, "md5": hex} of a file."""
    found = {name: hashlib.new(name, usedforsecurity=False) for name in ("sha256", "md5")}
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            for digest in found.values():
                digest.update(chunk)
    return {name: digest.hexdigest() for name, digest in found.items()}


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads any `.safetensors`.

    Returns:
        {name: array} and the header's metadata.

    Raises:
        UserError: where it is damaged.
    """
    path = Path(path)
    _check_header_length(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
            odd = {name: dtype for name, dtype in dtypes.items() if dtype not in _DTYPES}
            if odd:
                raise UserError(f"{path}: {'; '.join(wrong_dtypes(odd))}")
            return {name: file.get_tensor(name) for name in dtypes}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, OverflowError) as error:
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{path}: damaged or truncated safetensors file: {reason}") from error


def parse_header(metadata: Mapping[str, str], path: str | os.PathLike) -> Header | None:
    """Returns our header, None where the metadata have none.

    Raises:
        UserError: where it is damaged or of another format version.
    """
    if _KEY not in metadata:
        return None
    try:
        header = Header(**json.loads(metadata[_KEY])["header"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: damaged header: {printable(str(error))}") from error
    if header.format_version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {printable(str(header.format_version))}, this program reads "
            f"{FORMAT_VERSION}: port the original file again"
        )
    for name, value in vars(header).items():
        if not _is_possible(name, value):
            raise UserError(f"{path}: damaged header: {name} {printable(repr(value))}")
    return header


def _is_possible(name: str, value: Any) -> bool:
    if name in _CHOICES:  # True and 1.0 equal 1
        return any(type(value) is type(choice) and value == choice for choice in _CHOICES[name])
    if name == "initial":
        return value is None or (isinstance(value, dict) and _is_shallow(value))
    # A text goes into certificates, where it must not forge a line.
    return name == "format_version" or (isinstance(value, str) and is_printable(value))


def _is_shallow(value: Any, levels: int = _MOST_LEVELS) -> bool:
    """Tells whether JSON is nested less deeply than copying it could stand."""
    inner = value.values() if isinstance(value, dict) else value
    return not isinstance(value, dict | list) or (
        levels > 0 and all(_is_shallow(each, levels - 1) for each in inner)
    )


def check_content(
    values: Mapping[str, np.ndarray], metadata: Mapping[str, str], path: str | os.PathLike
) -> None:
    """Raises `UserError` where the numbers are not those that were written."""
    if json.loads(metadata[_KEY]).get("content") != _content(values):
        raise UserError(f"{path}: damaged: its numbers do not have the SHA-256 in its header")


def write(path: str | os.PathLike, values: Mapping[str, np.ndarray], header: Header) -> None:
    """Writes a file of ours, atomically; the same content gives the same bytes."""
    about = {"header": dataclasses.asdict(header), "content": _content(values)}
    metadata = {_KEY: json.dumps(about, sort_keys=True)}
    write_atomically(path, lambda part: _save(part, values, metadata))


def write_safetensors(
    path: str | os.PathLike, tensors: Mapping[str, np.ndarray], license: str
) -> None:
    """Writes tensors by any names, atomically."""
    write_atomically(path, lambda part: _save(part, tensors, {"license": license}))


def write_atomically(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Has `write` fill a file in the same folder, which then takes the place of `path`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
            part = Path(folder) / path.name
            write(part)
            os.replace(part, path)
    except OSError as error:
        kind = kind_of_failed_write(error)
        raise kind(f"{path}: cannot be written: {error}") from error


def _save(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata))


def _content(values: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(values):
        digest.update(f"{name} {values[name].dtype} {values[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(values[name]).data)
    return digest.hexdigest()


def _check_header_length(path: Path) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _MOST_HEADER_BYTES):
        raise UserError(
            f"{path}: damaged or truncated safetensors file: it declares a header of {length:,} "
            f"bytes, the file has {size:,}"
        )


def check_dest(path: Path, to: str | None) -> None:
    """Raises `UserError` where the name is not one of our files, or of those that `to` means."""
    ending = ".weights.h5" if to == "keras" else ".safetensors"
    if not str(path).endswith(ending):
        raise UserError(f"{path}: expected a name that ends in {ending}")
    check_is_no_folder(path)


def check_is_no_folder(path: Path) -> None:
    """Raises `UserError` where no file could be written."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected the name of a file to write")
