"""Configurations: durations, rules, and what a resumed run may change."""

import copy
import dataclasses
import functools
import importlib
import json
import re
import tomllib

import ml_collections
import pytest
from flax import nnx

from cifar_jax import config as configuration
from cifar_jax.augment import Augment
from cifar_jax.command import read_flags
from cifar_jax.durations import Duration
from cifar_jax.errors import UserError
from cifar_jax.initial import load_initial_weights
from cifar_jax.models.registry import create_model
from cifar_jax.optim import OptimizerConfig
from cifar_jax.setup import Setup, set_up
from cifar_jax.train import train_and_evaluate
from cifar_jax.trained import load_trained
from configs import common, mlp, resnet50
from tests.runs import ROOT


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10 epochs", 11250),
        ("1 epoch", 1125),
        ("0.5 epochs", 562),
        ("500 steps", 500),
        ("1 step", 1),
    ],
)
def test_durations(text, steps):
    assert Duration.parse(text, key="train_for").steps(1125) == steps


@pytest.mark.parametrize(
    "text", ["", "10", "epochs", "ten epochs", "10 hours", "-1 epochs", "1.5 steps", "nan steps"]
)
def test_wrong_durations_name_the_key(text):
    with pytest.raises(UserError, match="config.train_for"):
        Duration.parse(text, key="train_for")


def test_what_features_have_no_use_for_is_turned_off_by_the_flags_of_the_message():
    common_values = dict(configuration.flatten(common.get_config()))
    off = configuration.NOT_WITH_FEATURES
    assert {key: common_values[key] for key in off} == off
    assert {key for key in common_values if key.startswith("augment.")} < set(off)
    argv = ["features", f"--config={ROOT / 'configs/resnet50_best.py'}"]
    argv += ["--config.progressive=2 until 1 epoch", "--config.freeze.layers=stem"]
    with pytest.raises(UserError, match="config.augment.policy is 'trivial', .* once") as caught:
        configuration.check_features(configuration.to_dict(read_flags(["config"], argv)[0].config))
    argv += re.findall(r"--\S+", str(caught.value))
    configuration.check_features(configuration.to_dict(read_flags(["config"], argv)[0].config))


def test_every_field_has_a_rule_and_every_rule_a_field():
    fields = dict(configuration.flatten(common.get_config()))
    assert set(fields) == set(configuration.RULES)


class NotingDict(dict):
    """A dictionary that notes which of its keys are read one by one."""

    def __init__(self, content, noted, prefix=""):
        super().__init__(content)
        self.noted, self.prefix = noted, prefix

    def __getitem__(self, key):
        self.noted.add(self.prefix + key)
        value = super().__getitem__(key)
        nested = isinstance(value, dict)
        return NotingDict(value, self.noted, f"{self.prefix}{key}.") if nested else value


