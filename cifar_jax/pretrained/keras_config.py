"""What a Keras model computes, by its `config.json`, against what our network computes.

Names and shapes of tensors show neither activations, strides, padding and pooling nor epsilons.
keras/src/applications/resnet.py builds the layers that are expected here.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cifar_jax.models.transfer import INTERPOLATIONS, PREPROCESSINGS, UPSAMPLINGS
from cifar_jax.pretrained.keras_graph import PIXELS, Graph, Layer, pixels_after, read_graph
from cifar_jax.pretrained.names import STAGES, Structure, printable

_FIRST, _LAST = "conv1_pad", "conv5_block3_out"
_SIDE = 32  # pixels: of CIFAR-10's pictures, and of what ResNet50 makes one pixel of
# What every layer of a kind has; a tuple lists spellings of one value, Keras 2's last.
_LAYOUT = {"data_format": "channels_last"}
_NORM = {"momentum": 0.99, "center": True, "scale": True, "renorm": False}
_FACTS: dict[str, dict[str, Any]] = {
    "Activation": {"activation": "relu"},
    "Add": {},
    "BatchNormalization": {**_NORM, "epsilon": 1.001e-5, "axis": (3, -1, [3])},
    "Conv2D": {"dilation_rate": [1, 1], "groups": 1, "activation": "linear", "use_bias": True}
    | _LAYOUT,
    "MaxPooling2D": {"pool_size": [3, 3], "strides": [2, 2], "padding": "valid"} | _LAYOUT,
    "ZeroPadding2D": _LAYOUT,
}
_HEAD_FACTS = {
    "BatchNormalization": {**_NORM, "epsilon": 1e-3, "axis": (-1, 1, [1])},
    "Dense": {"use_bias": True},
    "Flatten": _LAYOUT,
    "GlobalAveragePooling2D": {"keepdims": False} | _LAYOUT,
}
_LATER = {"renorm": False, "keepdims": False}  # earlier releases had no choice
_HEADS = {
    "flatten": "Flatten BatchNormalization Dense relu Dropout BatchNormalization Dense relu "
    "Dropout BatchNormalization Dense",
    "pooled": "GlobalAveragePooling2D Dropout Dense",
}


@dataclass
class Network:
    """What was compared."""

    differences: list[str] = field(default_factory=list)
    # Fields of `config.model` with which ours is the same function, as far as the model says.
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Expected:
    """A layer of ResNet50."""

    kind: str
    inputs: list[str]
    facts: dict[str, Any]


def compare(text: str | bytes, structure: Structure) -> Network:
    """Compares a model with ours.

    Args:
        text: its `config.json`.
        structure: what its tensors are.

    Returns:
        Every difference, and the settings. What only training knows (frozen layers, regularizers,
        initial values, the optimizer) is not compared.
    """
    try:
        return _compare(read_graph(text), structure)
    except (ValueError, RecursionError) as error:
        return Network([printable(str(error))])


def _compare(graph: Graph, structure: Structure) -> Network:
    network, backbone, layers = Network(), _backbone(), graph.layers
    network.differences += _backbone_differences(layers, backbone)
    keys = {layer.name: key for key, layer in layers.items()}
    if _FIRST in keys and _LAST in keys:
        order = list(layers)
        front = order[: order.index(keys[_FIRST])]
        behind = [key for key in order[len(front) :] if layers[key].name not in backbone]
        _compare_pixels({key: layers[key] for key in front}, layers[keys[_FIRST]], into=network)
        _compare_upsampling([layers[key] for key in front], structure, into=network)
        _compare_input(graph.input_shape, structure, into=network)
        _compare_head(
            {key: layers[key] for key in behind}, keys[_LAST], structure=structure, into=network
        )
        last = behind[-1] if behind else keys[_LAST]
        if graph.output != last:
            given, wanted = (printable(key[1:]) for key in (graph.output, last))
            network.differences.append(f"output of {given or 'the input'}, expected of {wanted}")
    return network


def _backbone_differences(
    layers: Mapping[str, Layer], expected: Mapping[str, _Expected]
) -> Iterator[str]:
    found: dict[str, Layer] = {}
    for layer in layers.values():
        if layer.name in expected and layer.name in found:
            yield f"{layer.name}: two layers of this name"
        found[layer.name] = layer
    for name, want in expected.items():
        if name not in found:
            yield f"{name}: missing"
            continue
        layer = found[name]
        inputs = sorted(layers[key].name for key in layer.inputs if key)
        if layer.kind != want.kind:
            yield f"{name}: {printable(layer.kind)}, expected {want.kind}"
        elif name != _FIRST and inputs != sorted(want.inputs):
            read, wanted = printable(" and ".join(inputs)), " and ".join(want.inputs)
            yield f"{name}: reads {read}, expected {wanted}"
        else:
            yield from _fact_differences(layer, want.facts)


def _fact_differences(layer: Layer, facts: Mapping[str, Any]) -> Iterator[str]:
    for key, want in facts.items():
        spellings = want if isinstance(want, tuple) else (want,)
        found = layer.config.get(key, _LATER.get(key))
        if found not in spellings:
            yield (
                f"{printable(layer.name)}: {key} {printable(str(found))}, expected {spellings[0]}"
            )


def _compare_pixels(front: Mapping[str, Layer], first: Layer, *, into: Network) -> None:
    try:
        found = pixels_after(front)[first.inputs[0]]
    except ValueError as error:
        into.differences.append(printable(str(error)))
        return
    if np.array_equal(found, PIXELS):
        return  # preprocessed outside the model, or not at all
    for name, (reverses, mean, deviation) in PREPROCESSINGS.items():
        expected = ((PIXELS[..., ::-1] if reverses else PIXELS) - mean) / deviation
        # Keras keeps its constants in float32.
        if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-6, atol=1e-5):
            into.settings["preprocessing"] = name
            return
    into.differences.append(
        f"preprocessing: none of {', '.join(PREPROCESSINGS)} (subtracted, divided or order changed)"
    )


def _compare_upsampling(front: list[Layer], structure: Structure, *, into: Network) -> None:
    found = [layer for layer in front if layer.kind == "UpSampling2D"]
    if not found:
        return
    sizes = [layer.config.get("size") for layer in found]
    factors = [size[0] for size in sizes if size in ([1, 1], [2, 2], [4, 4], [8, 8])]
    factor = math.prod(factors)
    if len(factors) < len(sizes) or factor not in UPSAMPLINGS:
        wanted = ", ".join(map(str, UPSAMPLINGS))
        into.differences.append(
            f"upsampling by {printable(str(sizes))}, expected one of {wanted} in all, each way"
        )
    elif structure.tuned_head == "flatten" and factor != structure.head.side:
        into.differences.append(
            f"upsampling by {factor}, the head is made for {structure.head.side}"
        )
    kinds = [layer.config.get("interpolation") for layer in found]
    if kinds[0] not in INTERPOLATIONS or (len(kinds) > 1 and set(map(str, kinds)) != {"nearest"}):
        into.differences.append(
            f"interpolation {printable(str(kinds))}, expected nearest, or bilinear in one layer"
        )
    for layer in found:
        into.differences += _fact_differences(layer, _LAYOUT)
    into.settings |= {"upsampling": factor, "interpolation": kinds[0]}


def _compare_input(shape: Any, structure: Structure, *, into: Network) -> None:
    """Compares the size of the pictures: what is not upsampled in the model comes upsampled."""
    if "upsampling" in into.settings:
        pixels = _SIDE
    elif structure.tuned_head == "flatten":
        pixels = _SIDE * structure.head.side
    else:
        return
    expected = [pixels, pixels, 3]
    sizes = shape[1:] if isinstance(shape, list) else []
    filled = [want if size is None else size for size, want in zip(sizes, expected, strict=False)]
    if shape is not None and (filled != expected or len(sizes) > len(expected)):
        into.differences.append(f"input {printable(str(shape))}, expected {[None, *expected]}")


def _compare_head(
    behind: Mapping[str, Layer], source: str, *, structure: Structure, into: Network
) -> None:
    kinds = []
    for key, layer in behind.items():
        if layer.inputs != (source,):
            into.differences.append(f"{printable(layer.name)}: is not in line behind ResNet50")
        source = key
        if layer.kind != "Activation":
            kinds.append(layer.kind)
        if layer.kind in ("Activation", "Dense") and layer.config.get("activation") != "linear":
            kinds.append(str(layer.config.get("activation")))
    if kinds[-1:] == ["softmax"]:  # ours end in logits
        kinds.pop()
    known = _known_heads(structure)
    if kinds not in known:
        found = printable(" ".join(kinds) or "nothing")
        into.differences.append(f"behind ResNet50: {found}; expected {' '.join(known[0])}")
        return
    for layer in behind.values():
        into.differences += _fact_differences(layer, _HEAD_FACTS.get(layer.kind, {}))
    if structure.head:
        rates = [layer.config.get("rate") for layer in behind.values() if layer.kind == "Dropout"]
        if any(type(rate) not in (int, float) or rate != rates[0] for rate in rates):
            into.differences.append(f"dropout rates {printable(str(rates))}, expected one for all")
        else:
            into.settings["dropout"] = rates[0] if rates else 0.0


def _known_heads(structure: Structure) -> list[list[str]]:
    """Returns the layers that may stand behind the backbone, by kind or activation."""
    if structure.head is None and structure.classes is None:
        return [[], ["GlobalAveragePooling2D"]]
    kinds = _HEADS[structure.head.kind if structure.head else "pooled"].split()
    return [kinds, [kind for kind in kinds if kind != "Dropout"]]


def _backbone() -> dict[str, _Expected]:
    """Returns every layer of ResNet50 from the first padding to the last addition."""
    found: dict[str, _Expected] = {}

    def add(name: str, kind: str, *inputs: str, **facts: Any) -> str:
        found[name] = _Expected(kind, list(inputs), _FACTS[kind] | facts)
        return name

    def conv_norm(name: str, source: str, *, stride: int = 1, padding: str = "valid") -> str:
        strides = [stride, stride]
        conv = add(f"{name}_conv", "Conv2D", source, strides=strides, padding=padding)
        return add(f"{name}_bn", "BatchNormalization", conv)

    x = add(_FIRST, "ZeroPadding2D", padding=[[3, 3], [3, 3]])
    x = add("conv1_relu", "Activation", conv_norm("conv1", x, stride=2))
    x = add("pool1_pad", "ZeroPadding2D", x, padding=[[1, 1], [1, 1]])
    x = add("pool1_pool", "MaxPooling2D", x)
    for stage, (_width, blocks) in enumerate(STAGES, 2):
        for block in range(1, blocks + 1):
            name = f"conv{stage}_block{block}"
            stride = 2 if block == 1 and stage > 2 else 1
            shortcut = conv_norm(f"{name}_0", x, stride=stride) if block == 1 else x
            y = add(f"{name}_1_relu", "Activation", conv_norm(f"{name}_1", x, stride=stride))
            y = conv_norm(f"{name}_2", y, padding="same")
            y = conv_norm(f"{name}_3", add(f"{name}_2_relu", "Activation", y))
            x = add(f"{name}_out", "Activation", add(f"{name}_add", "Add", shortcut, y))
    return found
