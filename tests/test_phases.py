"""Phases: which layers are frozen and how large the images are, from which step on."""

import dataclasses
import re

import numpy as np
import pytest

from cifar_jax import config as configuration
from cifar_jax import loop
from cifar_jax.checkpoint import find_step, read_checkpoint
from cifar_jax.errors import UserError
from cifar_jax.evaluate import evaluate
from cifar_jax.models import resnet50 as network
from cifar_jax.models.registry import create_model
from cifar_jax.optim import GROUPS
from cifar_jax.phases import Phase, make_phases
from cifar_jax.setup import describe_start, set_up
from cifar_jax.state import named_leaves, split_model
from cifar_jax.train import train_and_evaluate
from cifar_jax.trained import load_trained
from configs import mlp
from experiments.transfer_laptop import config as laptop
from tests.runs import assert_same_run
from tests.test_train import send_in


def phases(freeze="", progressive="", total=100, accumulate=1):
    config = {
        "freeze": {"layers": freeze},
        "progressive": progressive,
        "model": {"upsampling": 4},
        "optimizer": {"accumulate": accumulate},
    }
    return make_phases(config, steps_per_epoch=10, total=total)


def test_a_run_without_phases_has_one():
    assert phases() == [Phase(0, 4, ())]


def test_both_texts_cut_the_run():
    found = phases("backbone until 1 epoch, stem stage? until 35 steps", "2 until 2 epochs")
    assert found == [
        Phase(0, 2, ("backbone",)),
        Phase(10, 2, ("stem", "stage?")),
        Phase(20, 4, ("stem", "stage?"), resized_at=20),
        Phase(35, 4, (), resized_at=20),
    ]


def test_without_an_end_it_is_the_whole_run():
    assert phases("stem") == [Phase(0, 4, ("stem",))]


def test_ends_in_epochs_are_whole_updates():
    starts = [each.start for each in phases("stem until 1.5 epochs", "2 until 3 epochs", 99, 3)]
    assert starts == [0, 15, 30]
    starts = [each.start for each in phases("stem until 15 steps", "2 until 3 epochs", 98, 7)]
    assert starts == [0, 15, 28]  # which `set_up` refuses


@pytest.mark.parametrize(
    "texts", [dict(progressive="2 until 10 epochs"), dict(freeze="backbone until 10 epochs, typo")]
)
def test_what_a_run_never_comes_to_is_refused(texts):
    with pytest.raises(UserError, match="ends after 100 steps, before what follows step 100"):
        phases(**texts)


def test_adam_does_not_thaw():
    config = laptop.get_config()
    config.freeze.layers = "backbone until 1 epoch"
    for name in ("adam", "adamw"):
        config.optimizer.name = name
        with pytest.raises(UserError, match='use "sgd" or "rmsprop"'):
            configuration.check(config)
    config.freeze.layers = "backbone"
    configuration.check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.layer_decay", 0.8),
        ("optimizer.head_rate", 3.0),
        ("model.test_time_flip", True),
        ("model.batch_norm", "frozen"),
        ("model.remat", True),
        ("freeze.batch_norm", "train"),
        ("model.pretrained", "keras"),
        ("model.preprocessing", "keras"),
        ("model.upsampling", 2),
        ("model.interpolation", "bilinear"),
        ("model.head", "pooled"),
        ("model.dropout", 0.2),
        ("model.variant", "torchvision"),
    ],
)
def test_an_mlp_has_no_use_for_it(key, value):
    config = mlp.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key} is {value!r}; only a resnet50"):
        configuration.check(config)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("freeze.layers", "stem, stage1 until 2 epochs", "only the last may have no end"),
        (
            "freeze.layers",
            "stem until 1 epoch until 2 epochs",
            'epoch until 2 epochs" has two ends',
        ),
        ("freeze.layers", "until 2 epochs", 'expected parts such as "NAMES until 2 epochs"'),
        (
            "freeze.layers",
            "stem until noon",
            'the end of "stem until noon" is "noon"; expected a number and its unit',
        ),
        ("progressive", "9 until 1 epoch", "expected upsamplings of 1 to 8"),
        ("progressive", "2", "expected upsamplings of 1 to 8"),
        ("progressive", "2 4 until 1 epoch", "expected upsamplings of 1 to 8"),
        ("progressive", "3 until 1 epoch, 2 until 2 epochs", "that grow, up to 4, which is config"),
        ("progressive", "4 until 1 epoch", "that grow, up to 4, which is config.model.upsampling"),
    ],
)
def test_a_wrong_text_is_told_by_its_key(key, text, expected):
    config = laptop.get_config()
    config.update_from_flattened_dict({key: text})
    with pytest.raises(UserError, match=expected) as caught:
        configuration.check(config)
    assert f"config.{key}" in str(caught.value)


