"""A Keras model's `config.json` as one flat list of layers, and what it does to the pixels.

Nothing in the file is run: it is data, and of operations only the arithmetic listed here is known.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_MOST_CHARACTERS = 4 << 20  # a transfer model's has about 190,000

# Pixels [16, 1, 1, 3] that tell arithmetic apart.
PIXELS = np.linspace(0, 255, 48).reshape(16, 1, 1, 3) ** 2 / 255

_ARITHMETIC = {
    "Add": np.add,
    "Subtract": np.subtract,
    "Multiply": np.multiply,
    "TrueDivide": np.divide,
    "Divide": np.divide,
}
_TAKE_TRAINING = ("BatchNormalization", "Dropout")  # as the second argument


@dataclass(frozen=True)
class Layer:
    """One layer of the model or of a model nested in it."""

    name: str
    kind: str  # Keras's class
    config: dict[str, Any]
    inputs: tuple[str, ...]  # keys of the layers that it reads
    call: Any  # what an operation was called with; None: its one input


@dataclass(frozen=True)
class Graph:
    """A model, those nested in it dissolved."""

    layers: dict[str, Layer]  # by key, in the file's order: each comes after those that it reads
    output: str  # key of the layer that gives the model's output
    input_shape: Any  # as the file has it: [batch, height, width, channels], or None


def read_graph(text: str | bytes) -> Graph:
    """Returns the graph of a model.

    Args:
        text: JSON as Keras 3 writes it, or Keras 2.

    Raises:
        ValueError: where it is too long, no JSON, or holds no model with one input and one output.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"longer than {_MOST_CHARACTERS:,} characters")
    layers: dict[str, Layer] = {}
    try:
        model = json.loads(text)
        output = _add_model(model, "", path="", layers=layers)
        return Graph(layers, output, _input_shape(model))
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"no model of Keras ({type(error).__name__})") from error


def pixels_after(layers: Mapping[str, Layer]) -> dict[str, np.ndarray]:
    """Returns {key: values} of `PIXELS` after each of some layers; "" are the pixels themselves.

    Raises:
        ValueError: where one of them is no arithmetic on pixels that is known here.
    """
    found = {"": PIXELS}
    for key, layer in layers.items():
        try:
            with np.errstate(all="ignore"):
                result = _after(layer, [found[name] for name in layer.inputs])
            found[key] = np.asarray(result, np.float64)
            if found[key].size > PIXELS.size:
                raise ValueError("more numbers than pixels")
        except (KeyError, TypeError, IndexError, ValueError, ArithmeticError) as error:
            raise ValueError(f"{layer.name} ({layer.kind}) stands in front of ResNet50") from error
    return found


def _add_model(model: dict, source: str, *, path: str, layers: dict[str, Layer]) -> str:
    """Adds a model's layers; returns the key of the one that gives its output."""
    config = model["config"]
    if model["class_name"] == "Sequential":
        for layer in config["layers"]:
            source = _add(layer, (source,), path=path, layers=layers)
        return source
    pictures = sum(layer["class_name"] == "InputLayer" for layer in config["layers"])
    if pictures != 1:
        raise ValueError(f"{pictures} inputs, expected one")
    keys: dict[str, str] = {}
    for layer in config["layers"]:
        name, nodes = layer["config"]["name"], layer["inbound_nodes"]
        if len(nodes) > 1:
            raise ValueError(f"{name} is used {len(nodes)} times")
        for value in _training(layer):
            if value not in (None, False, 0):
                raise ValueError(f"{name} is called with training={value}")
        inputs = tuple(keys[reference] for reference in _references(nodes))
        keys[name] = _add(layer, inputs or (source,), path=path, layers=layers)
    outputs = [keys[name] for name in _references(config["output_layers"])]
    if len(outputs) != 1:
        raise ValueError(f"{len(outputs)} outputs, expected one")
    return outputs[0]


def _add(layer: dict, inputs: tuple[str, ...], *, path: str, layers: dict[str, Layer]) -> str:
    kind, config = layer["class_name"], layer["config"]
    if kind == "InputLayer":
        return inputs[0]
    key = f"{path}/{config['name']}"
    kind = layer.get("registered_name") or kind  # a class of one's own may be called Conv2D
    if "layers" in config:
        return _add_model(layer, inputs[0], path=key, layers=layers)
    if key in layers:
        raise ValueError(f"two layers are called {key}")
    nodes = layer.get("inbound_nodes") or [None]
    call = nodes[0]["args"] if isinstance(nodes[0], dict) else None
    layers[key] = Layer(str(config["name"]), str(kind), config, inputs, call)
    return key


def _input_shape(model: dict) -> Any:
    """Returns the shape of a model's input; None where nothing is said."""
    configs = [layer["config"] for layer in model["config"]["layers"]]
    spellings = ("batch_shape", "batch_input_shape")  # Keras 3's and 2's
    return next((config[key] for config in configs for key in spellings if key in config), None)


def _training(layer: dict) -> Iterator[Any]:
    """Yields what a layer is called with as `training`, by name or by place."""
    nodes = layer["inbound_nodes"]
    yield from _named("training", nodes)
    if layer["class_name"] in _TAKE_TRAINING or "layers" in layer["config"]:
        for node in nodes:
            if isinstance(node, dict):  # Keras 2 has names alone
                yield from node["args"][1:]


def _named(name: str, value: Any) -> Iterator[Any]:
    """Yields every value of that name, wherever a release has its kwargs."""
    if isinstance(value, dict):
        if name in value:
            yield value[name]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _named(name, item)


def _references(value: Any) -> Iterator[str]:
    """Yields the names of layers: Keras 3 and 2 both write lists [name, number, number, ...]."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if [type(item) for item in value[:3]] == [str, int, int]:
            yield value[0]
        else:
            for item in value:
                yield from _references(item)


def _after(layer: Layer, inputs: list[np.ndarray]) -> Any:
    if layer.kind == "UpSampling2D":  # commutes with arithmetic on pixels
        (pixels,) = inputs
        return pixels
    if layer.kind == "Rescaling":
        (pixels,) = inputs
        return pixels * _constant(layer.config["scale"]) + _constant(layer.config["offset"])
    tensors = iter(inputs)
    return _operation(layer, *(_argument(value, tensors) for value in layer.call))


def _operation(layer: Layer, first: Any, second: Any = None) -> Any:
    if layer.kind == "Stack":
        return np.stack(first, layer.config["axis"])
    if layer.kind == "GetItem":
        if any(type(item) not in (int, slice, type(...)) for item in second):
            raise ValueError("an index of another kind")
        return first[second]
    if any(not isinstance(operand, np.ndarray | int | float) for operand in (first, second)):
        raise ValueError("no numbers")
    return _ARITHMETIC[layer.kind](first, second)


def _argument(value: Any, tensors: Iterator[np.ndarray]) -> Any:
    """Returns what an argument of an operation means."""
    if isinstance(value, list):
        return tuple([_argument(item, tensors) for item in value])
    if not isinstance(value, dict):
        return value
    config = value["config"]
    match value["class_name"]:
        case "__keras_tensor__":
            return next(tensors, None)
        case "__tensor__" | "__numpy__":
            return _constant(config["value"])
        case "__ellipsis__":
            return ...
        case "__slice__":
            return slice(config["start"], config["stop"], config["step"])
        case other:
            raise ValueError(other)


def _constant(value: Any) -> np.ndarray:
    array = np.array(value, np.float64)
    if array.size not in (1, 3) or array.shape[-1:] not in ((), (1,), (3,)):
        raise ValueError("neither one number for all channels nor one for each")
    return array
