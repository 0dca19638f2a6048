"""PyTorch's, timm's and Hugging Face's files against PyTorch's own state_dict and network."""

import numpy as np
import pytest
import safetensors.torch
import torch

from cifar_jax import port_weights
from cifar_jax.errors import UserError
from cifar_jax.pretrained import certificate, ours, port, pth
from tests import port_sources

_LEAVES = {"weight": "kernel", "running_mean": "mean", "running_var": "var", "bias": "bias"}


@pytest.fixture(scope="module")
def model():
    return port_sources.torch_resnet50()


@pytest.fixture(scope="module")
def state(model):
    return model.state_dict()


def _expected(state: dict) -> dict[str, np.ndarray]:
    """Our names and shapes, in the test's own words."""
    values = {}
    for name, tensor in state.items():
        module, leaf = name.rsplit(".", 1)
        if leaf == "num_batches_tracked":
            continue
        path, array = port_sources.our_path_of_torch(module), tensor.numpy()
        if array.ndim == 4:
            array = np.moveaxis(array, (0, 1), (3, 2))
            array = array[0, 0] if array.shape[:2] == (1, 1) else array
        elif array.ndim == 2:
            array = array.T
        leaf = "scale" if "norm" in path and leaf == "weight" else _LEAVES[leaf]
        values[f"{path}.{leaf}"] = array
    return values


def _assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.float32 and found[name].flags.c_contiguous
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def _save_zip(state, path):
    torch.save(state, path)


