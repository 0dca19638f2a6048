"""A head on cached features: finished, damaged and stopped runs."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from flax import nnx

from cifar_jax import probe
from cifar_jax.backbone import Backbone
from cifar_jax.checkpoint import FOLDER, Checkpointer, find_step, read_checkpoint
from cifar_jax.errors import RunError, UserError
from cifar_jax.initial import start_state
from cifar_jax.loop import Loop
from cifar_jax.models.mlp import MLP
from cifar_jax.optim import OptimizerConfig, make_optimizer
from cifar_jax.recording.run_record import read_run_record
from cifar_jax.state import create_state, to_arrays
from cifar_jax.trained import load_trained
from configs import common
from tests.features.helpers import COUNT, TOTAL, cache_files, changed, without_weights
from tests.runs import assert_same_run


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
