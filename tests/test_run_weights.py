"""What was trained here leaves: into Keras and PyTorch, into our file, and into the next run."""

import json

import keras
import numpy as np
import optax
import pytest
import safetensors.torch

from cifar_jax import port_weights, trained
from cifar_jax.checkpoint import Checkpointer
from cifar_jax.config import to_dict
from cifar_jax.models.registry import create_model
from cifar_jax.pretrained import certificate, ours, port
from cifar_jax.pretrained.load import load_pretrained
from cifar_jax.recording.run_record import update_run_record
from cifar_jax.state import create_state, to_arrays
from configs import mlp, resnet50
from tests.references import keras_transfer, torch_resnet50, weights

INITIAL = {"source": "resnet50-0676ba61.pth", "sha256": "0676ba61", "license": "BSD-3-Clause"}
RUNS = [("keras", "pooled"), ("keras", "flatten"), ("torchvision", "pooled")]
LATEST, BEST = 3, 2  # steps


def save_run(folder, config) -> dict[int, dict]:
    """Two checkpoints as a run leaves them; returns the parameters and statistics of each."""
    model = weights.random_model(lambda: create_model(config.model, seed=0))
    checkpointer = Checkpointer(folder, keep=2)
    found = {}
    for step, accuracy in ((BEST, 0.9), (LATEST, 0.4)):
        state = create_state(model, optax.sgd(0.1), seed=0)
        extra = {"config": to_dict(config)}
        checkpointer.save(step, to_arrays(state), extra, accuracy=accuracy)
        found[step] = {name: np.asarray(x) for name, x in weights.variables(model).items()}
        if config.model.name == "resnet50":
            model.head.logits.bias.set_value(model.head.logits.bias[...] + 1.5 * np.arange(10))
    checkpointer.wait()
    checkpointer.close()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function: workdir of a run of a variant and head, and its values by step."""
    made = {}

    def make(variant, head):
        if (variant, head) not in made:
            config = resnet50.get_config()
            config.model.update(variant=variant, head=head, upsampling=2, interpolation="bilinear")
            config.model.preprocessing = "torchvision"
            folder = tmp_path_factory.mktemp(f"{variant}-{head}")
            made[variant, head] = folder, save_run(folder, config)
            update_run_record(folder, weights=INITIAL)
        return made[variant, head]

    return make


@pytest.fixture
def command(monkeypatch):
    """The command without the activations of its certificate, which take a compilation."""
    monkeypatch.setattr(certificate, "activations", lambda weights: {})

    def call(*arguments):
        port_weights.main([str(argument) for argument in arguments])

    return call


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


def test_a_pooled_run_is_keras_resnet50_of_ten_classes(run, command, tmp_path):
    workdir, values = run("keras", "pooled")
    command(workdir, tmp_path / "a.weights.h5", "--to", "keras")
    model = keras.applications.ResNet50(weights=None, classes=10, input_shape=(64, 64, 3))
    model.load_weights(tmp_path / "a.weights.h5")
    expected = weights.as_resnet50(values[LATEST])
    assert len(model.weights) == len(expected)
    assert_equal(weights.from_keras(weights.keras_weights(model), expected), expected)


def test_a_flatten_run_is_the_notebooks_keras_model(run, command, tmp_path):
    workdir, values = run("keras", "flatten")
    command(workdir, tmp_path / "a.weights.h5", "--to", "keras", "--checkpoint", "best")
    model = keras_transfer.create(upsampling=2, preprocessing="unit")
    model.load_weights(tmp_path / "a.weights.h5")
    assert len(model.weights) == len(values[BEST])
    assert_equal(weights.from_keras(weights.keras_weights(model), values[BEST]), values[BEST])


def test_a_pooled_run_is_torchvisions_resnet50_of_ten_classes(run, command, tmp_path):
    workdir, values = run("torchvision", "pooled")
    command(workdir, tmp_path / "a.safetensors", "--to", "torchvision")
    model = torch_resnet50.ResNet50(num_classes=10)
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"))
    expected = weights.as_resnet50(values[LATEST])
    assert_equal(weights.from_torch(model.state_dict(), expected), expected)


@pytest.mark.parametrize(("variant", "head"), RUNS)
def test_a_run_becomes_our_file_and_the_next_runs_start(run, command, tmp_path, variant, head):
    workdir, values = run(variant, head)
    command(workdir, tmp_path / "a.safetensors", "--variant", variant)
    header = port.read(tmp_path / "a.safetensors").header
    assert header.source == f"{workdir.name}, step {LATEST}"
    assert (header.variant, header.head) == (variant, head)
    assert (header.upsampling, header.interpolation) == (2, "bilinear")
    assert header.preprocessing == "torchvision"
    assert (header.license, header.initial) == (INITIAL["license"], INITIAL)
    loaded = load_pretrained(values[LATEST], tmp_path / "a.safetensors", variant=variant)
    assert_equal(loaded.values, values[LATEST])
    assert loaded.fresh == loaded.unused == ()


@pytest.mark.parametrize(
    ("variant", "ending"), [("keras", "weights.h5"), ("torchvision", "safetensors")]
)
def test_what_left_as_a_top_comes_back_as_a_pooled_head(run, command, tmp_path, variant, ending):
    workdir, values = run(variant, "pooled")
    command(workdir, tmp_path / f"a.{ending}", "--to", variant)
    loaded = load_pretrained(values[LATEST], tmp_path / f"a.{ending}")
    assert_equal(loaded.values, values[LATEST])
    assert loaded.header.preprocessing == "unknown"  # such a file cannot tell


def test_the_file_answers_as_the_run_does(run, command, tmp_path, sample):
    """The same program on the same numbers: bit for bit."""
    workdir, _ = run("torchvision", "pooled")
    answers = {}
    for which in ("latest", "best"):
        command(workdir, tmp_path / f"{which}.safetensors", "--checkpoint", which)
        found = trained.load_trained(weights=tmp_path / f"{which}.safetensors")
        expected = trained.load_trained(workdir, which)
        answers[which] = found.probabilities(sample.test_images[:4])
        np.testing.assert_array_equal(
            answers[which], expected.probabilities(sample.test_images[:4])
        )
    assert np.abs(answers["latest"] - answers["best"]).max() > 0.01


def test_the_certificate_says_what_was_left_out(run, command, tmp_path, capsys):
    workdir, values = run("torchvision", "pooled")
    command(workdir, tmp_path / "a.safetensors", "--certificate", tmp_path / "c.json")
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["loaded"] == len(values[LATEST])
    assert {"step", "seed"} <= set(found["ignored"])
    assert found["read"] == found["loaded"] + len(found["ignored"])
    printed = capsys.readouterr().out
    assert "head           pooled, upsampling 2, interpolation bilinear" in printed
    assert f"source         {workdir.name}, step {LATEST} (a run of cifar_jax)" in printed


def test_without_a_record_the_licence_is_unknown(run, command, tmp_path):
    workdir, _ = run("torchvision", "pooled")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "checkpoints").symlink_to(workdir / "checkpoints")
    command(tmp_path / "bare", tmp_path / "a.safetensors")
    header = port.read(tmp_path / "a.safetensors").header
    assert (header.license, header.initial) == ("unknown", None)
    # A record that was edited gives no file that is refused when read.
    update_run_record(tmp_path / "bare", weights={"license": "MIT\n  loaded 320 tensors"})
    command(tmp_path / "bare", tmp_path / "b.safetensors")
    assert "\n" not in port.read(tmp_path / "b.safetensors").header.license


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("FLATTEN", "a.safetensors", "--to", "torchvision"), "only --to keras is possible"),
        (("POOLED", "a.weights.h5", "--to", "keras"), "only --to torchvision is possible"),
        (("POOLED", "a.safetensors", "--variant", "keras"), "asked for is keras"),
        (("POOLED", "a.safetensors", "--upsampling", "4"), "says that it is 2"),
        (("POOLED", "a.safetensors", "--preprocessing", "unit"), "says that it is torchvision"),
        (("MLP", "a.safetensors"), 'its config.model.name is "mlp"'),
        (("EMPTY", "a.safetensors"), "until one has been saved, or name the folder of another run"),
        (("FILE", "a.safetensors", "--checkpoint", "best"), "among those of a workdir"),
    ],
)
def test_command_refuses_in_one_line(
    run, command, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    paths = {"POOLED": run("torchvision", "pooled")[0], "FLATTEN": run("keras", "flatten")[0]}
    for name in ("MLP", "EMPTY"):
        paths[name] = tmp_path / name
        paths[name].mkdir()
    save_run(paths["MLP"], mlp.get_config())
    paths["FILE"] = tmp_path / "file"
    paths["FILE"].write_bytes(b"")
    with pytest.raises(SystemExit) as caught:
        command(*(paths.get(argument, argument) for argument in arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
    assert {path.name for path in tmp_path.iterdir()} == {"MLP", "EMPTY", "file"}


def test_a_flatten_head_of_torchvisions_variant_stays_in_our_format(command, tmp_path, capsys):
    config = resnet50.get_config()
    config.model.update(variant="torchvision", upsampling=1)
    save_run(tmp_path / "run", config)
    with pytest.raises(SystemExit):
        command(tmp_path / "run", tmp_path / "a.safetensors", "--to", "torchvision")
    assert "torchvision has no names for a transfer model's head" in capsys.readouterr().err


def test_headers_of_earlier_files_are_read():
    about = {"source": "a.pth", "sha256": "", "md5": "", "naming": "", "variant": "torchvision"}
    about |= {"preprocessing": "torchvision", "license": "unknown", "format_version": 1}
    header = ours.parse_header({"cifar_jax": json.dumps({"header": about})}, "a")
    assert (header.head, header.upsampling, header.interpolation, header.initial) == (None,) * 4
