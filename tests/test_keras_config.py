"""What Keras says its models compute: real models are ours, and each changed fact is told."""

import copy
import json
import re
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from cifar_jax.errors import UserError
from cifar_jax.pretrained import certificate, port
from cifar_jax.pretrained.keras_config import compare
from cifar_jax.pretrained.names import Head, Structure
from tests import port_sources

# Keras calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

_FLATTEN = Structure("keras", head=Head("flatten", features=4 * 2048, classes=10))
_LARGE = Structure("keras", head=Head("flatten", features=64 * 2048, classes=10))
_POOLED = Structure("keras", head=Head("pooled", features=2048, classes=10))
_NO_TOP, _TOP = Structure("keras"), Structure("keras", classes=1000)


def _resnet50(size: int, **options):
    return keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(size, size, 3), **options
    )


@pytest.fixture(scope="module")
def small():
    return _resnet50(64)


@pytest.fixture(scope="module")
def large():
    return _resnet50(256)


def _flatten_head(dropout: float | None = 0.5):
    drop = [[layers.Dropout(dropout, name=f"dropout{i}")] if dropout else [] for i in (1, 2)]
    return [
        layers.Flatten(name="flatten"),
        layers.BatchNormalization(name="norm1"),
        layers.Dense(128, activation="relu", name="dense1"),
        *drop[0],
        layers.BatchNormalization(name="norm2"),
        layers.Dense(64, activation="relu", name="dense2"),
        *drop[1],
        layers.BatchNormalization(name="norm3"),
        layers.Dense(10, activation="softmax", name="logits"),
    ]


def _sequential(*before_and_backbone, head=None):
    head = _flatten_head() if head is None else head
    pictures = layers.Input((32, 32, 3), name="pictures")
    return keras.Sequential([pictures, *before_and_backbone, *head])


def _functional(backbone, preprocess, **call):
    images = layers.Input((32, 32, 3))
    x = backbone(preprocess(layers.UpSampling2D(2)(images)), **call)
    for layer in _flatten_head():
        x = layer(x)
    return keras.Model(images, x)


def _caffe_by_hand(x):
    return x[..., ::-1] - np.array([103.939, 116.779, 123.68], np.float32)


def _flattened(backbone):
    x = backbone.output
    for layer in _flatten_head():
        x = layer(x)
    return keras.Model(backbone.input, x)


def _pooled_head():
    return [layers.GlobalAveragePooling2D(), layers.Dropout(0.2), layers.Dense(10)]


def _separate_activations():
    head = _flatten_head()
    for position in (8, 5, 2):
        activation = head[position].get_config()["activation"]
        head[position].activation = keras.activations.linear
        head.insert(position + 1, layers.Activation(activation))
    return head


_NEAREST = {"upsampling": 2, "interpolation": "nearest"}
_UP = layers.UpSampling2D
_modes = keras.applications.imagenet_utils.preprocess_input