def test_only_a_pooled_head_takes_several_sizes():
    config = mlp.get_config()
    config.progressive = "2 until 1 epoch"
    with pytest.raises(UserError, match='config.model.head "pooled"'):
        configuration.check(config)


def test_ends_that_do_not_grow_are_told():
    with pytest.raises(UserError, match="expected ends that grow"):
        phases("stem until 3 epochs, stage1 until 3 epochs")


@pytest.fixture
def config(monkeypatch):
    """A small ResNet on a few images: frozen backbone, then half of it, at 32 px, then 64 px."""
    monkeypatch.setattr(network, "STAGE_BLOCKS", (1, 1, 1, 1))
    config = laptop.get_config()
    config.data.source, config.model.pretrained = "sample", "none"
    config.batch_size, config.eval_batch_size, config.train_for = 32, 80, "8 steps"
    config.evaluate_every = config.log_every = config.checkpoint_every = "4 steps"
    config.schedule.warmup = "0 steps"
    config.model.upsampling, config.progressive = 2, "1 until 4 steps"
    config.freeze.layers = "backbone until 4 steps, stem stage1"
    config.optimizer.head_rate, config.optimizer.layer_decay = 3.0, 0.8
    config.ema_decay, config.model.test_time_flip, config.augment.flip = 0.5, True, True
    config.label_smoothing = 0.1  # of the training loss alone
    return config


@pytest.mark.slow
def test_each_phase_trains_what_it_names_at_its_size(config, tmp_path):
    config.schedule.name, config.augment.crop_padding = "constant", 4
    train_and_evaluate(config, tmp_path / "whole")
    first, last = (read_checkpoint(tmp_path / "whole", step)[0] for step in (4, 8))
    start = named_leaves(
        split_model(create_model(configuration.to_dict(config)["model"], seed=0))[1]
    )
    learns = {name for name in start if not np.array_equal(first[name], start[name])}
    assert learns == {name for name in start if name.startswith("params.head")}
    learns = {name for name in start if not np.array_equal(last[name], first[name])}
    assert learns == {name for name in start if not re.search(r"backbone\.(stem|stage1)", name)}
    # The first phase is a run at its size, to the last bit.
    config.progressive, config.model.upsampling, config.train_for = "", 1, "4 steps"
    config.freeze.layers = "backbone"
    train_and_evaluate(config, tmp_path / "small")
    small = read_checkpoint(tmp_path / "small", 4)[0]
    assert all(np.array_equal(small[name], first[name]) for name in start)


@pytest.mark.slow
def test_a_run_compiles_once_for_each_size(config, tmp_path, compiled_names):
    config.freeze.layers = ""
    train_and_evaluate(config, tmp_path)
    assert compiled_names.count("jit(scan_train_steps)") == 2
    assert compiled_names.count("jit(eval_step)") == 2


