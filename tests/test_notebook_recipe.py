"""The notebook's transfer recipe: what configs/resnet50.py says, and what its experiment starts."""

import signal

import numpy as np
import pytest

from cifar_jax import config as configuration
from cifar_jax.models import resnet50 as network
from cifar_jax.pretrained import names, ours
from cifar_jax.train import train_and_evaluate
from configs import resnet50
from experiments.notebook_recipe import run
from tests.references import weights
from tests.runs import assert_same_run
from tests.test_header import HEADER
from tests.test_train import send_in

RECIPE = {
    "train_for": "10 epochs",
    "batch_size": 32,
    "data.protocol": "notebook",
    "model.variant": "keras",
    "model.pretrained": "keras",
    "model.preprocessing": "unit",
    "model.upsampling": 8,
    "model.interpolation": "nearest",
    "model.head": "flatten",
    "model.dropout": 0.5,
    "model.batch_norm": "train",
    "model.compute_dtype": "float32",
    "optimizer.name": "rmsprop",
    "optimizer.learning_rate": 2e-5,
    "optimizer.decay": 0.9,
    "optimizer.momentum": 0.0,
    "optimizer.epsilon": 1e-7,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0,
    "schedule.name": "constant",
    "schedule.warmup": "0 steps",
    "label_smoothing": 0.0,
    "ema_decay": 0.0,
    "freeze.layers": "",
    "augment.flip": False,
    "augment.policy": "none",
}


def test_the_recipe_is_the_notebooks():
    found = dict(configuration.flatten(resnet50.get_config()))
    assert {key: found[key] for key in RECIPE} == RECIPE


def test_the_experiment_starts_both_sides_from_the_file(tmp_path):
    """Its images are the command's; the head is drawn, all else is the file's."""
    structure = names.Structure("torchvision")
    source = {
        name: weights.draw(name, shape).astype(np.float32)
        for name, shape in names.shapes(structure).items()
    }
    ours.write(tmp_path / "source.safetensors", source, HEADER)
    run.write_keras_variant(tmp_path / "source.safetensors", tmp_path / "file.safetensors")
    config = run.recipe(tmp_path / "file.safetensors")
    config["data"]["source"] = "sample"
    config["model"]["upsampling"] = 1  # of a smaller head
    train, initial = run.start(config)
    assert len(train) == 1440
    for name, array in source.items():
        np.testing.assert_array_equal(initial[f"backbone.{name}"], array, err_msg=name)
    assert not np.any(initial["backbone.stage2.block1.conv1.bias"])
    assert np.std(initial["head.dense1.kernel"]) > 0


@pytest.mark.slow
def test_the_recipe_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Bit for bit: optimizer, dropout and the head's statistics too; on a narrow network."""
    monkeypatch.setattr(network, "STAGE_BLOCKS", (1, 1, 1, 1))
    monkeypatch.setattr(network, "STAGE_WIDTHS", (8, 16, 32, 64))
    config = resnet50.get_config()
    config.data.source, config.model.pretrained, config.model.upsampling = "sample", "none", 1
    config.train_for = "8 steps"
    config.evaluate_every = config.checkpoint_every = "4 steps"
    config.log_every = "1 step"
    config.eval_batch_size = 80
    train_and_evaluate(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        send_in(patch, "dispatch", at_call=6)
        stopped = train_and_evaluate(config, tmp_path / "parts")
    assert stopped.stopped_by == signal.SIGTERM and stopped.step == 6
    train_and_evaluate(config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
