"""Keras's layouts of HDF5 files: the legacy one, and `.weights.h5` of Keras 3 (also in `.keras`).

keras/src/legacy/saving/legacy_h5_format.py and keras/src/saving/saving_lib.py write them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.pretrained.hdf5 import Tree
from cifar_jax.pretrained.keras import CLASSES, LEAVES, TOP, backbone_names
from cifar_jax.pretrained.names import Head, printable, size

_OLD_TOPS = ("probs", "fc1000")  # what earlier releases called the published model's top
_HEADS = {  # (batch norms, dense layers) behind the backbone -> our layers, in Keras's order
    (3, 3): ("norm1", "dense1", "norm2", "dense2", "norm3", "logits"),
    (0, 1): ("logits",),
    (0, 0): (),
}


@dataclass
class Found:
    """What a file of Keras holds, by the names of `keras.table`."""

    layout: str
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    classes: int | None = None  # of the top; None without top
    head: Head | None = None


@dataclass(frozen=True)
class _Layer:
    """A layer with weights as a file shows it, in the file's order among its kind."""

    kind: str
    name: str | None  # None: some layer of a head
    datasets: dict[str, str]  # {"kernel": path in the file}


def read(tree: Tree) -> Found:
    """Reads an open HDF5 file in either layout.

    Raises:
        UserError: where it is no file of Keras, or its head is none that the models have.
    """
    for group in ("", "model_weights"):  # weights alone, or model.save("model.h5")
        if tree.strings(group, "layer_names") is not None:
            return _collect(_legacy_layers(tree, group), tree, into=Found("legacy HDF5"))
    if any("/vars/" in name for name in tree.datasets):
        return _collect(_keras3_layers(tree), tree, into=Found("HDF5 of Keras 3"))
    raise UserError(f"{tree.path}: an HDF5 file, but none of Keras (no layer_names, no vars)")


def _collect(layers: Iterator[_Layer], tree: Tree, *, into: Found) -> Found:
    """Sorts layers into backbone, top and head, other datasets into ignored and unexpected."""
    backbone = {*backbone_names("conv"), *backbone_names("norm"), TOP}
    head: dict[str, list[_Layer]] = {kind: [] for kind in CLASSES}
    used = set()
    for layer in layers:
        used.update(layer.datasets.values())
        name = TOP if layer.name in _OLD_TOPS else layer.name
        if name in backbone:
            _take(layer, name, tree=tree, into=into)
        else:
            head[layer.kind].append(layer)
    if f"{TOP}/bias" in into.tensors:
        into.classes = size(into.tensors[f"{TOP}/bias"])
    into.head = _take_head(head, tree=tree, into=into)
    for name in tree.datasets.keys() - used:
        if name.startswith(("optimizer/", "optimizer_weights/")) or "seed_generator" in name:
            into.ignored.append(name)
        else:
            into.tensors[name] = tree.read(name)
    into.ignored.sort()
    return into


def _take(layer: _Layer, name: str, *, tree: Tree, into: Found) -> None:
    for leaf, dataset in layer.datasets.items():
        if f"{name}/{leaf}" in into.tensors:
            raise UserError(f"{tree.path}: two layers are called {name}")
        into.tensors[f"{name}/{leaf}"] = tree.read(dataset)


def _take_head(found: Mapping[str, list[_Layer]], *, tree: Tree, into: Found) -> Head | None:
    counts = len(found["norm"]), len(found["dense"])
    if counts not in _HEADS or found["conv"]:
        raise UserError(
            f"{tree.path}: behind ResNet50 stand {counts[0]} batch normalizations, {counts[1]} "
            f"dense layers and {len(found['conv'])} convolutions; known heads: three, three and "
            "none (the flatten head), or one dense layer alone"
        )
    remaining = {kind: iter(layers) for kind, layers in found.items()}
    for name in _HEADS[counts]:
        layer = next(remaining["norm" if name.startswith("norm") else "dense"])
        _take(layer, f"head.{name}", tree=tree, into=into)
    if counts == (0, 0):
        return None
    kind, first = ("flatten", "dense1") if counts == (3, 3) else ("pooled", "logits")
    return Head(
        kind,
        features=size(into.tensors.get(f"head.{first}/kernel")),
        classes=size(into.tensors.get("head.logits/bias")),
    )


