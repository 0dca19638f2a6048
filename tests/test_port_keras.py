"""Keras's files against Keras's own variables and network, and our files read by Keras."""

import h5py
import keras
import numpy as np
import pytest
import safetensors.numpy
from keras import layers

from cifar_jax.errors import UserError
from cifar_jax.pretrained import certificate, ours, port
from cifar_jax.pretrained import keras as keras_names
from cifar_jax.pretrained.names import Structure
from tests import port_sources

# Keras calls numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

_LEAVES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
_FLATTEN_HEAD = ("norm1", "dense1", "norm2", "dense2", "norm3", "logits")


@pytest.fixture(scope="module")
def backbone():
    return port_sources.keras_resnet50(include_top=False, input_shape=(64, 64, 3))


@pytest.fixture(scope="module")
def with_top():
    return port_sources.keras_resnet50(include_top=True, classifier_activation=None)


def _sequential(backbone):
    return keras.Sequential(
        [layers.Input((32, 32, 3)), layers.UpSampling2D(2), backbone, *port_sources.notebook_head()]
    )


def _functional(backbone):
    images = layers.Input((32, 32, 3))
    x = backbone(layers.UpSampling2D(2)(images))
    for layer in port_sources.notebook_head():
        x = layer(x)
    return keras.Model(images, x)


def _flattened(backbone):
    """The head grown onto the backbone's own graph: no nested model."""
    x = backbone.output
    for layer in port_sources.notebook_head():
        x = layer(x)
    return keras.Model(backbone.input, x)


def _pooled(backbone):
    return keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.UpSampling2D(2),
            backbone,
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, name="predictions"),
        ]
    )


_TRANSFERS = {
    "sequential": _sequential,
    "functional": _functional,
    "flattened": _flattened,
    "pooled": _pooled,
}


@pytest.fixture(scope="module")
def transfers(backbone):
    models = {name: build(backbone) for name, build in _TRANSFERS.items()}
    for model in models.values():
        port_sources.randomize_keras(model)
    # As after training: with an optimizer whose slots are in the file.
    models["sequential"].compile(optimizer=keras.optimizers.RMSprop(2e-5), loss="mse")
    models["sequential"].optimizer.build(models["sequential"].trainable_variables)
    return models


def _layers_with_weights(model):
    for layer in model.layers:
        if getattr(layer, "layers", None):
            yield from _layers_with_weights(layer)
        elif layer.weights:
            yield layer


def _expected(model, prefix: str = "") -> dict[str, np.ndarray]:
    """Our names and shapes, in the test's own words."""
    head = iter(_FLATTEN_HEAD)
    values = {}
    for layer in _layers_with_weights(model):
        if layer.name.startswith("conv") or not prefix:
            path = prefix + port_sources.our_path_of_keras(layer.name)
        else:
            path = "head.logits" if layer.name == "predictions" else f"head.{next(head)}"
        for variable in layer.weights:
            array = np.asarray(variable)
            array = array[0, 0] if array.shape[:2] == (1, 1) else array
            values[f"{path}.{_LEAVES.get(variable.name, variable.name)}"] = array
    return values


def _assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


