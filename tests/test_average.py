"""Averaged weights and statistics measured anew, against PyTorch's `swa_utils` and NumPy."""

import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from cifar_jax import average, run_weights
from cifar_jax.checkpoint import HEAD_FOLDER, Checkpointer
from cifar_jax.config import to_dict
from cifar_jax.data.splits import fingerprint
from cifar_jax.errors import UserError
from cifar_jax.models.registry import create_model
from cifar_jax.models.transfer import FlattenHead, TransferClassifier
from cifar_jax.pretrained import port
from cifar_jax.recording.run_record import update_run_record
from cifar_jax.run_weights import read_step
from cifar_jax.state import create_state, to_arrays
from cifar_jax.statistics import with_statistics_of
from cifar_jax.trained import load_trained, measure
from experiments.transfer_laptop import config as laptop
from tests.references import torch_resnet50, weights

STEPS = (2, 5)
IMAGES = 64


def test_statistics_are_those_of_pytorchs_update_bn():
    """1e-10 of each statistic's largest value: float64 sums in another order."""
    batches = [weights.natural_images(4, 32, 32, seed=seed) for seed in range(3)]

    def create():
        wide = dict(dtype=np.float64, param_dtype=np.float64, rngs=nnx.Rngs(0))
        return TransferClassifier("torchvision", upsampling=2, head="pooled", dropout=0, **wide)

    with jax.enable_x64(True):
        model = weights.random_model(create)
        before = weights.as_resnet50(weights.variables(model))
        found = weights.as_resnet50(weights.variables(with_statistics_of(model, batches)))
        assert weights.worst(weights.as_resnet50(weights.variables(model)), before) == 0
    theirs = torch_resnet50.ResNet50(num_classes=10).double()
    weights.to_torch(before, theirs)
    enlarged = [np.moveaxis(x.repeat(2, 1).repeat(2, 2) / 255, -1, 1) for x in batches]
    torch.optim.swa_utils.update_bn([torch.from_numpy(x.copy()) for x in enlarged], theirs)
    expected = weights.from_torch(theirs.state_dict(), before)
    assert weights.worst(found, expected) < 1e-10
    assert weights.worst(before, expected) > 0.1


def test_dropout_noise_averages_out_of_the_statistics():
    """Each batch has masks of its own: the mean's relative error goes with their number."""
    batches = [weights.natural_images(16, 32, 32, seed=seed) for seed in range(24)]

    class Head(nnx.Module):
        def __init__(self, rate):
            self.head = FlattenHead(
                12, 10, dropout=rate, dtype=np.float32, param_dtype=np.float32, rngs=nnx.Rngs(0)
            )

        def __call__(self, images, *, train, keys):
            maps = images[:, ::16, ::16].astype(np.float32)
            return self.head(maps, train=train, keys=keys, axis_name=None)

    plain, dropped = (
        np.asarray(with_statistics_of(Head(rate), batches).head.norm2.mean) for rate in (0.0, 0.5)
    )
    # 384 examples, each kept or doubled at even odds: 1 / sqrt(384) = 0.05 where all are alike.
    assert np.linalg.norm(dropped - plain) < 0.1 * np.linalg.norm(plain)


def save_run(workdir, sample, splits, *, freeze="", **model):
    """Two checkpoints as a run of the sample leaves them; returns the weights of both."""
    config = laptop.get_config()
    config.freeze.layers = freeze
    config.data.source = "sample"
    config.schedule.warmup = "0 steps"
    config.model.update(**{"upsampling": 1, **model})
    extra = {
        "config": to_dict(config),
        "splits_sha256": fingerprint(splits),
        "data_sha256": sample.sha256,
    }
    network = weights.random_model(lambda: create_model(config.model, seed=0))
    checkpointer = Checkpointer(workdir, keep=2)
    found = []
    for step, accuracy in zip(STEPS, (0.9, 0.4), strict=True):
        state = create_state(network, optax.sgd(0.1), seed=0)
        checkpointer.save(step, to_arrays(state), extra, accuracy=accuracy)
        found.append({name: np.asarray(x) for name, x in weights.variables(network).items()})
        kernel = network.backbone.stage4.block1.conv1.kernel
        kernel.set_value(kernel[...] * 1.5)
    checkpointer.wait()
    checkpointer.close()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory, sample, sample_splits):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    return workdir, save_run(workdir, sample, sample_splits, test_time_flip=True)