_SAME = {  # a model that is ours, its structure, and what it says of the settings
    "x2": (
        lambda small, large: _sequential(_UP(2), small),
        _FLATTEN,
        _NEAREST | {"dropout": 0.5},
    ),
    "x2x2x2, rescaled": (
        lambda small, large: _sequential(layers.Rescaling(1 / 255), _UP(2), _UP(2), _UP(2), large),
        _LARGE,
        {"preprocessing": "unit", "upsampling": 8, "interpolation": "nearest", "dropout": 0.5},
    ),
    "x8": (
        lambda small, large: _sequential(_UP((8, 8)), large, head=_flatten_head(dropout=None)),
        _LARGE,
        {"upsampling": 8, "interpolation": "nearest", "dropout": 0.0},
    ),
    "bilinear": (
        lambda small, large: _sequential(_UP(2, interpolation="bilinear"), small),
        _FLATTEN,
        {"upsampling": 2, "interpolation": "bilinear", "dropout": 0.5},
    ),
    "separate activations": (
        lambda small, large: _sequential(_UP(2), small, head=_separate_activations()),
        _FLATTEN,
        _NEAREST | {"dropout": 0.5},
    ),
    "caffe": (
        lambda small, large: _functional(small, keras.applications.resnet.preprocess_input),
        _FLATTEN,
        _NEAREST | {"preprocessing": "keras", "dropout": 0.5},
    ),
    "caffe by hand": (
        lambda small, large: _functional(small, _caffe_by_hand, training=False),
        _FLATTEN,
        _NEAREST | {"preprocessing": "keras", "dropout": 0.5},
    ),
    "torch": (
        lambda small, large: _functional(small, lambda x: _modes(x, mode="torch")),
        _FLATTEN,
        _NEAREST | {"preprocessing": "torchvision", "dropout": 0.5},
    ),
    "by 255": (
        lambda small, large: _functional(small, lambda x: x / 255),
        _FLATTEN,
        _NEAREST | {"preprocessing": "unit", "dropout": 0.5},
    ),
    "grown onto the backbone": (
        lambda small, large: _flattened(small),
        _FLATTEN,
        {"dropout": 0.5},
    ),
    "any size": (
        lambda small, large: keras.Sequential(
            [layers.Input((None, None, 3)), _UP(2), _resnet50(None), *_pooled_head()]
        ),
        _POOLED,
        _NEAREST | {"dropout": 0.2},
    ),
    "pooled": (
        lambda small, large: _sequential(_UP(2), small, head=_pooled_head()),
        _POOLED,
        _NEAREST | {"dropout": 0.2},
    ),
    "pooled by the backbone": (
        lambda small, large: _sequential(
            _UP(2), _resnet50(64, pooling="avg"), head=[layers.Dense(10)]
        ),
        _POOLED,
        _NEAREST | {"dropout": 0.0},
    ),
    "backbone": (lambda small, large: small, _NO_TOP, {}),
    "top": (lambda small, large: keras.applications.ResNet50(weights=None), _TOP, {}),
}


