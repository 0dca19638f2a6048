"""A head on cached features: the features are the backbone's, and the cache survives anything."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cifar_jax import config as configuration
from cifar_jax import features, knn, main, predict, probe
from cifar_jax.backbone import Backbone
from cifar_jax.checkpoint import FOLDER, Checkpointer, find_step, read_checkpoint
from cifar_jax.config import flatten, to_dict
from cifar_jax.data.content import aligned
from cifar_jax.data.splits import make_splits
from cifar_jax.errors import RunError, UserError
from cifar_jax.evaluate import evaluate
from cifar_jax.feature_cache import FeatureCache
from cifar_jax.initial import start_state
from cifar_jax.labels import CLASS_NAMES
from cifar_jax.loop import Loop
from cifar_jax.models.mlp import MLP
from cifar_jax.models.transfer import PREPROCESSINGS, TransferClassifier
from cifar_jax.optim import OptimizerConfig, make_optimizer
from cifar_jax.parts import part_names
from cifar_jax.pretrained import ours
from cifar_jax.pretrained.names import Structure, shapes
from cifar_jax.recording.run_record import read_run_record
from cifar_jax.run_weights import read_run
from cifar_jax.state import create_state, to_arrays
from cifar_jax.train import train_and_evaluate
from cifar_jax.trained import load_trained
from configs import common, mlp, resnet50_probe
from tests.references import weights
from tests.runs import ROOT, assert_same_run
from tests.test_knn import reference as knn_reference

COUNT = 104  # of the sample's images: 76 train, 8 validate, 20 test
BATCH = 16
TOTAL = 8  # 2 epochs of 4 steps


def write_weights(path, *, factor=1.0):
    """A file of ours with a whole backbone of trained-like random weights."""
    values = {
        name: (weights.draw(name, shape) * (factor if name == "stem_conv.kernel" else 1)).astype(
            np.float32
        )
        for name, shape in shapes(Structure("torchvision")).items()
    }
    header = ours.Header(
        source="random", sha256="", md5="", naming="torchvision", variant="torchvision",
        preprocessing="torchvision", license="none",
    )  # fmt: skip
    ours.write(path, values, header)


@pytest.fixture(scope="module")
def small_data(sample):
    """The first images of the sample, wherever data are loaded."""
    data = dataclasses.replace(
        sample, train_images=sample.train_images[:COUNT], train_labels=sample.train_labels[:COUNT]
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in ("setup", "data.sources"):
            patch.setattr(f"cifar_jax.{module}.load", lambda *_: data)
        yield data


@pytest.fixture(scope="module")
def module_config(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    write_weights(place / "weights.safetensors")
    config = resnet50_probe.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "sample",
            "data.directory": str(place),
            "model.pretrained": str(place / "weights.safetensors"),
            "model.upsampling": 1,
            "train_for": "2 epochs",
            "batch_size": BATCH,
            "eval_batch_size": BATCH,
            "steps_per_call": 2,
            "log_every": "2 steps",
        }
    )
    return config


@pytest.fixture(scope="module")
def reference(module_config, small_data, tmp_path_factory):
    """An uninterrupted run with real features."""
    workdir = tmp_path_factory.mktemp("reference")
    probe.train_head(module_config, workdir)
    return workdir


def quick_program(images):
    """A stand-in for the network: some function of each image alone."""
    rows = images.reshape(len(images), 1, 1, -1)[..., :2048].astype(np.float32)
    return np.sin(rows / 50)


@pytest.fixture(scope="module")
def quick(module_config, small_data, tmp_path_factory):
    """An uninterrupted run with the stand-in's features: its configuration and workdir."""
    place = tmp_path_factory.mktemp("quick")
    config = changed(module_config, data__directory=str(place / "data"), model__dropout=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backbone, "_program", staticmethod(quick_program))
        probe.train_head(config, place / "run")
    return config, place / "run"


