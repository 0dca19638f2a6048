"""torchvision's and timm's names, Hugging Face's names, and how their tensors become ours.

torchvision/models/resnet.py; timm keeps its names. transformers/models/resnet/modeling_resnet.py.
All three are ResNet-50 v1.5: kernels OIHW, dense [out, in], no biases on convolutions.
"""

import re
from collections.abc import Mapping

import numpy as np

from cifar_jax.errors import UserError
from cifar_jax.pretrained.names import Entry, Layer, Structure, layers, printable

_LEAVES = {
    "conv": {"kernel": "weight"},
    "dense": {"kernel": "weight", "bias": "bias"},
    "norm": {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"},
}
_HUGGING_FACE_MODEL = "resnet."  # in front of the names of a model with a classifier
_IGNORED = ".num_batches_tracked"  # a counter of training steps
# What torch.nn.DataParallel, torch.compile and Lightning put in front of every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def table(structure: Structure, naming: str) -> dict[str, Entry]:
    """Returns {source name: entry} of every tensor.

    Args:
        structure: without head; neither format has one.
        naming: "torchvision" or "huggingface".
    """
    layer_name = {"torchvision": _torchvision, "huggingface": _hugging_face}[naming]
    entries = {}
    for layer in layers(structure):
        for leaf, shape in layer.parameters().items():
            name = f"{layer_name(layer.path)}.{_LEAVES[layer.kind][leaf]}"
            entries[name] = _entry(layer, leaf, shape)
    return entries


def without_wrappers(tensors: Mapping[str, np.ndarray]) -> tuple[Mapping[str, np.ndarray], str]:
    """Returns the tensors without the prefixes of wrappers that all names have, and those."""
    prefix = ""
    while wrapper := next((each for each in _WRAPPERS if _all_begin_with(each, tensors)), None):
        tensors = {name.removeprefix(wrapper): array for name, array in tensors.items()}
        prefix += wrapper
    return tensors, prefix


def _all_begin_with(prefix: str, tensors: Mapping[str, np.ndarray]) -> bool:
    return bool(tensors) and all(name.startswith(prefix) for name in tensors)


def canonical(
    tensors: Mapping[str, np.ndarray], path: str
) -> tuple[str, dict[str, np.ndarray], list[str]]:
    """Finds out whose names these are.

    Returns:
        The naming, the tensors by the names of `table`, and the names that are ignored.

    Raises:
        UserError: where the names are neither format's.
    """
    kept = {name: array for name, array in tensors.items() if not name.endswith(_IGNORED)}
    ignored = [name for name in tensors if name.endswith(_IGNORED)]
    if "conv1.weight" in kept:
        return "torchvision", kept, ignored
    stripped = {name.removeprefix(_HUGGING_FACE_MODEL): array for name, array in kept.items()}
    if "embedder.embedder.convolution.weight" in stripped and len(stripped) == len(kept):
        return "huggingface", stripped, ignored
    first = ", ".join(printable(name) for name in sorted(kept)[:3]) or "nothing"
    raise UserError(
        f"{path}: the names are neither torchvision's, timm's nor Hugging Face's of a ResNet-50: "
        f"expected conv1.weight or resnet.embedder..., found {first}"
    )


def classes(tensors: Mapping[str, np.ndarray]) -> int | None:
    """Returns the number of classes of the top of canonical tensors, None without top."""
    for name in ("fc.bias", "fc.weight", "classifier.1.bias", "classifier.1.weight"):
        if name in tensors:
            return tensors[name].shape[0] if tensors[name].ndim else 0
    return None


def _entry(layer: Layer, leaf: str, shape: tuple[int, ...]) -> Entry:
    if leaf != "kernel":
        return Entry(f"{layer.path}.{leaf}", shape, source_shape=shape, axes=(0,))
    axes = (2, 3, 1, 0) if layer.kind == "conv" else (1, 0)
    source_shape = tuple(layer.kernel[axes.index(axis)] for axis in range(len(axes)))
    return Entry(f"{layer.path}.{leaf}", shape, source_shape=source_shape, axes=axes)


def _torchvision(path: str) -> str:
    fixed = {"stem_conv": "conv1", "stem_norm": "bn1", "top": "fc"}
    if path in fixed:
        return fixed[path]
    stage, block, layer = re.fullmatch(r"stage(\d)\.block(\d)\.(\w+)", path).groups()
    layer = {"shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1"}.get(
        layer, layer.replace("norm", "bn")
    )
    return f"layer{stage}.{int(block) - 1}.{layer}"


def _hugging_face(path: str) -> str:
    fixed = {
        "stem_conv": "embedder.embedder.convolution",
        "stem_norm": "embedder.embedder.normalization",
        "top": "classifier.1",
    }
    if path in fixed:
        return fixed[path]
    stage, block, layer = re.fullmatch(r"stage(\d)\.block(\d)\.(\w+)", path).groups()
    position = "shortcut" if "shortcut" in layer else f"layer.{int(layer[-1]) - 1}"
    part = "convolution" if "conv" in layer else "normalization"
    return f"encoder.stages.{int(stage) - 1}.layers.{int(block) - 1}.{position}.{part}"
