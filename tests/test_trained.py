"""A ported file in place of a workdir: Keras's fine-tuned models answer as they do in Keras."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from flax import nnx
from keras import layers
from PIL import Image

from cifar_jax import config as configuration
from cifar_jax import evaluate, port_weights, predict
from cifar_jax import trained as trained_module
from cifar_jax.data import sources
from cifar_jax.errors import UserError
from cifar_jax.labels import CLASS_NAMES
from cifar_jax.models.registry import create_model
from cifar_jax.pretrained import certificate, names, ours
from cifar_jax.trained import Trained, load_trained
from configs import mlp
from tests import port_sources

COUNT = 6  # images
# Two float32 implementations of 50 layers; the probabilities of random weights differ by far more
# from picture to picture, and between two preprocessings.
TOLERANCE = 1e-4
NOTEBOOK = {"preprocessing": "unit", "interpolation": "nearest"}
HEADER = ours.Header("a", "00", "11", "test", "torchvision", "unknown", "unknown")
POOLED = names.Structure("torchvision", head=names.Head("pooled", features=2048, classes=10))
FLATTEN = names.Head("flatten", features=4 * 2048, classes=10)


@pytest.fixture(autouse=True)
def no_activations(monkeypatch):
    """Certificates without activations: they would take a compilation each."""
    monkeypatch.setattr(certificate, "activations", lambda weights: {})


@pytest.fixture
def pictures(sample, tmp_path):
    paths = [tmp_path / f"{row}.png" for row in range(COUNT)]
    for path, image in zip(paths, sample.test_images, strict=False):
        Image.fromarray(image).save(path)
    return paths


def ported(source, dest, **stated):
    options = [f"--{name}={value}" for name, value in stated.items()]
    port_weights.main([str(source), str(dest), *options])
    return dest


def predicted(weights, pictures, capsys) -> np.ndarray:
    """Probabilities [N, 10] that the command prints."""
    capsys.readouterr()
    predict.main([f"--weights={weights}", "--json", *map(str, pictures)])
    answers = json.loads(capsys.readouterr().out)
    return np.array([[answer["probabilities"][name] for name in CLASS_NAMES] for answer in answers])


def notebooks_model(images):
    """As a user of Keras builds it: scaling, upsampling, ResNet50, and the flatten head.

    As after training, the head's first statistics are those of its features; with any others random
    weights answer all pictures alike.
    """
    model = keras.Sequential(
        [
            layers.Input((32, 32, 3)),
            layers.Rescaling(1 / 255),
            layers.UpSampling2D(2),
            keras.applications.ResNet50(weights=None, include_top=False, input_shape=(64, 64, 3)),
            *port_sources.notebook_head(),
        ]
    )
    port_sources.randomize_keras(model)
    norm = model.layers[4]
    features = keras.Model(model.inputs, norm.input).predict(images, verbose=0)
    gamma, beta, *_ = norm.get_weights()
    norm.set_weights([gamma, beta, features.mean(axis=0), features.var(axis=0)])
    return model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_model_of_keras_is_ported_and_predicts_as_in_keras(sample, pictures, tmp_path, capsys):
    images = sample.test_images[:COUNT].astype(np.float32)
    model = notebooks_model(images)
    model.save(tmp_path / "notebook.keras")
    expected = model.predict(images, verbose=0)
    # The file says itself what its images go through.
    file = ported(tmp_path / "notebook.keras", tmp_path / "a.safetensors")
    found = predicted(file, pictures, capsys)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - expected[0]).max() > 100 * TOLERANCE
    label = predict.predict_image(pictures[0], weights=file)
    assert label == CLASS_NAMES[int(expected[0].argmax())]

    # Weights alone do not: stated otherwise, they are another function.
    model.save_weights(tmp_path / "notebook.weights.h5")
    other = NOTEBOOK | {"preprocessing": "keras"}
    file = ported(tmp_path / "notebook.weights.h5", tmp_path / "b.safetensors", **other)
    assert np.abs(predicted(file, pictures, capsys) - expected).max() > 100 * TOLERANCE
    with pytest.raises(SystemExit, match="2"):
        ported(tmp_path / "notebook.keras", tmp_path / "c.safetensors", preprocessing="keras")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of ours: backbone alone, ImageNet's top, a pooled head of which nothing is known."""
    folder = tmp_path_factory.mktemp("files")
    structures = {
        "backbone": names.Structure("torchvision"),
        "imagenet": names.Structure("torchvision", classes=1000),
        "pooled": POOLED,
        "flatten": names.Structure("torchvision", head=FLATTEN),
    }
    for name, structure in structures.items():
        shapes = names.shapes(structure)
        values = {path: port_sources.random_array(path, shape) for path, shape in shapes.items()}
        is_flatten = name == "flatten"
        header = dataclasses.replace(HEADER, upsampling=2 if is_flatten else None)
        ours.write(folder / f"{name}.safetensors", values, header)
    return folder


STATED = {"preprocessing": "unit", "upsampling": 1, "interpolation": "nearest"}


