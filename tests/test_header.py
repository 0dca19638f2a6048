"""What a file of ours says of itself is checked when read: damage and forgery are one line."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from cifar_jax import predict
from cifar_jax.errors import UserError
from cifar_jax.pretrained import names, ours, port
from tests import port_sources

HEADER = ours.Header("a.h5", "00", "11", "test", "torchvision", "unit", "unknown")
FLATTEN = names.Structure("torchvision", head=names.Head("flatten", features=8192, classes=10))


def parsed(**changes):
    about = {"header": dataclasses.asdict(HEADER) | changes}
    return ours.parse_header({"cifar_jax": json.dumps(about)}, "a.safetensors")


def nested(levels):
    value = 1
    for _ in range(levels):
        value = {"initial": value}
    return value


@pytest.mark.parametrize(
    "changes",
    [
        {"variant": "torchvision", "preprocessing": "unknown", "license": "Apache-2.0 (see x)"},
        {"head": "pooled", "upsampling": 8, "interpolation": "bilinear"},
        {"head": None, "upsampling": None, "interpolation": None, "initial": {"source": "é\n"}},
        {"initial": nested(64)},
        {"source": "'r\\xe9seau.h5'", "sha256": ""},
    ],
)
def test_what_we_write_is_read(changes):
    assert dataclasses.asdict(parsed(**changes)).items() >= changes.items()


FORGED = "MIT\n  loaded         320 tensors"


@pytest.mark.parametrize(
    "changes",
    [
        *({"variant": value} for value in ("resnet", None, ["keras"])),
        *({"preprocessing": value} for value in ("none", None, {}, 1)),
        *({"head": value} for value in ("mlp", "", False, ["flatten"])),
        *({"upsampling": value} for value in (0, 9, 16, -8, True, 2.0, "2", [2], float("nan"))),
        *({"interpolation": value} for value in ("bicubic", "", 0, {})),
        *({"initial": value} for value in ("a", 1, False, [], nested(65), nested(900))),
        *({name: 7} for name in ("source", "sha256", "md5", "naming", "license")),
        *({name: FORGED} for name in ("source", "sha256", "md5", "naming", "license")),
        *({"license": value} for value in (None, {}, "\x1b[2J", "\u202egpj", "\u2028")),
    ],
)
def test_what_we_never_write_is_refused(changes):
    (name,) = changes
    with pytest.raises(UserError) as caught:
        parsed(**changes)
    message = str(caught.value)
    assert message.startswith(f"a.safetensors: damaged header: {name} ")
    assert message.isascii() and message.isprintable()


@pytest.mark.parametrize("version", [0, 2, None, "1", "1\nerror: all is well"])
def test_another_version_is_refused(version):
    with pytest.raises(UserError, match="format version .*, this program reads 1") as caught:
        parsed(format_version=version)
    assert str(caught.value).isprintable()


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.fixture(scope="module")
def values():
    shapes = names.shapes(FLATTEN)
    return {name: port_sources.random_array(name, shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "pooled"}, "damaged header: head pooled, its tensors have flatten"),
        ({"upsampling": 4}, "damaged header: upsampling 4, its tensors have 2"),
        ({"upsampling": 9}, "damaged header: upsampling 9"),
    ],
)
def test_a_header_that_is_not_the_tensors_is_told_to_predict(
    values, tmp_path, picture, capsys, changes, message
):
    path = tmp_path / "a.safetensors"
    header = dataclasses.replace(HEADER, upsampling=2, interpolation="nearest")
    ours.write(path, values, dataclasses.replace(header, **changes))
    with pytest.raises(SystemExit) as caught:
        predict.main([f"--weights={path}", str(picture)])
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {path}: {message}\n"


def test_what_the_tensors_show_a_header_need_not_say(values, tmp_path):
    ours.write(tmp_path / "a.safetensors", values, HEADER)
    header = port.read(tmp_path / "a.safetensors").header
    assert header == dataclasses.replace(HEADER, head="flatten", upsampling=2)


def test_a_head_on_maps_that_no_upsampling_gives_is_told(values, tmp_path):
    norm = {name for name in values if name.startswith("head.norm1.")}
    wide = {
        name: np.resize(array, (81 * 2048, *array.shape[1:]))
        if name in norm | {"head.dense1.kernel"}
        else array
        for name, array in values.items()
    }
    ours.write(tmp_path / "a.safetensors", wide, HEADER)
    with pytest.raises(UserError, match="its head reads maps of 9 x 9, expected one of 1 x 1, 2"):
        port.read(tmp_path / "a.safetensors")