def _as_keras_2(value):
    """Respells a functional model's JSON as Keras 2 writes it."""
    if isinstance(value, list):
        return [_as_keras_2(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: _as_keras_2(item) for key, item in value.items() if key != "renorm"}
    if value.get("inbound_nodes"):
        history = re.findall(r'"keras_history": (\[[^]]*\])', json.dumps(value["inbound_nodes"]))
        changed["inbound_nodes"] = [[[*json.loads(item), {}] for item in history]]
    if "batch_shape" in value:
        changed["batch_input_shape"] = changed.pop("batch_shape")
    if isinstance(value.get("axis"), int):
        changed["axis"] = [abs(value["axis"])]
    return changed


@pytest.mark.parametrize("name", _SAME)
def test_real_models_are_ours(small, large, name):
    build, structure, settings = _SAME[name]
    text = build(small, large).to_json()
    network = compare(text, structure)
    assert network.differences == [] and network.settings == settings
    if "preprocessing" not in settings:  # arithmetic has another form there
        old = json.dumps(_as_keras_2(json.loads(text)))
        network = compare(old, structure)
        assert network.differences == [] and network.settings == settings
        trains = old.replace('["conv1_pad", 0, 0, {}]', '["conv1_pad", 0, 0, {"training": true}]')
        told = compare(trains, structure).differences
        assert told == ["conv1_conv is called with training=True"]


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """A whole transfer model as Keras saves it, with `/255` inside, and the model."""
    model = _sequential(layers.Rescaling(1 / 255, name="rescale"), _UP(2, name="up"), small)
    port_sources.randomize_keras(model)
    path = tmp_path_factory.mktemp("keras") / "a.keras"
    model.save(path)
    return path, model


def _layers(model: dict):
    for layer in model["config"].get("layers", ()):
        yield layer
        yield from _layers(layer)


def _layer(model: dict, name: str) -> dict:
    return next(layer for layer in _layers(model) if layer["config"]["name"] == name)


def _set(name: str, /, **facts):
    """Changes what a layer's configuration says, or with `class_name` its class."""

    def change(model: dict) -> None:
        layer = _layer(model, name)
        layer["class_name"] = facts.get("class_name", layer["class_name"])
        assert facts.keys() <= layer["config"].keys() | {"class_name"}
        layer["config"] |= {key: value for key, value in facts.items() if key != "class_name"}

    return change


def _reads(name: str, old: str, new: str):
    def change(model: dict) -> None:
        nodes = json.dumps(_layer(model, name)["inbound_nodes"])
        assert f'["{old}", 0, 0]' in nodes
        changed = json.loads(nodes.replace(f'["{old}", 0, 0]', f'["{new}", 0, 0]'))
        _layer(model, name)["inbound_nodes"] = changed

    return change


def _node(name: str, change_nodes):
    return lambda model: change_nodes(_layer(model, name)["inbound_nodes"])


def _insert(position: int, class_name: str, **config):
    def change(model: dict) -> None:
        layer = {"class_name": class_name, "config": {"name": "new", **config}}
        model["config"]["layers"].insert(position, layer)

    return change


def _exchange(first: int, second: int):
    def change(model: dict) -> None:
        found = model["config"]["layers"]
        found[first], found[second] = found[second], found[first]

    return change


def _both(*changes):
    return lambda model: [change(model) for change in changes]


# Layers: input, rescale, up, resnet50, flatten, norm1, dense1, dropout1, norm2, dense2, ...
_CHANGES = {
    "activation": (
        _set("conv1_relu", activation="silu"),
        "conv1_relu: activation silu, expected relu",
    ),
    "activation of a block": (
        _set("conv4_block6_out", activation="linear"),
        "conv4_block6_out: activation linear, expected relu",
    ),
    "activation with parameters": (
        _set("conv2_block1_1_relu", activation={"class_name": "ReLU", "config": {"max_value": 6}}),
        "conv2_block1_1_relu: activation {'class_name': 'ReLU',",
    ),
    "activation in a convolution": (
        _set("conv1_conv", activation="relu"),
        "conv1_conv: activation relu, expected linear",
    ),
    "average pooling": (
        _set("pool1_pool", class_name="AveragePooling2D"),
        "pool1_pool: AveragePooling2D, expected MaxPooling2D",
    ),
    "pooling window": (_set("pool1_pool", pool_size=[2, 2]), "pool1_pool: pool_size [2, 2]"),
    "pooling stride": (_set("pool1_pool", strides=[1, 1]), "pool1_pool: strides [1, 1]"),
    "pooling padding": (_set("pool1_pool", padding="same"), "pool1_pool: padding same"),
    "stride": (
        _set("conv3_block1_1_conv", strides=[1, 1]),
        "conv3_block1_1_conv: strides [1, 1], expected [2, 2]",
    ),
    "stride of the shortcut": (
        _set("conv5_block1_0_conv", strides=[1, 1]),
        "conv5_block1_0_conv: strides [1, 1], expected [2, 2]",
    ),
    "padding": (
        _set("conv2_block1_2_conv", padding="valid"),
        "conv2_block1_2_conv: padding valid, expected same",
    ),
    "explicit padding": (
        _set("conv1_pad", padding=[[2, 3], [2, 3]]),
        "conv1_pad: padding [[2, 3], [2, 3]], expected [[3, 3], [3, 3]]",
    ),
    "dilation": (_set("conv5_block2_2_conv", dilation_rate=[2, 2]), "dilation_rate [2, 2]"),
    "layout": (_set("conv1_conv", data_format="channels_first"), "conv1_conv: data_format"),
    "epsilon": (
        _set("conv5_block3_3_bn", epsilon=1e-3),
        "conv5_block3_3_bn: epsilon 0.001, expected 1.001e-05",
    ),
    "momentum": (_set("conv1_bn", momentum=0.9), "conv1_bn: momentum 0.9, expected 0.99"),
    "axis": (_set("conv1_bn", axis=1), "conv1_bn: axis 1, expected 3"),
    "center": (_set("conv1_bn", center=False), "conv1_bn: center False, expected True"),
    "scale": (_set("conv1_bn", scale=False), "conv1_bn: scale False, expected True"),
    "renorm": (_set("conv1_bn", renorm=True), "conv1_bn: renorm True, expected False"),
    "sum": (
        _set("conv2_block1_add", class_name="Multiply"),
        "conv2_block1_add: Multiply, expected Add",
    ),
    "shortcut": (
        _reads("conv2_block2_add", "conv2_block1_out", "conv2_block1_add"),
        "conv2_block2_add: reads conv2_block1_add and conv2_block2_3_bn, expected "
        "conv2_block1_out and conv2_block2_3_bn",
    ),
    "layer's name": (_set("pool1_pad", name="pad"), "no model of Keras (KeyError)"),
    "batch statistics": (
        _node("conv1_bn", lambda nodes: nodes[0]["kwargs"].update(training=True)),
        "conv1_bn is called with training=True",
    ),
    "class of one's own": (
        lambda model: _layer(model, "conv1_conv").update(registered_name="mine>Conv2D"),
        "conv1_conv: mine>Conv2D, expected Conv2D",
    ),
    "used twice": (
        _node("conv1_bn", lambda nodes: nodes.append(nodes[0])),
        "conv1_bn is used 2 times",
    ),
    "head's activation": (
        _set("dense1", activation="silu"),
        "behind ResNet50: Flatten BatchNormalization Dense silu Dropout",
    ),
    "head's last activation": (_set("logits", activation="sigmoid"), "Dense sigmoid; expected"),
    "head's epsilon": (_set("norm2", epsilon=1e-5), "norm2: epsilon 1e-05, expected 0.001"),
    "head's axis": (_set("norm2", axis=2), "norm2: axis 2, expected -1"),
    "head's bias": (_set("dense2", use_bias=False), "dense2: use_bias False, expected True"),
    "head's order": (_exchange(8, 7), "Dense relu BatchNormalization Dropout Dense relu"),
    "head's pooling": (
        _set("flatten", class_name="GlobalMaxPooling2D"),
        "behind ResNet50: GlobalMaxPooling2D BatchNormalization",
    ),
    "head's layout": (_set("flatten", data_format="channels_first"), "flatten: data_format"),
    "one dropout more": (_insert(5, "Dropout", rate=0.5), "Flatten Dropout BatchNormalization"),
    "another layer": (_insert(5, "GaussianNoise"), "Flatten GaussianNoise BatchNormalization"),
    "dropout's rates": (_set("dropout2", rate=0.3), "dropout rates [0.5, 0.3], expected one"),
    "interpolation": (
        _set("up", interpolation="bicubic"),
        "interpolation ['bicubic'], expected nearest, or bilinear in one layer",
    ),
    "interpolation in two layers": (
        _both(
            _set("up", interpolation="bilinear"),
            _insert(
                2,
                "UpSampling2D",
                size=[1, 1],
                interpolation="bilinear",
                data_format="channels_last",
            ),
        ),
        "interpolation ['bilinear', 'bilinear'], expected nearest",
    ),
    "upsampling": (_set("up", size=[4, 4]), "upsampling by 4, the head is made for 2"),
    "upsampling of one side": (_set("up", size=[2, 4]), "upsampling by [[2, 4]], expected one of"),
    "rescaling": (_set("rescale", scale=1 / 127.5), "preprocessing: none of keras, torchvision"),
    "offset": (_set("rescale", offset=-1.0), "preprocessing: none of keras, torchvision, unit"),
    "a layer in front": (_insert(1, "Lambda"), "new (Lambda) stands in front of ResNet50"),
    "other pictures": (
        _set("pictures", batch_shape=[None, 64, 64, 3]),
        "input [None, 64, 64, 3], expected [None, 32, 32, 3]",
    ),
    "grey pictures": (
        _set("pictures", batch_shape=[None, 32, 32, 1]),
        "expected [None, 32, 32, 3]",
    ),
    "no pictures": (_set("pictures", batch_shape="\n"), r"input '\n', expected [None, 32, 32, 3]"),
}


def _config(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("config.json"))


@pytest.mark.parametrize("name", _CHANGES)
def test_every_changed_fact_is_told(saved, name):
    model = _config(saved[0])
    assert compare(json.dumps(model), _FLATTEN).differences == []
    change, message = _CHANGES[name]
    change(model)
    (line,) = compare(json.dumps(model), _FLATTEN).differences
    assert message in line


def test_a_model_that_is_not_made_for_its_pictures_is_told(small):
    """The same layers at 64 pixels are another function, whose maps are averaged as well."""
    pooled = keras.Sequential([layers.Input((64, 64, 3)), _UP(2), _resnet50(128), *_pooled_head()])
    (line,) = compare(pooled.to_json(), _POOLED).differences
    assert line == "input [None, 64, 64, 3], expected [None, 32, 32, 3]"
    # A backbone at 50 pixels gives maps of 2 x 2, as it does at 64.
    grown = _flattened(_resnet50(50)).to_json()
    for text in (grown, json.dumps(_as_keras_2(json.loads(grown)))):
        (line,) = compare(text, _FLATTEN).differences
        assert line == "input [None, 50, 50, 3], expected [None, 64, 64, 3]"


@pytest.mark.parametrize("output", ["norm2", "conv5_block3_out", "pictures"])
def test_a_model_that_gives_another_layers_output_is_told(small, output):
    model = json.loads(_flattened(small).to_json())
    model["config"]["output_layers"] = [output.replace("pictures", small.layers[0].name), 0, 0]
    (line,) = compare(json.dumps(model), _FLATTEN).differences
    output = output.replace("pictures", "the input")
    assert line == f"output of {output}, expected of logits"


def test_a_model_of_two_pictures_is_told(small):
    mean = layers.Average()
    pictures = [layers.Input((64, 64, 3)) for _ in range(2)]
    model = keras.Model(pictures, _flattened(small)(mean(pictures)))
    (line,) = compare(model.to_json(), _FLATTEN).differences
    assert line == "2 inputs, expected one"


_IN_TRAINING = (True, 1, "no", [], {"class_name": "__tensor__"})


@pytest.mark.parametrize("name", ["conv1_bn", "dropout1", "resnet50"])
def test_a_call_in_training_mode_is_told(small, name):
    model = json.loads(_functional(small, lambda x: x / 255).to_json())
    (call,) = _layer(model, name)["inbound_nodes"]
    arguments, keywords = call["args"], call["kwargs"]
    for value in (None, False, 0, *_IN_TRAINING):
        by_name = {"args": arguments, "kwargs": keywords | {"training": value}}
        by_place = {"args": [*arguments, value], "kwargs": keywords}
        told = [f"{name} is called with training={value}"] if value in _IN_TRAINING else []
        for said in (by_name, by_place):
            call.update(said)
            assert compare(json.dumps(model), _FLATTEN).differences == told


_DEEP = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\xfa", "codec can't decode"),
        ("{}", r"no model of Keras \(KeyError\)"),
        ("[1]", r"no model of Keras \(TypeError\)"),
        ('{"class_name": "Sequential", "config": {"layers": [3]}}', r"\(TypeError\)"),
        ('{"class_name": "Model", "config": {"layers": [], "output_layers": []}}', "0 inputs"),
        ('{"class_name": "Sequential", "config": {"layers": []}}', "conv1_pad: missing"),
        ("[" * 100_000, r"no model of Keras \(RecursionError\)|maximum recursion"),
        (" " * (4 << 20) + "{}", "longer than 4,194,304 characters"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_other_json_is_told(text, message):
    lines = compare(text, _FLATTEN).differences
    assert re.search(message, lines[0]) and all("\n" not in line for line in lines)


_HOSTILE_ARITHMETIC = {
    "outer product": ("Multiply", [[[1]] * 1000, [[1] * 1000]]),
    "long text": ("Multiply", ["a", 10**9]),
    "writes into an argument": ("Add", [1.0, "TENSOR", "TENSOR"]),
    "many channels": ("Stack", [["TENSOR"] * 1000]),
    "outer index": ("GetItem", ["TENSOR", [[[0]] * 1000, [[0] * 1000]]]),
    "tensor as an index": ("GetItem", ["TENSOR", ["TENSOR"]]),
    "endless number": ("Multiply", ["TENSOR", 10**4000]),
    "endless numbers": ("Multiply", [10**400, 10**400]),
    "overflow": ("Multiply", ["TENSOR", 10**308]),
    "no numbers": ("Stack", [[{"class_name": "__ellipsis__", "config": {}}]]),
    "no pixels": ("GetItem", [[1, 2], [0]]),
    "nothing": ("Add", []),
    "other class": ("Add", ["TENSOR", {"class_name": "function", "config": "os.system"}]),
    "long constant": (
        "Add",
        ["TENSOR", {"class_name": "__tensor__", "config": {"value": [[1.0] * 3] * 3}}],
    ),
    "deep": ("Add", ["TENSOR", json.loads(_DEEP)]),
}


@pytest.mark.parametrize("name", _HOSTILE_ARITHMETIC)
def test_hostile_arithmetic_is_refused(small, name):
    model = json.loads(_functional(small, lambda x: x / 255).to_json())
    (layer,) = (layer for layer in _layers(model) if layer["class_name"] == "TrueDivide")
    tensor = layer["inbound_nodes"][0]["args"][0]
    layer["class_name"], arguments = _HOSTILE_ARITHMETIC[name]
    layer["config"]["axis"] = -1
    text = json.dumps(arguments).replace('"TENSOR"', json.dumps(tensor))
    layer["inbound_nodes"][0]["args"] = json.loads(text)
    (line,) = compare(json.dumps(model), _FLATTEN).differences
    known = "stands in front of ResNet50", "maximum recursion", "preprocessing: none of"
    assert any(text in line for text in known)


def _with_config(path: Path, new: Path, change) -> Path:
    """The same file with another config.json."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(new, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "config.json":
                model = json.loads(content)
                change(model)
                content = json.dumps(model)
            target.writestr(name, content)
    return new


def test_file_with_another_network_is_refused_with_all_differences(saved, tmp_path):
    def change(model: dict) -> None:
        _set("conv1_relu", activation="silu")(model)
        _set("dropout2", rate=0.3)(model)

    path = _with_config(saved[0], tmp_path / "other.keras", change)
    with pytest.raises(UserError) as caught:
        port.read(path)
    assert str(caught.value).splitlines() == [
        f"{path}: 2 differences from the expected ResNet-50; to port the numbers alone, save them "
        "with model.save_weights:",
        "  Keras's config: conv1_relu: activation silu, expected relu",
        "  Keras's config: dropout rates [0.5, 0.3], expected one for all",
    ]


def test_certificate_says_what_was_compared_and_keras_gives_its_logits(saved):
    path, model = saved
    weights = port.read(path)
    said = "compared with Keras's config (preprocessing unit, upsampling 2, interpolation nearest, "
    assert weights.network == said + "dropout 0.5)"
    assert weights.header.preprocessing == "unit"
    # The whole model of Keras, on the picture as the certificate describes it.
    y, x, c = np.meshgrid(range(32), range(32), range(3), indexing="ij")
    images = ((3 * y**2 + 5 * x * (c + 1) + x * y) // 7 % 256)[np.newaxis].astype(np.float32)
    expected = np.asarray(model(images))
    logits = certificate.activations(weights)["logits"]
    found = np.exp(logits) / np.exp(logits).sum()
    # Two float32 implementations of 50 layers: a few hundred roundings of 6e-8 of the scale.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert expected.max() < 0.9  # no probability hides the others
    image = certificate.certify(weights, path)["picture"]
    assert image["preprocessing"] == "unit"
    assert "y < 32, x < 32" in image["formula"] and "repeated 2 x 2" in image["formula"]


def test_whole_h5_file_is_compared_and_weights_alone_are_assumed(small, tmp_path):
    small.save(tmp_path / "a.h5")
    assert port.read(tmp_path / "a.h5").network == "compared with Keras's config (no settings)"
    other = keras.Model.from_config(_silu(copy.deepcopy(small.get_config())))
    other.save(tmp_path / "other.h5")
    with pytest.raises(UserError, match="conv1_relu: activation silu, expected relu"):
        port.read(tmp_path / "other.h5")
    other.save_weights(tmp_path / "other.weights.h5")  # which nothing can tell
    network = port.read(tmp_path / "other.weights.h5").network
    assert network.startswith("assumed: activations, ") and "has weights only" in network


def _silu(config: dict) -> dict:
    layer = next(layer for layer in config["layers"] if layer["config"]["name"] == "conv1_relu")
    layer["config"]["activation"] = "silu"
    return config