def test_a_run_reads_every_field(small_config, tmp_path, monkeypatch):
    noted = set()
    to_dict = configuration.to_dict
    monkeypatch.setattr(configuration, "to_dict", lambda c: NotingDict(to_dict(c), noted))
    small_config.train_for = "2 steps"
    train_and_evaluate(small_config, tmp_path)
    resnet = NotingDict(to_dict(resnet50.get_config()), noted)["model"]
    nnx.eval_shape(lambda: create_model(resnet, seed=0))
    with pytest.raises(UserError, match="nowhere.safetensors"):
        resnet.update(pretrained="nowhere.safetensors")
        load_initial_weights(None, resnet, tell=pytest.fail)
    # Passed on whole: each of them is seen to change an update in test_optim.py. The precision is
    # read from the configuration itself, around all of this.
    elsewhere = {f"optimizer.{field.name}" for field in dataclasses.fields(OptimizerConfig)}
    elsewhere |= {"freeze.features"}  # read by cifar_jax.features: tests/features/
    elsewhere |= {f"augment.{field.name}" for field in dataclasses.fields(Augment)}  # test_augment
    assert set(configuration.RULES) - noted - elsewhere == {"matmul_precision"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[!c]*.py")), ids=lambda p: p.stem)
def test_the_shipped_configurations_pass(path):
    configuration.check(importlib.import_module(f"configs.{path.stem}").get_config())


@pytest.mark.parametrize(
    ("file", "run"),
    [
        ("configs/resnet50_cpu.py", "three_epochs"),
        ("experiments/time_to_accuracy/config.py", "one_cycle_seed1"),
    ],
)
def test_a_configuration_is_what_its_results_were_made_with(file, run):
    """A change of either, or of what it is built on, asks for runs of its own."""
    (config, _) = read_flags(["config"], ["test", f"--config={ROOT / file}"])
    ours = dict(configuration.flatten(configuration.to_dict(config.config)))
    record = json.loads((ROOT / "experiments/time_to_accuracy" / run / "run.json").read_text())
    theirs = dict(configuration.flatten(record["config"]))
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    # Written in other words: "1 epoch", "1 epochs".
    same = {"evaluate_every", "progressive"} if run == "three_epochs" else {"seed"}
    assert differing == same | {"model.pretrained"}


def test_a_missing_and_a_surplus_field_are_named():
    config = ml_collections.ConfigDict(mlp.get_config())
    del config.optimizer.decay
    with pytest.raises(UserError, match="config.optimizer.decay is missing"):
        configuration.check(config)
    config.optimizer.decay = 0.9
    config.optimizer.rho = 0.9
    with pytest.raises(UserError, match="config.optimizer.rho is not a known field"):
        configuration.check(config)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"optimizer.learning_rate": 0.5, "batch_size": 64}, "batch_size was 32 and is 64; optim"),
        ({"train_for": "20 epochs"}, None),  # a constant rate does not depend on the end
        ({"train_for": "20 epochs", "schedule.name": "cosine"}, "train_for"),
        ({"data.directory": "elsewhere", "keep_checkpoints": 5}, None),
        ({"eval_batch_size": 64}, None),
        ({"steps_per_call": 3}, "steps_per_call"),  # another compiled program, other last bits
    ],
)
def test_what_a_resumed_run_may_change(changes, differing):
    config = common.get_config()
    if "schedule.name" in changes:
        config.schedule.name = changes.pop("schedule.name")
    saved = configuration.to_dict(config)
    config.update_from_flattened_dict(changes)
    check = lambda: configuration.check_same_run(  # noqa: E731
        configuration.to_dict(config), saved, workdir="runs/a"
    )
    if differing is None:
        check()
    else:
        with pytest.raises(UserError, match=differing):
            check()


def test_a_wheel_holds_the_configurations():
    """Without them an installed package can train nothing."""
    setuptools = pytest.importorskip("setuptools")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    find = project["tool"]["setuptools"]["packages"]["find"]
    found = setuptools.find_namespace_packages(str(ROOT), **find)
    assert {"cifar_jax", "cifar_jax.models", "configs"} <= set(found)
    assert {name.partition(".")[0] for name in found} == {"cifar_jax", "configs"}


@pytest.mark.parametrize("read", [load_trained, train_and_evaluate], ids=lambda f: f.__name__)
def test_a_run_of_another_version_is_told(small_config, tmp_path, monkeypatch, read):
    """One line for whoever goes on with it or reads it, and nothing of it is lost."""
    small_config.train_for = "1 step"
    identity = Setup.identity

    def older(setup):
        saved = copy.deepcopy(identity(setup))
        del saved["config"]["data"]["images_a_class"]
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(Setup, "identity", older)
        train_and_evaluate(small_config, tmp_path)
    arguments = (tmp_path,) if read is load_trained else (small_config, tmp_path)
    with pytest.raises(UserError, match="of another version of cifar_jax, .* data.images_a_class"):
        read(*arguments)


def test_what_is_not_read_is_told_at_the_start(small_config, capsys):
    small_config.optimizer.beta1 = 0.5
    set_up(configuration.to_dict(small_config), functools.partial(create_model, seed=0))
    assert "note: config.optimizer.beta1 is 0.5, which config.optim" in capsys.readouterr().err
