"""Finished runs of `cifar_jax.features`, real ones and a stand-in's."""

import dataclasses

import pytest

from cifar_jax import probe
from cifar_jax.backbone import Backbone
from configs import resnet50_probe
from tests.features.helpers import (
    BATCH,
    COUNT,
    changed,
    quick_program,
    write_weights,
)


@pytest.fixture(scope="package")
def small_data(sample):
    """The first images of the sample, wherever data are loaded in this folder's tests."""
    data = dataclasses.replace(
        sample, train_images=sample.train_images[:COUNT], train_labels=sample.train_labels[:COUNT]
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in ("setup", "data.sources"):
            patch.setattr(f"cifar_jax.{module}.load", lambda *_: data)
        yield data


@pytest.fixture(scope="package")
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


@pytest.fixture(scope="package")
def reference(module_config, small_data, tmp_path_factory):
    """An uninterrupted run with real features."""
    workdir = tmp_path_factory.mktemp("reference")
    probe.train_head(module_config, workdir)
    return workdir


@pytest.fixture(scope="package")
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