def _save_stream(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def _save_safetensors(state, path):
    safetensors.torch.save_file(state, path, metadata={"format": "pt", "license": "test licence"})


def _save_hugging_face(state, path):
    safetensors.torch.save_file(port_sources.hugging_face_names(state), path)


@pytest.mark.parametrize(
    ("save", "naming"),
    [
        (_save_zip, "torchvision / timm"),
        pytest.param(_save_stream, "torchvision / timm", marks=pytest.mark.slow),
        (_save_safetensors, "torchvision / timm"),
        (_save_hugging_face, "Hugging Face"),
    ],
)
def test_every_tensor_arrives_under_our_name(state, tmp_path, save, naming):
    save(state, tmp_path / "source")
    weights = port.read(tmp_path / "source")
    _assert_equal(weights.values, _expected(state))
    assert (weights.header.naming, weights.header.variant) == (naming, "torchvision")
    assert weights.header.preprocessing == "torchvision"
    # Only one of the files says under which licence it is.
    licence = "test licence" if save is _save_safetensors else "unknown"
    assert weights.header.license == licence
    assert len(weights.ignored) == 53 and weights.read == 320
    assert all(name.endswith("num_batches_tracked") for name in weights.ignored)


@pytest.mark.parametrize("classes", [pytest.param(None, marks=pytest.mark.slow), 10])
def test_without_top_and_with_another_top(state, tmp_path, classes):
    changed = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    if classes:
        changed |= {"fc.weight": torch.ones(classes, 2048), "fc.bias": torch.ones(classes)}
    torch.save(changed, tmp_path / "a.pth")
    weights = port.read(tmp_path / "a.pth")
    _assert_equal(weights.values, _expected(changed))
    assert weights.structure.classes == classes


def test_way_back_is_exact_bit_for_bit(model, state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    weights = port.read(tmp_path / "a.pth")
    ours.write(tmp_path / "ours.safetensors", weights.values, weights.header)
    again = port.read(tmp_path / "ours.safetensors")
    assert again.ported and again.header == weights.header
    port.write_published(again, tmp_path / "back.safetensors")
    back = safetensors.torch.load_file(tmp_path / "back.safetensors")
    for name, tensor in back.items():
        assert torch.equal(tensor, state[name]), name
    # PyTorch itself finds nothing missing: its counters are not parameters.
    result = model.load_state_dict(back, strict=False)
    assert not result.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in result.missing_keys)


def test_certificate_is_reproduced_by_pytorch(model, state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    weights = port.read(tmp_path / "a.pth")
    found = certificate.activations(weights)
    pixels = certificate.picture().astype(np.float32) / 255
    normalised = (pixels - [[[[0.485, 0.456, 0.406]]]]) / [[[[0.229, 0.224, 0.225]]]]
    images = torch.from_numpy(normalised.transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        expected = {name: array.numpy() for name, array in model.features(images).items()}
    for name, array in expected.items():
        # Two float32 implementations of 50 layers: a few hundred roundings of 6e-8 of the scale.
        limit = 2e-5 * np.abs(array).max()
        np.testing.assert_allclose(found[name], array, rtol=0, atol=limit, err_msg=name)
    ours.write(tmp_path / "ours.safetensors", weights.values, weights.header)
    printed = certificate.certify(weights, tmp_path / "ours.safetensors")["activations"]
    assert printed.keys() == expected.keys()
    for name, array in expected.items():
        numbers = [printed[name][key] for key in ("mean", "std", "max_abs")]
        wide = array.astype(np.float64)
        should = [wide.mean(), wide.std(), np.abs(wide).max()]
        np.testing.assert_allclose(numbers, should, rtol=0, atol=2e-5 * should[2], err_msg=name)
    # Two layers of one shape exchanged: the names still fit, the numbers must tell.
    swapped = dict(weights.values)
    a, b = "stage3.block2.conv2.kernel", "stage3.block3.conv2.kernel"
    swapped[a], swapped[b] = swapped[b], swapped[a]
    wrong = certificate.activations(port.Weights(swapped, weights.header, False, 267, ()))
    error = np.abs(wrong["stage3"] - expected["stage3"]).max()
    assert error > 1e-2 * np.abs(expected["stage3"]).max()


def test_every_difference_is_listed_at_once(state, tmp_path):
    broken = dict(state)
    del broken["layer1.0.conv1.weight"]
    broken["layer9.0.conv1.weight"] = torch.ones(2, 3)
    broken["layer2.0.conv2.weight"] = torch.ones(128, 128, 1, 3)
    broken["layer3.0.conv2.weight"] = state["layer3.0.conv2.weight"].half()
    broken["layer4.0.bn1.weight"] = state["layer4.0.bn1.weight"] * float("nan")
    broken["layer4.0.bn1.running_var"] = -state["layer4.0.bn1.running_var"]
    torch.save(broken, tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        port.read(tmp_path / "a.pth")
    assert str(caught.value).splitlines() == [
        f"{tmp_path / 'a.pth'}: 6 differences from the expected ResNet-50:",
        "  layer1.0.conv1.weight: missing",
        "  layer2.0.conv2.weight: shape (128, 128, 1, 3), expected (128, 128, 3, 3)",
        "  layer4.0.bn1.weight: NaN or infinite numbers",
        "  layer4.0.bn1.running_var: negative variance",
        "  layer9.0.conv1.weight: unexpected, float32 (2, 3)",
        "  layer3.0.conv2.weight: float16, expected float32; convert before saving "
        "(PyTorch: tensor.float())",
    ]


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("fc.weight", lambda x: x * float("nan"), "fc.weight: NaN or infinite numbers"),
        # The shapes of a network of no classes, which nothing else contradicts.
        ("fc", lambda x: x[:0], "fc.weight: shape (0, 2048), which holds no numbers"),
    ],
    ids=["NaN", "no classes"],
)
def test_what_is_no_network_is_told_before_anything_is_written(
    state, tmp_path, capsys, name, change, expected
):
    changed = {k: change(x) if k.startswith(name) else x for k, x in state.items()}
    torch.save(changed, tmp_path / "a.pth")
    with pytest.raises(SystemExit) as caught:
        port_weights.main([str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors")])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert expected in said
    assert name == "fc" or said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]


@pytest.mark.parametrize("rename", [lambda names: names, port_sources.hugging_face_names])
def test_a_top_without_bias_lacks_its_bias(state, tmp_path, rename):
    kept = {name: tensor for name, tensor in state.items() if name != "fc.bias"}
    torch.save(rename(kept), tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        port.read(tmp_path / "a.pth")
    said = str(caught.value)
    assert said.endswith((" ResNet-50: fc.bias: missing", " ResNet-50: classifier.1.bias: missing"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_told(tmp_path):
    torch.jit.script(torch.nn.ReLU()).save(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"TorchScript\? save model.state_dict\(\)"):
        port.read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("save", "dtype", "name"),
    [
        (_save_zip, torch.float16, "float16"),
        (_save_zip, torch.bfloat16, "bfloat16"),
        (_save_safetensors, torch.float16, "float16"),
        (_save_safetensors, torch.bfloat16, "BF16"),
    ],
)
def test_other_precisions_are_one_line(state, tmp_path, save, dtype, name):
    kept = {key: tensor for key, tensor in state.items() if tensor.ndim}
    save({key: tensor.to(dtype) for key, tensor in kept.items()}, tmp_path / "a")
    with pytest.raises(UserError) as caught:
        port.read(tmp_path / "a")
    (line,) = str(caught.value).splitlines()
    assert f" and 266 more: {name}, expected float32; convert before saving (PyTorch: " in line


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("save", [_save_zip, _save_stream])
def test_checkpoint_of_a_training_script(state, tmp_path, save, prefix):
    """A wrapper's names, beside an optimizer with its own tensors and numbered entries."""
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    checkpoint = {
        "epoch": 3,
        "model": "resnet50",
        "state_dict": wrapped,
        "best": 0.5,
        "optimizer": optimizer.state_dict(),
    }
    save(checkpoint, tmp_path / "a.pth")
    weights = port.read(tmp_path / "a.pth")
    _assert_equal(weights.values, _expected(state))
    assert weights.header.naming == f"torchvision / timm, behind {prefix}"
    assert weights.ignored[53:] == ("epoch", "model", "best", "optimizer")


def test_a_prefix_that_only_some_names_have_is_no_wrapper(state, tmp_path):
    torch.save(dict(state) | {"module.fc.bias": state["fc.bias"]}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"module.fc.bias: unexpected"):
        port.read(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "state_dict": {}}, "no state_dict"),
        ([torch.ones(2)], "no state_dict"),
        ({"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}, "just one of"),
        ({"state_dict": {1: torch.ones(2)}}, "no state_dict"),
        ({"model": {"a.weight": torch.ones(2)}}, "names are neither"),
        ({"conv1.weights": torch.ones(2)}, "names are neither"),
        ({}, "names are neither"),
    ],
)
def test_other_files_of_pytorch_are_told(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        port.read(tmp_path / "a.pth")


@pytest.mark.parametrize("save", [_save_zip, _save_stream])
def test_dtypes_shapes_and_shared_storage(tmp_path, save):
    base = torch.arange(24, dtype=torch.float32)
    channels_last = base.reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    state = {
        "transposed": base.reshape(4, 6).t(),
        "slice": base[5:17].reshape(3, 4),
        "channels last": channels_last,
        "parameter": torch.nn.Parameter(base),
        "double": torch.ones(2, dtype=torch.float64),
        "half": base.half(),
        "long": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "bool": torch.tensor([True, False]),
    }
    save(state, tmp_path / "a.pth")
    found, entries = pth.read(tmp_path / "a.pth")
    assert entries == []
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name], tensor.detach().numpy(), strict=True)


def test_real_weights_survive_every_way(tmp_path):
    path = port_sources.real_weights()
    weights = port.read(path)
    state = safetensors.torch.load_file(path)
    _assert_equal(weights.values, _expected(state))
    torch.save(state, tmp_path / "a.pth")
    _assert_equal(port.read(tmp_path / "a.pth").values, weights.values)
    port.write_published(weights, tmp_path / "back.safetensors")
    back = safetensors.torch.load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