@pytest.fixture
def quick_backbone(monkeypatch):
    monkeypatch.setattr(Backbone, "_program", staticmethod(quick_program))


@pytest.fixture
def no_backbone(monkeypatch):
    monkeypatch.setattr(Backbone, "_program", lambda *_: pytest.fail("the backbone was used"))


@contextlib.contextmanager
def without_weights(config):
    """Their file lies elsewhere meanwhile."""
    path = pathlib.Path(config.model.pretrained)
    path.rename(path.with_suffix(".elsewhere"))
    try:
        yield
    finally:
        path.with_suffix(".elsewhere").rename(path)


def cache_files(config, pattern="*.npy"):
    return sorted(pathlib.Path(config.data.directory, "features").glob(f"*/{pattern}"))


def cached(config):
    (path,) = cache_files(config)
    return np.load(path)


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


# --- The numbers ---------------------------------------------------------------------------------


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


# --- The cache -----------------------------------------------------------------------------------

SHAPE = (50, 1, 1, 6)


def rows_from(start, *, stop=SHAPE[0]):
    """Blocks of at most 8 rows; each number tells its place."""
    for first in range(start, stop, 8):
        last = min(first + 8, stop)
        yield np.arange(first * 6, last * 6, dtype=np.float32).reshape(-1, 1, 1, 6)


EVERYTHING = np.arange(50 * 6, dtype=np.float32).reshape(SHAPE)


def fill(cache, **options):
    cache.fill("train", SHAPE, batch_size=8, compute=lambda start: rows_from(start, **options))


@pytest.fixture
def cache(tmp_path):
    return FeatureCache(tmp_path, {"weights": "some"})


@pytest.mark.parametrize("tail", [b"", b"\x01" * 7, b"\x02" * 24 * 3])
def test_an_interrupted_set_goes_on_and_ends_with_the_same_bytes(tail, cache, tmp_path):
    fill(cache)
    whole = cache.path("train").read_bytes()
    found = cache.read("train", SHAPE)
    np.testing.assert_array_equal(found, EVERYTHING, strict=True)
    assert aligned(found) is found  # the pipeline takes it where it lies
    other = FeatureCache(tmp_path / "other", cache.key)
    fill(other, stop=16)
    assert other.read("train", SHAPE) is None
    partial = other.folder / "train.partial"
    partial.write_bytes(partial.read_bytes() + tail)  # of a block that was being written
    starts = []

    def rest(start):
        starts.append(start)
        return rows_from(start)

    other.fill("train", SHAPE, batch_size=8, compute=rest)
    assert starts == [16]
    assert other.path("train").read_bytes() == whole and not partial.exists()


def test_a_damaged_beginning_is_begun_again(cache):
    fill(cache, stop=16)
    (cache.folder / "train.partial").write_bytes(b"?" * 300)
    fill(cache)
    np.testing.assert_array_equal(cache.read("train", SHAPE), EVERYTHING)


