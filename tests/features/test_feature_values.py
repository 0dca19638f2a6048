"""Cached features are the backbone's, and what is kept under which name."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from cifar_jax import probe
from cifar_jax.backbone import Backbone
from cifar_jax.checkpoint import find_step, read_checkpoint
from cifar_jax.config import to_dict
from cifar_jax.errors import UserError
from cifar_jax.evaluate import evaluate
from cifar_jax.feature_cache import FeatureCache
from cifar_jax.models.transfer import PREPROCESSINGS, TransferClassifier
from cifar_jax.recording.run_record import read_run_record
from cifar_jax.run_weights import read_run
from cifar_jax.trained import load_trained
from tests.features.helpers import (
    BATCH,
    COUNT,
    TOTAL,
    cache_files,
    cached,
    changed,
    quick_program,
    write_weights,
)
from tests.references import weights


@pytest.fixture(scope="module")
def direct():
    """A function: features of float images in 0..255 by a direct call of the model."""

    def create():
        return TransferClassifier(
            "torchvision",
            preprocessing="torchvision",
            upsampling=1,
            interpolation="bilinear",
            head="pooled",
            dropout=0.0,
            batch_norm="frozen",
            rngs=nnx.Rngs(0),
        )

    model = weights.random_model(create)
    graph, state = nnx.split(model)

    @jax.jit
    def maps(state, images):
        return nnx.merge(graph, state).backbone_maps(images, train=False).mean((1, 2))

    def features(images, *, factor=1.0):
        other = nnx.clone(model)
        other.backbone.stem_conv.kernel[...] *= factor
        with jax.default_matmul_precision("highest"):
            return np.asarray(maps(nnx.state(other), np.asarray(images, np.float32)))

    return features


def test_cached_features_are_those_of_a_direct_call(reference, module_config, small_data, direct):
    """Both sum in float32, the one on one device, the other in shards of two images."""
    found = cached(module_config)
    assert found.shape == (COUNT, 1, 1, 2048) and found.dtype == np.float32
    rows = slice(COUNT - 24, COUNT)  # the padded last batch is among them
    found, images = found[rows, 0, 0], small_data.train_images[rows]
    assert weights.error(found, direct(images)) < 1e-5
    # Controls: other weights, another preprocessing, the next image.
    assert weights.error(found, direct(images, factor=1.01)) > 1e-3
    _, mean, deviation = PREPROCESSINGS["torchvision"]
    unit = images / np.float32(255) * np.float32(deviation) + np.float32(mean)
    assert weights.error(found, direct(unit)) > 0.1
    assert weights.error(found, direct(np.roll(images, 1, axis=0))) > 0.1


def test_the_whole_model_answers_as_its_head_does(reference, module_config, small_data):
    """float32 again: the mean over pixels and the last layer in another order of sums."""
    rows = slice(0, BATCH)
    arrays, _ = read_checkpoint(reference / probe.HEAD_FOLDER, TOTAL)
    kernel, bias = arrays["params.head.logits.kernel"], arrays["params.head.logits.bias"]
    expected = cached(module_config)[rows, 0, 0] @ kernel + bias
    trained = load_trained(reference)
    assert trained.step == TOTAL
    found = trained.logits(small_data.train_images[rows])
    assert weights.error(found, expected) < 1e-5
    assert weights.error(found, expected - bias) > 1e-4
    assert not np.allclose(kernel, 0) and len(set(found.argmax(axis=1))) > 1


def test_the_run_leaves_what_every_run_leaves(reference, module_config):
    record = read_run_record(reference)
    assert record["parameters"] == 2048 * 10 + 10
    assert record["splits"]["sizes"] == {"train": 76, "validation": 8, "test": 20}
    key = json.loads(cache_files(module_config, "about.json")[0].read_text())["key"]
    assert record["features"] == key and key["cut"] == "pooled"
    assert [read["step"] for read in record["test_reads"]] == [TOTAL]
    assert record["weights"]["variant"] == "torchvision" and "sha256" in record["weights"]
    assert (reference / "curves.png").exists() and (reference / "metrics.csv").exists()
    assert find_step(reference, "latest") == TOTAL
    assert find_step(reference, "best") == find_step(reference / probe.HEAD_FOLDER, "best")


def test_evaluate_reads_images_and_agrees_with_the_run(reference):
    before = read_run_record(reference)
    found = evaluate(reference, split="test")
    assert found["count"] == 20 and found["accuracy"] == before["result"]["test_accuracy"]
    assert found["loss"] == pytest.approx(before["result"]["test_loss"], rel=1e-5)
    assert len(read_run_record(reference)["test_reads"]) == len(before["test_reads"]) + 1


def test_its_weights_leave_as_those_of_any_run(reference):
    found = read_run(reference, "latest").weights
    assert (found.header.head, found.header.upsampling) == ("pooled", 1)
    assert found.header.license == "none" and found.header.initial["source"] == "random"
    arrays, _ = read_checkpoint(reference, TOTAL)
    for name in ("head.logits.kernel", "backbone.stem_conv.kernel"):
        np.testing.assert_array_equal(found.values[name], arrays[f"params.{name}"])


KEYS = {
    "nothing": ({}, True),
    "the head's rate": ({"optimizer__learning_rate": 0.1}, True),
    "the order of the images": ({"seed": 5}, True),
    "batch": ({"eval_batch_size": 32}, True),
    "dropout": ({"model__dropout": 0.5}, True),
    "preprocessing": ({"model__preprocessing": "unit"}, False),
    "size": ({"model__upsampling": 2}, False),
    "interpolation": ({"model__interpolation": "nearest"}, False),
    "variant": ({"model__variant": "keras"}, False),
    "dtype": ({"model__compute_dtype": "bfloat16"}, False),
    "precision": ({"matmul_precision": "default"}, False),
    "head": ({"model__head": "flatten"}, False),
    "cut": ({"freeze__features": "stage3"}, False),
}
VALUES = {
    "backbone.stage1.b": np.arange(3.0),
    "backbone.stage1.a": np.ones(2),
    "head.c": np.ones(1),
}


def folder(config, values=VALUES, images=None):
    """Where features are kept."""
    plain = to_dict(config)
    backbone = Backbone(plain["model"], values, plain["freeze"]["features"])
    images = images or {"train": "aa", "test": "bb"}
    key = probe.feature_key(plain, backbone, images_sha256=images)
    return FeatureCache(config.data.directory, key).folder


@pytest.mark.parametrize("case", KEYS)
def test_a_folder_is_shared_exactly_where_the_features_are(case, module_config):
    changes, shared = KEYS[case]
    assert (folder(changed(module_config, **changes)) == folder(module_config)) is shared


def test_features_of_an_archive_lie_beside_it(module_config, tmp_path):
    archive = tmp_path / "cifar-10-binary.tar.gz"
    archive.touch()
    place = folder(changed(module_config, data__directory=str(archive)))
    assert place.parent == tmp_path / "features"


def test_weights_and_images_have_a_folder_of_their_own(module_config):
    usual = folder(module_config)
    assert folder(module_config, dict(reversed(VALUES.items()))) == usual
    assert folder(module_config, VALUES | {"head.c": np.zeros(1)}) == usual  # not the backbone's
    assert folder(module_config, VALUES | {"backbone.stage1.a": np.array([1, 1 + 1e-15])}) != usual
    swapped = {"backbone.stage1.a": np.ones(2), "backbone.stage1.c": np.arange(3.0)}
    assert folder(module_config, swapped) != usual
    assert folder(module_config, images={"train": "aa", "test": "bc"}) != usual


def test_other_weights_are_not_mixed_in(quick, tmp_path, quick_backbone, capsys):
    """Another path may be given to the same numbers; other numbers are other features."""
    config, finished = quick
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.copy(config.model.pretrained, tmp_path / "copy.safetensors")
    capsys.readouterr()
    probe.train_head(changed(config, model__pretrained=str(tmp_path / "copy.safetensors")), workdir)
    assert f'this run started from "{config.model.pretrained}"' in capsys.readouterr().err
    record = read_run_record(workdir)
    assert record["config"]["model"]["pretrained"] == config.model.pretrained
    write_weights(tmp_path / "other.safetensors", factor=1.01)
    other = changed(config, model__pretrained=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="a head on other features: weights_sha256 was"):
        probe.train_head(other, workdir)
    assert len(cache_files(config, "train.npy")) == 1


def test_another_run_computes_only_what_no_run_has(quick, tmp_path, monkeypatch):
    """Of the standard protocol's sets the official test images, in a new workdir."""
    config, _ = quick
    (train,) = cache_files(config)
    before, computed = train.stat().st_mtime_ns, []

    def program(images):
        computed.append(len(images))
        return quick_program(images)

    monkeypatch.setattr(Backbone, "_program", staticmethod(program))
    other = changed(config, data__protocol="standard", train_for="1 step")
    result = probe.train_head(other, tmp_path / "run")
    assert result.record["result"]["test_count"] == 500
    assert len(computed) == -(-500 // BATCH)
    assert [path.name for path in cache_files(config)] == ["test.npy", "train.npy"]
    assert train.stat().st_mtime_ns == before