@pytest.mark.slow
def test_a_run_goes_through_its_phases(config, tmp_path, capfd, monkeypatch):
    released = []
    monkeypatch.setattr(loop, "release_freed_memory", lambda: released.append(True))
    evaluate_really = loop.Loop.evaluate

    def evaluate_small_images_better(self, split):
        totals = evaluate_really(self, split)
        return dataclasses.replace(totals, correct=totals.count) if self.step == 4 else totals

    monkeypatch.setattr(loop.Loop, "evaluate", evaluate_small_images_better)
    whole = train_and_evaluate(config, tmp_path)
    told = capfd.readouterr().err
    assert "from step 0: upsampling x1, frozen: backbone; parameters" in told
    assert "head 20,490 at 3, stage4" in told and "at 0.8" in told
    assert "; batch norms: train, in frozen layers frozen\n" in told
    assert told.count("from step 4: upsampling x2, frozen: stem, stage1") == 2  # planned, entered
    evaluations = [each for each in whole.rows if each["event"] == "evaluation"]
    assert [each["step"] for each in evaluations] == [4, 8]
    assert evaluations[1]["validation_accuracy"] < evaluations[0]["validation_accuracy"] == 1
    assert len(released) == 1  # where the second phase starts
    # A reader of the checkpoint has the averages and the last size.
    trained = load_trained(tmp_path)
    assert trained.model.upsampling == 2 and trained.model.test_time_flip
    again = evaluate(tmp_path, split="test", checkpoint="latest")
    assert again["loss"] == pytest.approx(whole.record["result"]["test_loss"], rel=1e-5)
    arrays = read_checkpoint(tmp_path, 8)[0]
    head = np.asarray(trained.model.head.logits.kernel)
    assert np.array_equal(head, arrays["ema.params.head.logits.kernel"])
    assert not np.array_equal(head, arrays["params.head.logits.kernel"])
    # The best is of the last size, though images of the first one were classified better.
    assert find_step(tmp_path, "best") == 8


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 5, 6, 8])
def test_a_run_resumed_in_any_phase_ends_the_same(config, tmp_path, monkeypatch, at):
    """Stopped at the end of each of three phases, its evaluations left, and within the second."""
    config.freeze.layers = "backbone until 4 steps, stem stage1 until 6 steps"
    config.schedule.name, config.checkpoint_every = "constant", "1 step"
    train_and_evaluate(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        send_in(patch, "dispatch", at)
        assert train_and_evaluate(config, tmp_path / "parts").step == at
    train_and_evaluate(config, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_plain_run_says_what_learns(small_config, config):
    def told(config):
        plain = configuration.to_dict(config)
        return describe_start(set_up(plain, lambda x: create_model(x, seed=0)), step=0)

    assert told(small_config).endswith("; 201,482 parameters, all of them learn")
    config.progressive = config.freeze.layers = ""
    config.optimizer.head_rate = config.optimizer.layer_decay = 1.0
    # One block a stage: 2 * 64 of the stem's norm, and 2 * (n + n + 4 n + 4 n) for n = 64 ... 512.
    norms = 2 * 64 + 20 * (64 + 128 + 256 + 512)
    assert told(config).endswith(" all of them learn; batch norms: train")
    config.model.batch_norm = "eval"
    kept = " all of them learn; batch norms: the backbone's keep their statistics"
    assert told(config).endswith(kept)
    config.model.batch_norm = "frozen"
    found = re.search(r"; ([\d,]+) parameters, ([\d,]+) of them", told(config))
    total, learn = (int(number.replace(",", "")) for number in found.groups())
    assert total - learn == norms
    assert told(config).endswith(" of them learn; batch norms: the backbone's are frozen")
    config.freeze.layers = "stem"
    # A stage's norms, where only its convolutions learn; the whole of the stem.
    kept = {f"stage{i + 1}": 20 * width for i, width in enumerate((64, 128, 256, 512))}
    kept = kept | {"stem": 7 * 7 * 3 * 64 + 2 * 64}
    listed = ", ".join(f"{group} {kept[group]:,}" for group in GROUPS if group in kept)
    assert f"; not learning: {listed}; batch norms: the" in told(config)


def test_a_pattern_that_is_in_no_name_is_told(config, tmp_path):
    config.freeze.layers = "stage9 until 2 steps"
    with pytest.raises(UserError, match='"stage9", with which no part of a parameter'):
        train_and_evaluate(config, tmp_path)
    config.freeze.layers = "stage head stem"
    with pytest.raises(UserError, match="leaves nothing to train"):
        train_and_evaluate(config, tmp_path)
    config.freeze.layers = "stem_conv conv shortcut_conv head"
    config.model.batch_norm = "frozen"
    with pytest.raises(UserError, match="leaves nothing to train"):
        set_up(configuration.to_dict(config), lambda x: create_model(x, seed=0))
    assert not list(tmp_path.iterdir())


def test_the_test_split_can_be_left_unread(small_config, tmp_path):
    small_config.test = False
    record = train_and_evaluate(small_config, tmp_path).record
    assert not record.get("result") and not record.get("test_reads")
    small_config.test = True
    assert train_and_evaluate(small_config, tmp_path).record["result"]["test_count"] == 400