def test_killed_while_it_is_written(cache, tmp_path):
    code = (
        "import sys, time\nfrom tests.test_features import *\n"
        "def slowly(start):\n"
        "    for block in rows_from(start):\n        yield block\n        time.sleep(0.3)\n"
        f"FeatureCache({str(tmp_path)!r}, {cache.key!r})"
        ".fill('train', SHAPE, batch_size=8, compute=slowly)\n"
    )
    partial = cache.folder / "train.partial"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        try:
            deadline = time.monotonic() + 60
            while not (partial.exists() and partial.stat().st_size > 128 + 8 * 24):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.01)
            with pytest.raises(UserError, match="is in use by another run"):
                fill(cache)
        finally:
            process.kill()
    fill(cache)
    np.testing.assert_array_equal(cache.read("train", SHAPE), EVERYTHING)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "cut in its header": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "a text": lambda path: path.write_text("no features"),
    "objects": lambda path: np.save(path, np.array([{}]), allow_pickle=True),
    "another shape": lambda path: np.save(path, EVERYTHING[:-1]),
    "another type": lambda path: np.save(path, EVERYTHING.astype(np.float64)),
    "other numbers": lambda path: np.save(path, -EVERYTHING),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "without its digest": lambda path: (path.parent / "about.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_in_one_line(damage, cache):
    fill(cache)
    DAMAGES[damage](cache.path("train"))
    with pytest.raises(UserError) as caught:
        cache.read("train", SHAPE)
    text = str(caught.value)
    assert text.startswith(f"{cache.path('train')} is damaged (") and "\n" not in text
    assert "delete it" in text and type(caught.value) is UserError


def test_too_small_a_disk_is_said_before_anything_is_computed(cache, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(9e9, 8e9, 1e9))
    wanted = {"train": (50_000, 8, 8, 2048), "test": (10_000, 8, 8, 2048)}
    with pytest.raises(UserError, match=r"need 31\.46 GB, the disk has 1\.00 GB free"):
        cache.check_space(wanted)
    cache.check_space({"train": (50_000, 1, 1, 2048)})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    fill(cache, stop=24)  # 1,328 bytes in all, 704 of them written
    cache.check_space({"train": SHAPE})


def test_a_full_disk_is_one_line(cache):
    def full(start):
        yield from rows_from(start, stop=8)
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"train\.partial: cannot be written \(No space left"):
        cache.fill("train", SHAPE, batch_size=8, compute=full)
    fill(cache)
    np.testing.assert_array_equal(cache.read("train", SHAPE), EVERYTHING)


# --- The run -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see errors.py
def test_a_finished_run_is_shown_again_and_a_damaged_model_made_again(
    quick, small_data, no_backbone, tmp_path
):
    config, finished = quick
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    first = read_run_record(workdir)
    before = {path: path.stat().st_mtime_ns for path in (workdir / FOLDER).rglob("*")}
    elsewhere = changed(config, data__directory=str(tmp_path))  # and its features are not there
    with without_weights(config):
        again = probe.train_head(elsewhere, workdir)
        with pytest.raises(UserError, match="no.pth: no such file of weights"):
            probe.train_head(changed(elsewhere, model__pretrained="no.pth"), workdir)
        with pytest.raises(UserError, match="data.split_seed was 42 and is 3"):
            probe.train_head(changed(elsewhere, data__split_seed=3), workdir)
    assert not (tmp_path / "features").exists()
    assert again.record["result"] == first["result"]
    assert first["weights"] and again.record["weights"] == first["weights"]
    assert len(again.record["test_reads"]) == 1
    assert len(again.record["starts"]) == len(first["starts"]) + 1
    assert {path: path.stat().st_mtime_ns for path in (workdir / FOLDER).rglob("*")} == before
    for file in (workdir / FOLDER / str(TOTAL) / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-7])
    probe.train_head(config, workdir)
    assert load_trained(workdir).step == TOTAL
    assert load_trained(workdir, "best").step == find_step(finished, "best")


@pytest.fixture
def with_two_models(quick, tmp_path):
    """A finished run whose best head is not its latest one: configuration, workdir, best step."""
    config, finished = quick
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    best = TOTAL // 2
    for step, accuracy in ((best, 0.9), (TOTAL, 0.1)):
        file = workdir / probe.HEAD_FOLDER / FOLDER / str(step) / "metrics" / "metrics"
        assert file.exists()
        file.write_text(json.dumps({"validation_accuracy": accuracy}))
    probe.train_head(config, workdir)
    assert load_trained(workdir, "best").step == best and load_trained(workdir).step == TOTAL
    return config, workdir, best