def _legacy_layers(tree: Tree, group: str) -> Iterator[_Layer]:
    """Yields layers by `layer_names`; a nested model lists its layers' variables as its own."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for listed in tree.strings(group, "layer_names"):
        base = f"{group}/{listed}".lstrip("/")
        for weight in tree.strings(base, "weight_names") or ():
            path = f"{base}/{weight}"
            if path not in tree.datasets:
                raise UserError(f"{tree.path}: {printable(path)} is listed but missing")
            layer, _, leaf = f"{listed}/{weight}".removesuffix(":0").rpartition("/")
            if "seed_generator" not in weight:
                found.setdefault((listed, layer.rpartition("/")[2]), {})[leaf] = path
    is_nested = any("conv" in name and listed != name for listed, name in found)
    for (listed, name), datasets in found.items():
        if datasets.keys() & {"gamma", "beta"}:
            kind = "norm"
        else:
            kind = "conv" if "conv" in name else "dense"
        # Beside a nested ResNet50 stands the head, whatever its layers are called.
        yield _Layer(kind, None if is_nested and listed == name else name, datasets)


def _keras3_layers(tree: Tree) -> Iterator[_Layer]:
    """Yields layers by `<model>/<class>_<k>/vars/<i>`: k counts a class's layers within a model.

    Keras loads by k. Recent releases write the layer's own name beside it, which then must agree.
    """
    variables: dict[str, dict[str, str]] = {}
    for path in tree.datasets:
        group, vars_, number = path.rpartition("/vars/")
        if vars_:
            variables.setdefault(group, {})[number] = path
    found = _by_model_and_kind(variables)
    models = [model for model, kind in found if kind == "conv"]
    if len(models) != 1:
        raise UserError(f"{tree.path}: {len(models)} models with convolutions, expected one")
    for (model, kind), groups in sorted(found.items()):
        in_backbone = model == models[0]
        names = backbone_names(kind) if in_backbone else []
        for count, group in sorted(groups):
            said = tree.text(f"{group}/vars", "name")
            if count < len(names) and said not in (None, names[count]):
                raise UserError(
                    f"{tree.path}: {group} is {printable(said)}, in ResNet50 it is {names[count]}"
                )
            is_top = kind == "dense" and in_backbone and len(groups) == 1 and said in (None, TOP)
            name = names[count] if count < len(names) else TOP if is_top else None
            # A variable too many keeps its number, to be told as unexpected.
            leaves = dict(enumerate(LEAVES[kind].values()))
            by_leaf = {leaves.get(_number(n), n): path for n, path in variables[group].items()}
            yield _Layer(kind, name, by_leaf)


def _by_model_and_kind(groups: Iterable[str]) -> dict[tuple[str, str], list[tuple[int, str]]]:
    """Returns {(model, kind): [(k, group), ...]} of the groups that are layers with weights."""
    kinds = {name: kind for kind, name in CLASSES.items()}
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for group in groups:
        model, _, layer = group.rpartition("/")
        match = re.fullmatch(r"(\w+?)(?:_(\d{1,6}))?", layer, re.ASCII)
        if match and match[1] in kinds and not group.startswith("optimizer/"):
            found.setdefault((model, kinds[match[1]]), []).append((_number(match[2]), group))
    return found


def _number(text: str | None) -> int:
    """Returns the count in a name: none for a class's first layer, -1 where it is no number."""
    if text is None:
        return 0
    return int(text) if re.fullmatch(r"\d{1,6}", text, re.ASCII) else -1