def parameters(values):
    return {name: x for name, x in values.items() if not name.endswith((".mean", ".var"))}


def test_the_mean_of_all_checkpoints(run, tmp_path, monkeypatch, capsys, sample_splits):
    workdir, (first, second) = run
    dest = tmp_path / "mean.safetensors"
    command = ["average", str(workdir), "--checkpoint=all", str(dest), f"--images={IMAGES}"]
    monkeypatch.setattr(sys, "argv", command)
    average.main()
    told = json.loads(capsys.readouterr().out)
    assert told["checkpoints"] == [f"{workdir}, step {step}" for step in STEPS]
    assert told["pretrained_sha256"] is None

    written = port.read(dest)
    assert written.header.source == "mean of run, step 2; run, step 5, with statistics of its own"
    assert written.header.test_time_flip and written.header.upsampling == 1
    for name, x in parameters(written.values).items():
        wide = (first[name].astype(np.float64) + second[name]) / 2
        np.testing.assert_array_equal(x, wide.astype(np.float32), err_msg=name)
    moved = "backbone.stage4.block1.norm1.var"
    assert not np.allclose(written.values[moved], first[moved], rtol=0.1)
    plain = read_step(workdir, STEPS[0]).weights.header
    assert written.header.sha256 != plain.sha256

    # What was told is what the file does, mirror images included.
    trained = load_trained(weights=dest)
    assert trained.model.test_time_flip
    totals = measure(trained, sample_splits["validation"], batch_size=160)
    assert told["count"] == totals.count == 160
    assert told["accuracy"] == totals.means()["accuracy"]
    assert told["loss"] == pytest.approx(totals.means()["loss"], rel=1e-4)


@pytest.mark.slow
def test_another_size_moves_statistics_alone(run, tmp_path):
    workdir, (best, _) = run
    found = {}
    for size in (None, 2):
        dest = tmp_path / f"{size}.safetensors"
        average.average([workdir], dest, checkpoint="best", upsampling=size, images=IMAGES)
        found[size] = port.read(dest)
        for name, x in parameters(found[size].values).items():
            np.testing.assert_array_equal(x, best[name], err_msg=name)
    assert found[2].header.upsampling == 2 and load_trained(weights=dest).model.upsampling == 2
    name = "backbone.stage3.block1.norm1.mean"
    assert weights.error(found[2].values[name], found[None].values[name]) > 0.01


@pytest.mark.slow
def test_what_was_frozen_keeps_its_statistics(tmp_path, sample, sample_splits):
    first, second = save_run(tmp_path / "run", sample, sample_splits, freeze="stem stage1")
    dest = tmp_path / "a.safetensors"
    average.average([tmp_path / "run"], dest, images=IMAGES)
    found = port.read(dest).values
    for name in second:
        if name.endswith((".mean", ".var")):
            is_frozen = "stem" in name or "stage1" in name
            assert np.array_equal(found[name], second[name]) == is_frozen, name