def truncate(workdir, step):
    for file in (workdir / FOLDER / str(step) / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see errors.py
def test_a_damaged_best_head_does_not_cost_its_model(with_two_models, no_backbone, capsys):
    config, workdir, best = with_two_models
    truncate(workdir / probe.HEAD_FOLDER, best)
    probe.train_head(config, workdir)
    assert load_trained(workdir, "best").step == best
    truncate(workdir, TOTAL)  # all of it is written again
    probe.train_head(config, workdir)
    assert load_trained(workdir, "best").step == best and load_trained(workdir).step == TOTAL
    capsys.readouterr()
    truncate(workdir, best)
    probe.train_head(config, workdir)
    told = capsys.readouterr().err
    assert f"/{best} is damaged" in told and "; the whole model is written without it" in told
    assert load_trained(workdir).step == load_trained(workdir, "best").step == TOTAL


@pytest.mark.slow
def test_a_head_that_cannot_be_read_for_now_costs_nothing(with_two_models, no_backbone):
    config, workdir, best = with_two_models
    shutil.rmtree(workdir / FOLDER / str(TOTAL))  # so that the model is to be written again
    whole = read_checkpoint

    def refuse(place, step):
        if place.name == probe.HEAD_FOLDER and step == best:
            raise RunError("cannot be read")
        return whole(place, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cifar_jax.whole_model.read_checkpoint", refuse)
        with pytest.raises(RunError, match="cannot be read"):
            probe.train_head(config, workdir)
    assert load_trained(workdir).step == best
    probe.train_head(config, workdir)
    assert load_trained(workdir, "best").step == best and load_trained(workdir).step == TOTAL


@pytest.mark.parametrize("folder", [probe.HEAD_FOLDER, "."])
def test_a_damaged_file_of_accuracies_does_not_stop_it(with_two_models, no_backbone, folder):
    config, workdir, best = with_two_models
    file = workdir / folder / FOLDER / str(best) / "metrics" / "metrics"
    file.write_text(file.read_text()[:9])
    probe.train_head(config, workdir)
    assert load_trained(workdir, "best").step == best and load_trained(workdir).step == TOTAL


@pytest.mark.slow
def test_another_head_of_the_same_step_is_not_left_unwritten(with_two_models, no_backbone):
    config, workdir, best = with_two_models
    head = Checkpointer(workdir / probe.HEAD_FOLDER, keep=3)
    arrays, extra = read_checkpoint(workdir / probe.HEAD_FOLDER, TOTAL)
    name = "params.head.logits.bias"
    head.save(TOTAL, {**arrays, name: arrays[name] + 1}, extra, accuracy=0.1)
    head.wait()
    head.close()
    probe.train_head(config, workdir)
    whole = read_checkpoint(workdir, TOTAL)[0]
    np.testing.assert_array_equal(whole[name], arrays[name] + 1)


def test_a_finished_run_without_a_test_needs_neither_weights_nor_features(
    quick, quick_backbone, tmp_path, monkeypatch
):
    """As every run of a sweep that is started again."""
    config = changed(quick[0], test=False)
    probe.train_head(config, tmp_path / "run")
    monkeypatch.setattr(probe, "load_backbone", lambda *_: pytest.fail("weights were read"))
    elsewhere = changed(config, data__directory=str(tmp_path))
    with without_weights(config):
        assert probe.train_head(elsewhere, tmp_path / "run").step == TOTAL


@pytest.mark.slow
def test_stopped_anywhere_it_ends_the_same(quick, quick_backbone, tmp_path, monkeypatch):
    """While features are computed, then while the head is trained (with dropout)."""
    config, finished = quick
    other = changed(config, data__directory=str(tmp_path / "data"))
    workdir = tmp_path / "run"
    original, computed = Backbone.features, []

    def interrupted(self, *args, **options):
        for block in original(self, *args, **options):
            computed.append(len(block))
            if len(computed) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield block

    monkeypatch.setattr(Backbone, "features", interrupted)
    result = probe.train_head(other, workdir)
    assert (result.step, result.stopped_by) == (0, signal.SIGTERM)
    assert cache_files(other) == [] and len(cache_files(other, "*.partial")) == 1

    dispatch = Loop.dispatch

    def interrupted_dispatch(self, *args):
        dispatch(self, *args)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "dispatch", interrupted_dispatch)
        result = probe.train_head(other, workdir)
    assert (result.step, result.stopped_by) == (2, signal.SIGINT)
    assert sum(computed) == COUNT  # nothing was computed twice
    assert cache_files(other)[0].read_bytes() == (cache_files(config, "train.npy")[0].read_bytes())
    assert not (workdir / FOLDER).exists()

    probe.train_head(other, workdir)
    assert_same_run(workdir, finished)
    ours, theirs = (
        read_checkpoint(run / probe.HEAD_FOLDER, TOTAL)[0] for run in (workdir, finished)
    )
    assert any(name.startswith("opt_state") for name in ours)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_only_what_is_missing_is_drawn():
    """Beside given values stand those that a whole creation draws, and a new optimizer's state."""
    optimizer = make_optimizer(OptimizerConfig(**common.get_config().optimizer), lambda step: 1e-3)

    def create():
        return create_state(MLP(hidden_sizes=(5,), rngs=nnx.Rngs(3)), optimizer, seed=3)

    drawn = to_arrays(create())
    given = {"dense1.kernel": np.full((3072, 5), 0.5, np.float32)}
    found = to_arrays(start_state(create, given))
    assert found.keys() == drawn.keys()
    for name, array in found.items():
        expected = given.get(name.removeprefix("params."), drawn[name])
        np.testing.assert_allclose(array, expected, rtol=1e-6, err_msg=name, strict=True)
    np.testing.assert_array_equal(
        to_arrays(start_state(create, None))["params.dense1.kernel"], drawn["params.dense1.kernel"]
    )


# --- The command ---------------------------------------------------------------------------------

CONFIG = f"--config={ROOT / 'configs' / 'resnet50_probe.py'}"


def run_command(module, arguments, capsys, monkeypatch):
    """Runs a command's main; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    for command in (features, main):
        monkeypatch.setattr(command, "set_up_logging", lambda: None)  # global, for a command
    capsys.readouterr()
    try:
        module.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def flags_of(config, workdir):
    names = (
        *("data.source", "data.directory", "model.pretrained", "model.upsampling", "train_for"),
        *("batch_size", "eval_batch_size", "steps_per_call", "log_every"),
    )
    values = dict(flatten(config))
    return [CONFIG, f"--workdir={workdir}", *(f"--config.{name}={values[name]}" for name in names)]


def test_the_command_ends_with_a_table_and_predictions_work(
    reference, module_config, small_data, no_backbone, tmp_path, capsys, monkeypatch
):
    code, output, _ = run_command(features, flags_of(module_config, reference), capsys, monkeypatch)
    assert code == 0
    accuracy = read_run_record(reference)["result"]["test_accuracy"]
    assert f"{accuracy:.4f}" in output and "SAMPLE" in output and "curves.png" in output
    assert f"-m cifar_jax.predict --workdir={reference} PICTURE" in output
    Image.fromarray(small_data.train_images[0]).save(tmp_path / "picture.png")
    predict.main([str(tmp_path / "picture.png"), f"--workdir={reference}", "--json"])
    answer = json.loads(capsys.readouterr().out)[0]
    arrays, _ = read_checkpoint(reference / probe.HEAD_FOLDER, TOTAL)
    logits = cached(module_config)[0, 0, 0] @ arrays["params.head.logits.kernel"]
    logits += arrays["params.head.logits.bias"]
    assert answer["label"] == CLASS_NAMES[logits.argmax()]


def damage_the_cache(place, config):
    """A cache of its own, since the reference's is shared."""
    shutil.copytree(config.data.directory, place / "data")
    for path in (place / "data").glob("features/*/train.npy"):
        path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "no weights": (["--config.model.pretrained=none"], "config.model.pretrained is"),
    "the MLP": (["--config.model.name=mlp"], "only a resnet50 has what it is for"),
    "missing weights": (["--config.model.pretrained=no.pth"], "no.pth"),
    "another variant": (["--config.model.variant=keras"], "config.model.variant=torchvision"),
    "unknown head": (["--config.model.head=none"], "config.model.head"),
    "damaged features": (["--config.data.directory=data"], "train.npy is damaged"),
    "too large a batch": (["--config.batch_size=800"], "config.batch_size is 800"),
    "batch that devices cannot share": (["--config.eval_batch_size=20"], "8 devices"),
    "a workdir of main": (["--workdir=run"], "of cifar_jax.main"),
    "a workdir of others' checkpoints": (
        ["--workdir=odd"],
        "holds checkpoints, but not the run.json of a run",
    ),
    "a data folder that is a file": (["--config.data.directory=text.txt"], "text.txt"),
    "no flags": (None, "--config is missing; for example --config=configs/resnet50_probe.py"),
}