def _write_published(model, path, top: str = "predictions") -> None:
    """The layout of the published files: names with `:0`, attributes in byte strings."""
    with h5py.File(path, "w") as file:
        names = {layer.name: layer.name for layer in model.layers} | {"predictions": top}
        file.attrs["layer_names"] = [names[layer.name].encode() for layer in model.layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.2.4"
        for layer in model.layers:
            name = names[layer.name]
            group = file.create_group(name)
            weights = {f"{name}/{variable.name}:0": variable for variable in layer.weights}
            group.attrs["weight_names"] = [weight.encode() for weight in weights]
            for weight, variable in weights.items():
                group[weight] = np.asarray(variable)


def _slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def test_table_is_what_keras_has(backbone, with_top):
    for model, classes in ((backbone, None), (with_top, 1000)):
        found = {
            f"{layer.name}/{variable.name}": tuple(variable.shape)
            for layer in _layers_with_weights(model)
            for variable in layer.weights
        }
        table = keras_names.table(Structure("keras", classes=classes))
        assert {name: entry.source_shape for name, entry in table.items()} == found
        assert len({entry.name for entry in table.values()}) == len(table)


@pytest.mark.parametrize("top", ["probs", _slow("predictions"), _slow("fc1000")])
def test_published_layout_with_top(with_top, tmp_path, top):
    _write_published(with_top, tmp_path / "a.h5", top)
    weights = port.read(tmp_path / "a.h5", "keras")
    _assert_equal(weights.values, _expected(with_top))
    assert weights.header.naming == "Keras, legacy HDF5"
    assert weights.header.preprocessing == "keras" and weights.read == 320


@pytest.mark.parametrize("name", ["a.weights.h5", "published.h5", _slow("a.keras"), _slow("a.h5")])
def test_backbone_in_every_layout(backbone, tmp_path, name):
    path = tmp_path / name
    if name == "published.h5":
        _write_published(backbone, path)
    elif name == "a.weights.h5":
        backbone.save_weights(path)
    else:
        backbone.save(path)
    weights = port.read(path)
    _assert_equal(weights.values, _expected(backbone))
    assert weights.header.variant == "keras" and weights.ignored == ()


@pytest.mark.parametrize(
    ("model", "ending"),
    [
        ("sequential", ".keras"),
        ("pooled", ".h5"),
        ("flattened", ".weights.h5"),
        _slow("sequential", ".weights.h5"),
        _slow("sequential", ".h5"),
        _slow("functional", ".keras"),
        _slow("functional", ".h5"),
        _slow("flattened", ".h5"),
        _slow("pooled", ".weights.h5"),
    ],
)
def test_whole_transfer_model(transfers, tmp_path, model, ending):
    path = tmp_path / f"a{ending}"
    save = transfers[model].save_weights if "weights" in ending else transfers[model].save
    save(path)
    weights = port.read(path)
    _assert_equal(weights.values, _expected(transfers[model], prefix="backbone."))
    assert weights.structure.head.kind == ("pooled" if model == "pooled" else "flatten")
    # Whether it was fine-tuned with Keras's preprocessing or with /255 no file of weights says.
    assert weights.header.preprocessing == "unknown"
    assert bool(weights.ignored) == (model == "sequential")
    assert all(name.startswith("optimizer") for name in weights.ignored)


def test_files_without_layer_names_are_read_by_position(backbone, tmp_path):
    """Earlier releases of Keras 3 wrote no names beside the variables."""
    backbone.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "a") as file:
        for group in file["layers"].values():
            del group["vars"].attrs["name"]
    _assert_equal(port.read(tmp_path / "a.weights.h5").values, _expected(backbone))


def test_names_that_contradict_the_positions_are_refused(backbone, tmp_path):
    backbone.save_weights(tmp_path / "a.weights.h5")
    with h5py.File(tmp_path / "a.weights.h5", "a") as file:
        file.move("layers/conv2d_12", "layers/spare")
        file.move("layers/conv2d_16", "layers/conv2d_12")
        file.move("layers/spare", "layers/conv2d_16")
    with pytest.raises(UserError, match="conv2d_12 is conv3_block2_2_conv.* conv3_block1_2_conv"):
        port.read(tmp_path / "a.weights.h5")


@pytest.mark.parametrize("model", ["sequential", _slow("functional")])
def test_way_back_of_a_transfer_model_is_exact(backbone, transfers, tmp_path, model):
    transfers[model].save_weights(tmp_path / "a.weights.h5")
    weights = port.read(tmp_path / "a.weights.h5")
    port.write_published(weights, tmp_path / "back.weights.h5")
    expected = [np.array(variable) for variable in transfers[model].weights]
    fresh = _TRANSFERS[model](backbone)
    for variable in fresh.weights:
        variable.assign(np.zeros(variable.shape))
    fresh.load_weights(tmp_path / "back.weights.h5")
    for variable, array in zip(fresh.weights, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), array, err_msg=variable.path)


def test_way_back_through_our_file_is_exact(with_top, tmp_path):
    _write_published(with_top, tmp_path / "a.h5")
    weights = port.read(tmp_path / "a.h5")
    ours.write(tmp_path / "ours.safetensors", weights.values, weights.header)
    port.write_published(port.read(tmp_path / "ours.safetensors"), tmp_path / "b.weights.h5")
    fresh = keras.applications.ResNet50(weights=None)
    fresh.load_weights(tmp_path / "b.weights.h5")
    for found, expected in zip(fresh.weights, with_top.weights, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.numpy(), err_msg=found.path)


def test_certificate_is_reproduced_by_keras(backbone, tmp_path):
    backbone.save_weights(tmp_path / "a.weights.h5")
    found = certificate.activations(port.read(tmp_path / "a.weights.h5"))
    images = certificate.picture().astype(np.float32)
    images = keras.applications.resnet.preprocess_input(images)
    anysize = keras.applications.ResNet50(weights=None, include_top=False)
    anysize.set_weights(backbone.get_weights())
    ends = ("conv2_block3_out", "conv3_block4_out", "conv4_block6_out", "conv5_block3_out")
    outputs = keras.Model(anysize.input, [anysize.get_layer(name).output for name in ends])(images)
    for stage, expected in enumerate(map(np.asarray, outputs), 1):
        # Two float32 implementations of 50 layers: a few hundred roundings of 6e-8 of the scale.
        limit = 2e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found[f"stage{stage}"], expected, rtol=0, atol=limit)