@pytest.mark.slow
def test_where_all_norms_were_frozen_nothing_is_measured(tmp_path, sample, sample_splits, capsys):
    _, latest = save_run(tmp_path / "run", sample, sample_splits, batch_norm="frozen")
    dest = tmp_path / "a.safetensors"
    average.average([tmp_path / "run"], dest, upsampling=2)
    found = port.read(dest)
    assert found.header.source == "run, step 5" and found.header.upsampling == 2
    for name, x in found.values.items():
        np.testing.assert_array_equal(x, latest[name], err_msg=name)
    assert "no batch norm moves its statistics: none are measured" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_and_what_went_on_from_its_weights_at_another_size(tmp_path, sample, sample_splits):
    published = {"sha256": "published", "initial": None}
    origins = {"first": published, "second": {"sha256": "first's", "initial": published}}
    kept = []
    for upsampling, (name, origin) in enumerate(origins.items(), start=1):
        same = dict(batch_norm="eval", upsampling=upsampling)
        kept.extend(save_run(tmp_path / name, sample, sample_splits, **same))
        update_run_record(tmp_path / name, weights=origin)
    kernel = "backbone.stage4.block1.conv1.kernel"
    dest = tmp_path / "mean.safetensors"
    runs = [tmp_path / name for name in origins]
    told = average.average(runs, dest, checkpoint="all", upsampling=2)
    assert told["pretrained_sha256"] == "published"
    found = port.read(dest)
    assert found.header.upsampling == 2
    wide = sum(each[kernel].astype(np.float64) for each in kept) / len(kept)
    assert len(kept) == 4 and not np.allclose(wide, kept[0][kernel])
    np.testing.assert_array_equal(found.values[kernel], wide.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(preprocessing="unit"), "config.model.preprocessing is 'unit'"),
        (dict(upsampling=3), "config.model.upsampling is 3, of .* 1; choose one"),
        (dict(freeze="stem"), "config.freeze.layers is 'stem'"),
    ],
)
def test_runs_of_two_models_have_no_mean(run, tmp_path, change, message, sample, sample_splits):
    other = tmp_path / "other"
    save_run(other, sample, sample_splits, **{"test_time_flip": True, **change})
    with pytest.raises(UserError, match=message):
        average.average([run[0], other], tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_runs_of_two_origins_have_no_mean(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(run[0], other)
    update_run_record(other, weights={"sha256": "abc"})
    with pytest.raises(UserError, match="the file it started from is 'abc', of .*/run, step 5"):
        average.average([run[0], other], tmp_path / "a.safetensors")
    # Without a file, weights are drawn: two seeds have no common start.
    (other / "run.json").unlink()
    read = average_reading(monkeypatch, lambda workdir: {"seed": int(workdir == other)})
    with pytest.raises(UserError, match="config.seed is 1, of .*/run, step 5 0"):
        average.average([run[0], other], tmp_path / "a.safetensors")
    assert len(read) == 2


def average_reading(monkeypatch, changes):
    """Has every checkpoint read with changes in its configuration; returns what was read."""
    plain, read = run_weights.read_step, []

    def read_changed(workdir, step):
        found = plain(workdir, step)
        config = {**found.extra["config"], **changes(workdir)}
        read.append(workdir)
        return dataclasses.replace(found, extra={**found.extra, "config": config})

    monkeypatch.setattr(run_weights, "read_step", read_changed)
    return read


def test_images_of_other_splits_are_refused(run, tmp_path, monkeypatch):
    data = laptop.get_config().data.to_dict()
    changed = {"data": {**data, "source": "sample", "split_seed": 7}}
    average_reading(monkeypatch, lambda workdir: changed)
    with pytest.raises(UserError, match="a run on other images or splits than sample"):
        average.average([run[0]], tmp_path / "a.safetensors")


def test_what_no_average_can_be_made_of(run, tmp_path):
    dest = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="expected a name that ends in .safetensors"):
        average.average([run[0]], tmp_path / "a.npz")
    with pytest.raises(UserError, match="holds no latest checkpoint"):
        average.average([tmp_path], dest, checkpoint="all")
    with pytest.raises(UserError, match="run is named 2 times"):
        average.average([run[0], run[0] / ".." / run[0].name], dest)
    (tmp_path / "probe" / HEAD_FOLDER).mkdir(parents=True)
    with pytest.raises(UserError, match="a head on frozen features"):
        average.average([tmp_path / "probe"], dest)
    dest.mkdir()
    with pytest.raises(UserError, match="a.safetensors is a folder"):
        average.average([run[0]], dest)


def test_a_flatten_head_reads_one_size(tmp_path, sample, sample_splits):
    save_run(tmp_path / "run", sample, sample_splits, head="flatten")
    with pytest.raises(UserError, match="--upsampling 2: .*/run, step 5 has a flatten head"):
        average.average([tmp_path / "run"], tmp_path / "a.safetensors", upsampling=2)