def test_an_mlp_has_no_features():
    with pytest.raises(
        UserError, match='config.model.name is "mlp"; features come from a backbone'
    ):
        configuration.check_features(configuration.to_dict(mlp.get_config()))


@pytest.mark.parametrize("command", [features, main])
def test_missing_weights_are_told_before_images_are_looked_for(
    command, module_config, tmp_path, capsys, monkeypatch
):
    for module in ("setup", "data.sources"):
        monkeypatch.setattr(f"cifar_jax.{module}.load", lambda *_: pytest.fail("images were read"))
    arguments = [*flags_of(module_config, tmp_path / "new"), "--config.model.pretrained=no.pth"]
    code, _, errors = run_command(command, arguments, capsys, monkeypatch)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: config.model.pretrained: no.pth: no such file of weights")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case, reference, module_config, small_data, tmp_path, capsys, monkeypatch, no_backbone
):
    arguments, said = BAD[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no folder")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"config": {}, "features": null}')
    (tmp_path / "odd" / FOLDER / "3").mkdir(parents=True)
    if case == "damaged features":
        damage_the_cache(tmp_path, module_config)
    arguments = [] if arguments is None else [*flags_of(module_config, "new"), *arguments]
    code, _, errors = run_command(features, arguments, capsys, monkeypatch)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    told = ("pretrained tensors from", "note: ", "features go to")
    rest = [x for x in errors.splitlines() if x not in lines and not any(t in x for t in told)]
    assert code == 2
    assert len(lines) == 1 and said in lines[0] and rest == [], errors


def test_main_refuses_a_workdir_of_features(reference, small_data, tmp_path, capsys, monkeypatch):
    before = (reference / "run.json").read_bytes()
    arguments = [f"--config={ROOT / 'configs' / 'mlp.py'}", f"--workdir={reference}"]
    arguments += ["--config.data.source=sample"]
    code, _, errors = run_command(main, arguments, capsys, monkeypatch)
    assert code == 2 and "holds a run of cifar_jax.features, of a head alone" in errors
    assert (reference / "run.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"head": "flatten", "upsampling": 2, "interpolation": "nearest", "dropout": 0.5},
        {"compute_dtype": "bfloat16"},
    ],
    ids=["flatten", "bfloat16"],
)
def test_other_heads_and_precisions_answer_as_the_whole_model(
    changes, module_config, small_data, tmp_path
):
    config = changed(module_config, **{f"model__{key}": x for key, x in changes.items()})
    config.data.directory = str(tmp_path / "data")
    result = probe.train_head(config, tmp_path / "run")
    side = changes.get("upsampling", 1)
    assert cached(config).shape == (COUNT, side, side, 2048)
    found = evaluate(tmp_path / "run", split="test")
    loose = changes.get("compute_dtype") == "bfloat16"  # 8 bits; compiled twice, fused otherwise
    assert found["loss"] == pytest.approx(
        result.record["result"]["test_loss"], rel=1e-2 if loose else 1e-5
    )