@pytest.mark.parametrize(("model", "factor"), [("sequential", 2), ("pooled", 8)])
def test_certificate_of_a_transfer_model_has_its_logits(transfers, tmp_path, model, factor):
    transfers[model].save_weights(tmp_path / "a.weights.h5")
    weights = port.read(tmp_path / "a.weights.h5")
    found = certificate.activations(weights)
    # The file says nothing of the preprocessing: the certificate takes the published one.
    assert certificate.preprocessing(weights.header) == "keras"
    y, x, c = np.meshgrid(range(32), range(32), range(3), indexing="ij")
    pixels = ((3 * y**2 + 5 * x * (c + 1) + x * y) // 7 % 256)[np.newaxis].astype(np.float32)
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    anysize = keras.applications.ResNet50(weights=None, include_top=False)
    anysize.set_weights(transfers[model].get_layer("resnet50").get_weights())
    maps = anysize(keras.applications.resnet.preprocess_input(pixels))
    np.testing.assert_allclose(found["stage4"], maps, rtol=0, atol=2e-5 * np.abs(maps).max())
    _upsampling, _backbone, *head, last = transfers[model].layers
    for layer in head:
        maps = layer(maps)
    kernel, bias = map(np.asarray, last.weights)
    expected = np.asarray(maps) @ kernel + bias
    # As above, and a head whose batch norms divide by small deviations.
    np.testing.assert_allclose(
        found["logits"], expected, rtol=0, atol=2e-5 * np.abs(expected).max()
    )


def test_every_difference_is_listed_at_once(backbone, tmp_path):
    _write_published(backbone, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        group = file["conv3_block2_1_conv/conv3_block2_1_conv"]
        file["conv3_block2_1_conv"].attrs["weight_names"] = [b"conv3_block2_1_conv/kernel:0"]
        del group["bias:0"]
        kernel = group["kernel:0"][()]
        del group["kernel:0"]
        group["kernel:0"] = kernel.astype(np.float64)
        file["conv1_bn/conv1_bn/gamma:0"][3] = np.inf
        file["conv1_conv/spare"] = np.ones(3, np.float32)
        del file["conv4_block1_0_conv/conv4_block1_0_conv/kernel:0"]
        file["conv4_block1_0_conv/conv4_block1_0_conv/kernel:0"] = np.ones((1, 1, 3, 4), np.float32)
    with pytest.raises(UserError) as caught:
        port.read(tmp_path / "a.h5")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'a.h5'}: 5 differences from the expected ResNet-50:",
        "  conv3_block2_1_conv/bias: missing",
        "  conv1_bn/gamma: NaN or infinite numbers",
        "  conv4_block1_0_conv/kernel: shape (1, 1, 3, 4), expected (1, 1, 512, 1024)",
        "  conv1_conv/spare: unexpected, float32 (3,)",
        "  conv3_block2_1_conv/kernel: float64, expected float32; convert before saving "
        "(PyTorch: tensor.float())",
    ]


def test_other_heads_are_refused(backbone, tmp_path):
    model = keras.Sequential(
        [layers.Input((64, 64, 3)), backbone, layers.Flatten(), layers.Dense(8), layers.Dense(10)]
    )
    model.save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(UserError, match="0 batch normalizations, 2 dense layers .* known heads"):
        port.read(tmp_path / "a.weights.h5")


@pytest.mark.slow
def test_real_numbers_through_keras(tmp_path):
    """Real kernels and statistics in Keras's variables: the layouts must not mind the numbers."""
    real = safetensors.numpy.load_file(port_sources.real_weights())
    model = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(64, 64, 3))
    by_shape: dict[tuple[int, ...], list[np.ndarray]] = {}
    for array in real.values():
        kernel = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        by_shape.setdefault(kernel.shape, []).append(np.abs(kernel) if array.ndim == 1 else kernel)
    model.set_weights(
        [
            by_shape[variable.shape][i % len(by_shape[variable.shape])]
            for i, variable in enumerate(model.weights)
        ]
    )
    _write_published(model, tmp_path / "a.h5")
    model.save(tmp_path / "a.keras")
    model.save_weights(tmp_path / "a.weights.h5")
    for name in ("a.h5", "a.keras", "a.weights.h5"):
        _assert_equal(port.read(tmp_path / name).values, _expected(model))
