"""The prediction command and functions, on a stand-in for the trained model."""

import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from cifar_jax import predict
from cifar_jax.errors import UserError
from cifar_jax.labels import CLASS_NAMES

SHADES = {"dark.png": 10, "middle.png": 130, "bright.png": 250}


def label_of(shade):
    return CLASS_NAMES[shade * 10 // 256]


class ShadeModel:
    """Knows the class from the mean brightness: 0..255 in ten equal parts."""

    def probabilities(self, images):
        assert images.dtype == np.uint8 and images.shape[1:] == (32, 32, 3)
        classes = (images.mean(axis=(1, 2, 3)) * 10 // 256).astype(int)
        distance = np.abs(np.arange(10) - classes[:, None])
        return (np.float32(0.5) ** (distance + 1)).astype(np.float32)


@pytest.fixture
def calls(monkeypatch):
    """Puts the stand-in where the trained model is loaded; returns how it was asked for."""
    calls = []

    def load_trained(workdir, checkpoint="latest", *, weights=None):
        calls.append((workdir, checkpoint) if weights is None else weights)
        return ShadeModel()

    module = types.ModuleType("cifar_jax.trained")
    module.load_trained = load_trained
    monkeypatch.setitem(sys.modules, "cifar_jax.trained", module)
    return calls


@pytest.fixture
def pictures(tmp_path):
    for name, shade in SHADES.items():
        Image.new("RGB", (20, 30), (shade,) * 3).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    return tmp_path


def test_predict_image_returns_the_label(pictures, calls):
    for name, shade in SHADES.items():
        assert predict.predict_image(pictures / name, workdir="run") == label_of(shade)
    assert set(calls) == {("run", "latest")}


def test_predict_images_keeps_order_and_duplicates(pictures, calls):
    names = ["bright.png", "dark.png", "bright.png"]
    answers = predict.predict_images(
        [pictures / name for name in names], workdir="run", checkpoint="best"
    )
    assert calls == [("run", "best")]
    assert [answer["path"] for answer in answers] == [str(pictures / name) for name in names]
    for name, answer in zip(names, answers, strict=True):
        assert answer["label"] == label_of(SHADES[name])
        probabilities = answer["probabilities"]
        assert sorted(probabilities) == sorted(CLASS_NAMES)
        assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)
        assert probabilities[answer["label"]] == 0.5
    assert predict.predict_images([], workdir="run") == []


def test_a_file_of_weights_takes_the_place_of_a_workdir(pictures, calls, capsys):
    path = pictures / "bright.png"
    predict.main(["--weights=a.safetensors", str(path)])
    assert capsys.readouterr().out.startswith(f"{path}: truck")
    assert predict.predict_image(path, weights="b.safetensors") == "truck"
    assert calls == ["a.safetensors", "b.safetensors"]


def test_functions_raise_for_a_bad_picture(pictures, calls):
    with pytest.raises(UserError, match="bad.png"):
        predict.predict_images([pictures / "dark.png", pictures / "bad.png"], workdir="run")
    assert not calls  # found out before anything is loaded


def test_command_prints_label_and_sorted_probabilities(pictures, calls, capsys):
    path = str(pictures / "bright.png")
    predict.main(["--workdir=run", "--checkpoint=best", path])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: truck"
    assert [line.split() for line in lines[1:3]] == [["truck", "0.5000"], ["ship", "0.2500"]]
    assert len(lines) == 11 and calls == [("run", "best")]


def test_command_prints_json(pictures, calls, capsys):
    paths = [str(pictures / name) for name in SHADES]
    predict.main(["--workdir=run", "--json", *paths])
    answers = json.loads(capsys.readouterr().out)
    assert answers == predict.predict_images(paths, workdir="run")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_bad_pictures_among_good_ones(pictures, calls, capsys, extra):
    names = ["missing.png", "dark.png", "bad.png", "bright.png"]
    with pytest.raises(SystemExit) as raised:
        predict.main(["--workdir=run", *extra, *(str(pictures / name) for name in names)])
    assert raised.value.code == 2
    output = capsys.readouterr()
    assert "dark.png" in output.out and "bright.png" in output.out and "bad.png" not in output.out
    errors = output.err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert "missing.png" in errors[0] and "bad.png" in errors[1]


def test_nothing_is_loaded_for_bad_pictures_alone(pictures, calls, capsys):
    with pytest.raises(SystemExit) as raised:
        predict.main(["--workdir=run", str(pictures / "bad.png")])
    assert raised.value.code == 2 and not calls
    assert capsys.readouterr().out == ""


def test_bad_workdir_is_one_line(pictures, monkeypatch, capsys):
    def load_trained(workdir, checkpoint="latest", *, weights=None):
        raise UserError(f"{workdir}: no checkpoint")

    module = types.ModuleType("cifar_jax.trained")
    module.load_trained = load_trained
    monkeypatch.setitem(sys.modules, "cifar_jax.trained", module)
    with pytest.raises(SystemExit) as raised:
        predict.main(["--workdir=nowhere", str(pictures / "dark.png")])
    assert raised.value.code == 2
    assert capsys.readouterr().err == "error: nowhere: no checkpoint\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--workdir=run"],
        ["a.png"],
        ["--workdir=run", "--checkpoint=first", "a"],
        ["--workdir=run", "--weights=a.safetensors", "a.png"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        predict.main(arguments)
    assert raised.value.code == 2
    assert "usage: python -m cifar_jax.predict" in capsys.readouterr().err


COMMAND = """
import sys, types
import numpy as np
class Even:
    def probabilities(self, images):
        return np.full((len(images), 10), 0.1, np.float32)
module = types.ModuleType("cifar_jax.trained")
module.load_trained = lambda *_, **__: Even()
sys.modules["cifar_jax.trained"] = module
from cifar_jax import predict
predict.main()
"""


@pytest.mark.parametrize("pictures_given", [1, 400])  # less and more than a pipe's buffer
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_reader_that_leaves_is_no_error(pictures, pictures_given, extra):
    names = [str(pictures / "dark.png")] * pictures_given
    command = [sys.executable, "-c", COMMAND, "--workdir=run", *extra, *names]
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb") as nobody:
        result = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_name_that_is_no_text_is_shown(pictures, extra):
    """As Linux allows; what is not UTF-8 has no letters to be printed with."""
    name = os.fsencode(pictures) + b"/caf\xe9.png"
    shutil.copy(pictures / "dark.png", name)
    command = [sys.executable, "-c", COMMAND, "--workdir=run", *extra, name]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "utf-8"}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert r"caf\udce9.png" in result.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("pictures_given", [1, 400])
def test_full_disk_is_one_line(pictures, pictures_given):
    names = [str(pictures / "dark.png")] * pictures_given
    command = [sys.executable, "-c", COMMAND, "--workdir=run", *names]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "No space left" in line


def test_help_imports_nothing_heavy():
    code = (
        "import sys, cifar_jax.predict as p\n"
        "try: p.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'tensorflow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--checkpoint" in result.stdout
