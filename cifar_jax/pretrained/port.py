"""Any published file of weights -> our names, strictly; and back to the published names."""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.pretrained import hdf5, keras, keras_files, ours, pth, torch
from cifar_jax.pretrained.archive import open_archive, read_member
from cifar_jax.pretrained.fetch import check_published
from cifar_jax.pretrained.names import (
    Entry,
    Structure,
    differences,
    printable,
    shapes,
    structure_of,
)

_KERAS_MEMBER = "model.weights.h5"
_TORCH_NAMINGS = {"torchvision": "torchvision / timm", "huggingface": "Hugging Face"}


@dataclass(frozen=True)
class Weights:
    """A complete set of weights by our names, and its origin."""

    values: dict[str, np.ndarray]  # float32
    header: ours.Header
    ported: bool  # the file was ours already
    read: int  # tensors in the file
    ignored: tuple[str, ...]  # the file's names of those not used

    @property
    def structure(self) -> Structure:
        """Which layers the values belong to."""
        return structure_of(self.values, self.header.variant)


@dataclass(frozen=True)
class _Source:
    """A published file's tensors and the table that says what each one is."""

    naming: str
    variant: str
    tensors: dict[str, np.ndarray]
    ignored: list[str]
    table: dict[str, Entry]
    license: str | None = None


def read(path: str | os.PathLike, variant: str | None = None) -> Weights:
    """Reads a file of weights: ours, Keras's, torchvision's, timm's or Hugging Face's.

    Args:
        path: the file; its kind is told from its content.
        variant: "keras" or "torchvision" to insist on one; None takes what the names say.

    Raises:
        UserError: damaged or foreign files, and every difference between the tensors that are there
            and those that a ResNet-50 (or the transfer model) has.
    """
    path = Path(path)
    try:
        published = check_published(path)
        kind = _kind(path)
        if kind == "safetensors":
            tensors, metadata = ours.read_safetensors(path)
            header = ours.parse_header(metadata, path)
            if header:
                return _read_ours(path, variant, tensors=tensors, metadata=metadata, header=header)
            source = _torch_source(tensors, path, license=metadata.get("license"))
        elif kind == "torch":
            source = _torch_source(pth.read(path), path)
        else:
            source = _keras_source(path, kind)
        digests = ours.digests(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    insist(variant, source.variant, path)
    values = _through_table(source, path)
    structure = structure_of(values, source.variant)
    is_flatten = structure.tuned_head == "flatten"
    header = ours.Header(
        source=printable(path.name),
        naming=source.naming,
        variant=source.variant,
        preprocessing="unknown" if structure.tuned_head else source.variant,
        head=structure.tuned_head,
        upsampling=structure.head.side if is_flatten else None,
        license=printable(source.license or (published.license if published else "unknown")),
        **digests,
    )
    return Weights(
        values,
        header,
        ported=False,
        read=len(values) + len(source.ignored),
        ignored=tuple(source.ignored),
    )


def write_published(weights: Weights, path: str | os.PathLike) -> None:
    """Writes weights in the form in which their variant is published.

    Keras's as `.weights.h5`, torchvision's as `.safetensors` with torchvision's names. A pooled
    head leaves as the top of a ResNet-50, which is the same network.

    Raises:
        UserError: where that form has no place for them, or `path` has another ending.
    """
    ending = {"keras": ".weights.h5", "torchvision": ".safetensors"}[weights.header.variant]
    if not str(path).endswith(ending):
        raise UserError(f"{path}: expected a name that ends in {ending}")
    values = _with_top(weights)
    if weights.header.variant == "keras":
        ours.write_atomically(path, lambda part: keras.write_weights(values, part))
        return
    structure = structure_of(values, weights.header.variant)
    if structure.head:
        raise UserError(f"{path}: torchvision has no names for a transfer model's head")
    table = torch.table(structure, "torchvision")
    tensors = {name: entry.store(values[entry.name]) for name, entry in table.items()}
    ours.write_safetensors(path, tensors, weights.header.license)


def insist(wanted: str | None, found: str, path: Path) -> None:
    """Raises `UserError` where a variant is asked for and another one found."""
    if wanted not in (None, found):
        raise UserError(f"{path}: its names are those of variant {found}, asked for is {wanted}")


def check(values: Mapping[str, np.ndarray], variant: str, path: Path) -> None:
    """Raises `UserError` with every difference between values by our names and a whole model's."""
    _raise_on(differences(values, shapes(structure_of(values, variant))), path)


def _with_top(weights: Weights) -> dict[str, np.ndarray]:
    head = weights.structure.head
    if head is None or head.kind != "pooled":
        return weights.values
    return {
        name.removeprefix("backbone.").replace("head.logits.", "top."): array
        for name, array in weights.values.items()
    }


def _kind(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if start.startswith(b"PK\x03\x04"):
        with open_archive(path) as archive:
            return "keras" if _KERAS_MEMBER in archive.namelist() else "torch"
    if start.startswith(pth.STREAM_MAGIC):
        return "torch"
    if start[8:9] == b"{":
        return "safetensors"
    raise UserError(
        f"{path}: starts with {start[:8]!r}: no HDF5, .keras, PyTorch (.pth) or safetensors file"
    )


def _read_ours(
    path: Path,
    variant: str | None,
    *,
    tensors: dict[str, np.ndarray],
    metadata: Mapping[str, str],
    header: ours.Header,
) -> Weights:
    insist(variant, header.variant, path)
    check(tensors, header.variant, path)
    ours.check_content(tensors, metadata, path)
    return Weights(tensors, header, ported=True, read=len(tensors), ignored=())


def _torch_source(
    tensors: Mapping[str, np.ndarray], path: Path, license: str | None = None
) -> _Source:
    naming, canonical, ignored = torch.canonical(tensors, str(path))
    structure = Structure("torchvision", classes=torch.classes(canonical))
    table = torch.table(structure, naming)
    return _Source(
        _TORCH_NAMINGS[naming], "torchvision", canonical, ignored, table=table, license=license
    )


def _keras_source(path: Path, kind: str) -> _Source:
    content: Path | io.BytesIO = path
    if kind == "keras":
        with open_archive(path) as archive:
            content = io.BytesIO(read_member(archive, _KERAS_MEMBER, path=path))
    with hdf5.open_tree(content, path=str(path), size=path.stat().st_size) as tree:
        found = keras_files.read(tree)
    structure = Structure("keras", classes=found.classes, head=found.head)
    table = keras.table(structure)
    return _Source(f"Keras, {found.layout}", "keras", found.tensors, found.ignored, table=table)


def _through_table(source: _Source, path: Path) -> dict[str, np.ndarray]:
    expected = {name: entry.source_shape for name, entry in source.table.items()}
    _raise_on(differences(source.tensors, expected), path)
    # Popped one by one, so that the file is not in memory twice.
    return {
        entry.name: entry.load(source.tensors.pop(name)) for name, entry in source.table.items()
    }


def _raise_on(lines: list[str], path: Path) -> None:
    if lines:
        listed = "\n  ".join(lines)
        count = f"{len(lines)} difference{'s' if len(lines) > 1 else ''}"
        raise UserError(f"{path}: {count} from a ResNet-50's parameters:\n  {listed}")