def test_what_a_ported_file_lacks_can_be_stated_later(folder, tmp_path, sample, capsys):
    with pytest.raises(UserError) as caught:
        load_trained(weights=folder / "pooled.safetensors")
    message = str(caught.value)
    assert "which preprocessing, upsampling, interpolation it was" in message
    options = [f"--{name}={value}" for name, value in STATED.items()]
    command = message.partition("port_weights ")[2]
    for option in options:
        name = option.partition("=")[0]
        command = command.replace(f"{name}=...", option)
    command = command.replace("NEW.safetensors", str(tmp_path / "new.safetensors"))
    port_weights.main(command.split())  # as the message says it
    probabilities = load_trained(weights=tmp_path / "new.safetensors").probabilities(
        sample.test_images[:2]
    )
    assert probabilities.shape == (2, 10)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("backbone", "has no head, CIFAR-10 has 10 classes"),
        ("imagenet", "has a head of 1,000 classes, CIFAR-10 has 10 classes"),
        ("flatten", "does not say which preprocessing, interpolation it was"),
        ("absent", "cannot be read: "),
    ],
)
def test_predict_refuses_in_one_line(folder, pictures, capsys, name, message):
    with pytest.raises(SystemExit) as caught:
        predict.main([f"--weights={folder / name}.safetensors", str(pictures[0])])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error


def test_predict_says_what_to_do_with_a_folder(pictures, tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict.main([f"--weights={tmp_path}", str(pictures[0])])
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: is a folder; name that of a run with --workdir, or port a run first: "
        "python -m cifar_jax.port_weights RUN NEW.safetensors\n"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flatten", ["--upsampling=4"], "--upsampling 4: a says that it is 2"),
        ("backbone", ["--upsampling=4"], "has no head that was trained on CIFAR-10"),
        ("imagenet", ["--preprocessing=unit"], "has no head that was trained on CIFAR-10"),
        ("pooled", ["--to=torchvision", "--upsampling=4"], "made with --to has no place for it"),
        ("pooled", [], "the source is ported already"),
    ],
)
def test_port_refuses_to_state_what_cannot_be(folder, tmp_path, capsys, name, options, message):
    with pytest.raises(SystemExit) as caught:
        port_weights.main(
            [f"{folder / name}.safetensors", str(tmp_path / "a.safetensors"), *options]
        )
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error
    assert not list(tmp_path.iterdir())


def test_a_file_is_evaluated_on_the_official_test_images(folder, tmp_path, sample, monkeypatch):
    small = dataclasses.replace(
        sample, test_images=sample.test_images[:50], test_labels=sample.test_labels[:50]
    )
    monkeypatch.setattr(sources, "load", lambda *_: small)
    file = ported(folder / "pooled.safetensors", tmp_path / "new.safetensors", **STATED)
    found = evaluate.evaluate(weights=file)
    assert found == evaluate.evaluate(weights=file, split="test")
    probabilities = load_trained(weights=file).probabilities(small.test_images)
    assert found["count"] == 50 and found.keys() == {"loss", "accuracy", "count"}
    accuracy = (probabilities.argmax(axis=1) == small.test_labels).mean()
    assert found["accuracy"] == pytest.approx(accuracy)
    assert [path.name for path in tmp_path.iterdir()] == ["new.safetensors"]  # no record
    with pytest.raises(UserError, match="does not say which images trained it.*--split=test"):
        evaluate.evaluate(weights=file, split="validation")


@pytest.mark.parametrize("arguments", [{}, {"workdir": "run", "weights": "a.safetensors"}])
def test_it_is_either_a_workdir_or_a_file(arguments):
    with pytest.raises(UserError, match="either the workdir of a run or a file"):
        load_trained(**arguments)
    with pytest.raises(UserError, match="a.safetensors is a file; only a workdir has a best"):
        load_trained(weights="a.safetensors", checkpoint="best")


@pytest.mark.parametrize(("count", "sizes"), [(3, [3]), (4, [4]), (10, [4, 4, 4])])
def test_many_images_go_through_a_few_at_a_time(count, sizes, sample, monkeypatch):
    """So that memory does not grow with them, nor compilations with the sizes of the rests."""
    config = configuration.to_dict(mlp.get_config())
    trained = Trained(create_model(config["model"], seed=0), {}, None)
    images, seen, whole = sample.test_images[:count], [], Trained.batch_logits
    expected = whole(trained, images)
    monkeypatch.setattr(trained_module, "_AT_ONCE", 4)
    monkeypatch.setattr(
        Trained, "batch_logits", lambda self, part: seen.append(len(part)) or whole(self, part)
    )
    # float32 sums of batches of different sizes may round differently.
    np.testing.assert_allclose(trained.logits(images), expected, rtol=1e-6, atol=1e-6)
    assert seen == sizes


def test_a_model_is_split_once_for_all_its_calls(sample, monkeypatch):
    """For a ResNet-50 it takes as long as a small picture."""
    config = configuration.to_dict(mlp.get_config())
    trained = Trained(create_model(config["model"], seed=0), {}, None)
    calls, split = [], nnx.split
    monkeypatch.setattr(nnx, "split", lambda *options: calls.append(options) or split(*options))
    for start in range(3):
        trained.logits(sample.test_images[start : start + 1])
    assert len(calls) == 1
