"""Keras's names of ResNet-50's layers, how their tensors become ours, and the way back to a file.

keras/src/applications/resnet.py names the layers. Kernels are HWIO and [in, out], as ours.
"""

import os
import re
from collections.abc import Mapping

import numpy as np

from cifar_jax.pretrained.names import Entry, Layer, Shape, Structure, layers, structure_of

LEAVES = {
    "conv": {"kernel": "kernel", "bias": "bias"},
    "dense": {"kernel": "kernel", "bias": "bias"},
    "norm": {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"},
}
CLASSES = {"conv": "conv2d", "norm": "batch_normalization", "dense": "dense"}  # in Keras 3's files
TOP = "predictions"


def table(structure: Structure) -> dict[str, Entry]:
    """Returns {"conv1_conv/kernel": entry, ..., "head.dense1/kernel": entry}: every tensor.

    The layers of a head have no fixed names in Keras; here they bear ours.
    """
    entries = {}
    for layer in layers(structure):
        for leaf, shape in layer.parameters().items():
            source_shape = _shape(layer, leaf, shape)
            entries[f"{layer_name(layer.path)}/{LEAVES[layer.kind][leaf]}"] = Entry(
                f"{layer.path}.{leaf}",
                shape,
                source_shape=source_shape,
                axes=tuple(range(len(source_shape))),
            )
    return entries


def layer_name(path: str) -> str:
    """Returns Keras's name of our layer."""
    if path.startswith("head."):
        return path
    path = path.removeprefix("backbone.")
    fixed = {"stem_conv": "conv1_conv", "stem_norm": "conv1_bn", "top": TOP}
    if path in fixed:
        return fixed[path]
    stage, block, layer = re.fullmatch(r"stage(\d)\.block(\d)\.(\w+)", path).groups()
    position = "0" if "shortcut" in layer else layer[-1]
    return f"conv{int(stage) + 1}_block{block}_{position}_{'conv' if 'conv' in layer else 'bn'}"


def backbone_names(kind: str) -> list[str]:
    """Returns the names of the convolutions or batch norms, in Keras's order."""
    return [layer_name(layer.path) for layer in layers(Structure("keras")) if layer.kind == kind]


def write_weights(values: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Writes a `.weights.h5` that `load_weights` of the same Keras model reads.

    A transfer model is laid out as the notebook builds it: ResNet50 nested in a model whose other
    layers with weights are the head's. Load before `compile`: there are no optimizer's variables.

    Args:
        values: {our name: array}, variant "keras".
        path: the file, which is overwritten.
    """
    import h5py  # 0.3 s, and only Keras's files need it

    structure = structure_of(values, "keras")
    counts: dict[tuple[str, str], int] = {}
    with h5py.File(path, "w") as file:
        for layer in layers(structure):
            nested = layer.path.startswith("backbone.")
            container = "layers/functional/layers" if nested else "layers"
            count = counts.get((container, layer.kind), 0)
            counts[container, layer.kind] = count + 1
            group = CLASSES[layer.kind] + (f"_{count}" if count else "")
            variables = file.create_group(f"{container}/{group}/vars")
            variables.attrs["name"] = layer_name(layer.path)
            for index, (leaf, shape) in enumerate(layer.parameters().items()):
                array = values[f"{layer.path}.{leaf}"]
                variables[str(index)] = array.reshape(_shape(layer, leaf, shape))


def _shape(layer: Layer, leaf: str, shape: Shape) -> Shape:
    return layer.kernel if leaf == "kernel" else shape