@pytest.mark.slow
def test_killed_while_features_are_computed(module_config, tmp_path):
    """The real command on the whole sample, killed in the middle of its images."""

    def start(directory, workdir):
        config = changed(module_config, data__directory=str(directory), eval_batch_size=64)
        command = [sys.executable, "-m", "cifar_jax.features", *flags_of(config, workdir)]
        return subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "a", tmp_path / "run_a")
    output = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, output
    killed = start(tmp_path / "b", tmp_path / "run_b")
    while not any(x.stat().st_size > 4e6 for x in tmp_path.glob("b/features/*/train.partial")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    again = start(tmp_path / "b", tmp_path / "run_b")
    output = again.communicate(timeout=600)[0]
    assert again.returncode == 0, output
    (ours,), (theirs,) = (list(tmp_path.glob(f"{x}/features/*/train.npy")) for x in "ba")
    assert ours.read_bytes() == theirs.read_bytes()
    assert_same_run(tmp_path / "run_b", tmp_path / "run_a")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "batch_norm"), [("stem", "frozen"), ("stage2.block3", "train"), ("stage3", "train")]
)
def test_a_cached_prefix_trains_what_follows(module_config, small_data, tmp_path, part, batch_norm):
    """Step for step what the same run does on images, with that prefix frozen by name."""
    own = {"freeze__features": part, "data__directory": str(tmp_path / "data")}
    own |= {"train_for": "2 steps", "evaluate_every": "2 steps", "model__batch_norm": batch_norm}
    cached = changed(module_config, **own)
    parts = part_names()
    prefix = " ".join(parts[: parts.index(part) + 1])
    own |= {"freeze__features": "stage4", "freeze__layers": prefix}
    direct = changed(module_config, **own)
    results = [
        probe.train_head(cached, tmp_path / "cached"),
        train_and_evaluate(direct, tmp_path / "direct"),
    ]
    ends = [read_checkpoint(tmp_path / name, 2)[0] for name in ("cached", "direct")]
    own_parts = ("params.", "batch_stats.")
    of_model = {name: x for name, x in ends[1].items() if name.startswith(own_parts)}
    assert ends[0].keys() >= of_model.keys()
    for name, expected in of_model.items():
        np.testing.assert_allclose(ends[0][name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    accuracies = [result.record["result"]["test_accuracy"] for result in results]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.051)  # one of 20 images


def test_neighbours_are_found_among_cached_features(
    module_config, small_data, tmp_path, monkeypatch
):
    """Against a loop over the same features; the test split is only read when asked for."""
    monkeypatch.setattr(Backbone, "_program", staticmethod(quick_program))
    config = changed(module_config, data__directory=str(tmp_path))
    found = knn.evaluate_knn(config, (1, 7), test=True)
    splits = make_splits(small_data, protocol="notebook", seed=42)
    splits = {n: dataclasses.replace(s, images=quick_program(s.images)) for n, s in splits.items()}
    expected = {k: knn_reference(splits["train"], splits["validation"], k) for k in (1, 7)}
    assert found["validation"] == pytest.approx(expected)
    best = max((1, 7), key=expected.get)
    assert found["test"] == pytest.approx(
        {best: knn_reference(splits["train"], splits["test"], best)}
    )
    assert knn.evaluate_knn(module_config, (1,), test=False).keys() == {"validation"}


def test_a_signal_during_the_search_ends_it(module_config, monkeypatch):
    """There is nothing to save: only the features, which may take hours, end in order."""
    search = "cifar_jax.neighbours.accuracy_by_k"
    monkeypatch.setattr(search, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        knn.evaluate_knn(module_config, (1,), test=False)


def test_neighbours_need_pooled_features_and_equal_shares(module_config):
    with pytest.raises(UserError, match='config.model.head is "flatten"; neighbours need "pooled"'):
        knn.evaluate_knn(changed(module_config, model__head="flatten"), (1,), test=False)
    with pytest.raises(UserError, match="config.eval_batch_size is 20; .* the 8 devices"):
        knn.evaluate_knn(changed(module_config, eval_batch_size=20), (1,), test=False)
