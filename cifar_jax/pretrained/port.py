"""Any published file of weights -> our names, strictly; and back to the published names."""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.models.transfer import UPSAMPLINGS
from cifar_jax.pretrained import hdf5, keras, keras_config, keras_files, ours, pth, torch
from cifar_jax.pretrained.archive import open_archive, read_member
from cifar_jax.pretrained.fetch import check_published
from cifar_jax.pretrained.names import (
    Entry,
    Structure,
    differences,
    listed,
    printable,
    shapes,
    structure_of,
)

_KERAS_MEMBER, _KERAS_CONFIG = "model.weights.h5", "config.json"
_ASSUMED = (
    "assumed: activations, strides, padding, epsilons, pooling and order of layers of {} "
    "(the file has weights only)"
)
_TORCH_NAMINGS = {"torchvision": "torchvision / timm", "huggingface": "Hugging Face"}


@dataclass(frozen=True)
class Weights:
    """A complete set of weights by our names, and its origin."""

    values: dict[str, np.ndarray]  # float32
    header: ours.Header
    ported: bool  # the file was ours already
    read: int  # tensors in the file, and the other entries of a checkpoint
    ignored: tuple[str, ...]  # the file's names of those not used
    network: str = ""  # whether the file says what is computed with them

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
    network: str
    settings: dict[str, Any] = field(default_factory=dict)  # of `config.model`, as the file says
    differences: list[str] = field(default_factory=list)  # between its network and ours
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
            tensors, entries = pth.read(path)
            source = _torch_source(tensors, path, entries=entries)
        else:
            source = _keras_source(path, kind)
        digests = ours.digests(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    insist(variant, source.variant, path)
    values = _through_table(source, path)
    structure = structure_of(values, source.variant)
    published_for = "unknown" if structure.tuned_head else source.variant
    settings = source.settings | _shown(structure, path)
    header = ours.Header(
        source=printable(path.name),
        naming=source.naming,
        variant=source.variant,
        preprocessing=settings.get("preprocessing", published_for),
        head=settings["head"],
        upsampling=settings.get("upsampling"),
        interpolation=settings.get("interpolation"),
        license=printable(source.license or (published.license if published else "unknown")),
        **digests,
    )
    return Weights(
        values,
        header,
        ported=False,
        read=len(values) + len(source.ignored),
        ignored=tuple(source.ignored),
        network=source.network,
    )


def write_published(weights: Weights, path: str | os.PathLike) -> None:
    """Writes weights in the form in which their variant is published.

    Keras's as `.weights.h5`, torchvision's as `.safetensors` with torchvision's names. A pooled
    head leaves as the top of a ResNet-50, which is the same network.

    Raises:
        UserError: where that form has no place for them, or `path` has another ending.
    """
    ours.check_dest(Path(path), weights.header.variant)
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
    shown = _shown(structure_of(tensors, header.variant), path)
    for name, value in shown.items():
        if getattr(header, name) not in (None, value):
            raise UserError(
                f"{path}: damaged header: {name} {getattr(header, name)}, its tensors have {value}"
            )
    header = dataclasses.replace(header, **shown)
    return Weights(tensors, header, ported=True, read=len(tensors), ignored=())


def _shown(structure: Structure, path: Path) -> dict[str, Any]:
    """Returns the fields of a header that the tensors show.

    Raises:
        UserError: for a flatten head on maps of a size that no upsampling of ours gives.
    """
    if structure.tuned_head != "flatten":
        return {"head": structure.tuned_head}
    side = structure.head.side
    if side not in UPSAMPLINGS:
        wanted = ", ".join(f"{size} x {size}" for size in UPSAMPLINGS)
        raise UserError(f"{path}: its head reads maps of {side} x {side}, expected one of {wanted}")
    return {"head": "flatten", "upsampling": side}


def _torch_source(
    tensors: Mapping[str, np.ndarray],
    path: Path,
    *,
    entries: Sequence[str] = (),
    license: str | None = None,
) -> _Source:
    tensors, prefix = torch.without_wrappers(tensors)
    naming, canonical, ignored = torch.canonical(tensors, str(path))
    structure = Structure("torchvision", classes=torch.classes(canonical))
    table = torch.table(structure, naming)
    return _Source(
        _TORCH_NAMINGS[naming] + (f", behind {prefix}" if prefix else ""),
        "torchvision",
        canonical,
        [*ignored, *entries],
        table=table,
        network=_ASSUMED.format("torchvision (v1.5)"),
        license=license,
    )


def _keras_source(path: Path, kind: str) -> _Source:
    content: Path | io.BytesIO = path
    config: str | bytes | None = None
    if kind == "keras":
        with open_archive(path) as archive:
            content = io.BytesIO(read_member(archive, _KERAS_MEMBER, path=path))
            config = read_member(archive, _KERAS_CONFIG, path=path)
    with hdf5.open_tree(content, path=str(path), size=path.stat().st_size) as tree:
        found = keras_files.read(tree)
        if kind == "hdf5":
            config = tree.text("", "model_config")  # of model.save("model.h5")
    structure = Structure("keras", classes=found.classes, head=found.head)
    source = _Source(
        f"Keras, {found.layout}",
        "keras",
        found.tensors,
        found.ignored,
        table=keras.table(structure),
        network=_ASSUMED.format("keras.applications"),
    )
    return source if config is None else _compared(source, config, structure)


def _compared(source: _Source, config: str | bytes, structure: Structure) -> _Source:
    """Adds to a source what Keras's description of the model says."""
    network = keras_config.compare(config, structure)
    settings = ", ".join(f"{name} {value}" for name, value in network.settings.items())
    return dataclasses.replace(
        source,
        network=f"compared with Keras's config ({settings or 'no settings'})",
        settings=network.settings,
        differences=[f"Keras's config: {line}" for line in network.differences],
    )


def _through_table(source: _Source, path: Path) -> dict[str, np.ndarray]:
    expected = {name: entry.source_shape for name, entry in source.table.items()}
    lines = differences(source.tensors, expected) + source.differences
    advice = "; to port the numbers alone, save them with model.save_weights"
    _raise_on(lines, path, advice if source.differences else "")
    # Popped one by one, so that the file is not in memory twice.
    return {
        entry.name: entry.load(source.tensors.pop(name)) for name, entry in source.table.items()
    }


def _raise_on(lines: list[str], path: Path, advice: str = "") -> None:
    if lines:
        plural, start = ("s", "\n  ") if len(lines) > 1 else ("", " ")
        found = f"{len(lines)} difference{plural} from the expected ResNet-50{advice}"
        raise UserError(f"{path}: {found}:{start}{listed(lines)}")
