"""What a configuration may hold: values, durations, and what may change when a run is resumed.

`ml_collections` already refuses unknown keys and wrong types; here are the impossible values.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_collections

from cifar_jax.durations import Duration
from cifar_jax.errors import UserError
from cifar_jax.parts import part_names
from cifar_jax.phases import UPSAMPLINGS, check_spans

UINT32_MAX = 2**32 - 1
Rule = tuple[Callable[[Any], bool], str]  # what a value must satisfy, and that in words


def _choice(*names: str) -> Rule:
    return lambda v: v in names, f"one of {', '.join(names)}"


def _whole(low: int, high: int = UINT32_MAX) -> Rule:
    return lambda v: _is_int(v) and low <= v <= high, f"a whole number from {low} to {high}"


def _number(is_right: Callable[[float], bool], expected: str) -> Rule:
    return lambda v: isinstance(v, int | float) and math.isfinite(v) and is_right(v), expected


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


SEED, COUNT = _whole(0), _whole(1)
TEXT = (lambda v: isinstance(v, str) and bool(v), "a text that is not empty")
SWITCH = (lambda v: isinstance(v, bool), "True or False")
POSITIVE = _number(lambda v: v > 0, "a positive number")
NOT_NEGATIVE = _number(lambda v: v >= 0, "0 or more")
FRACTION = _number(lambda v: 0 <= v <= 1, "a number from 0 to 1")
DECAY = _number(lambda v: 0 <= v < 1, "a number from 0 to below 1")
SIZES = (lambda v: all(_is_int(n) and n >= 1 for n in v), "whole numbers of at least 1")

PERIODS = ("train_for", "evaluate_every", "log_every", "checkpoint_every")  # at least one step
RULES: dict[str, Rule] = {
    "seed": SEED,
    **dict.fromkeys(PERIODS, TEXT),
    "batch_size": COUNT,
    "steps_per_call": COUNT,
    "eval_batch_size": COUNT,
    "keep_checkpoints": _whole(2),  # a damaged latest one needs another behind it
    "test": SWITCH,
    "label_smoothing": DECAY,
    "ema_decay": DECAY,
    "progressive": (lambda v: isinstance(v, str), "a text"),
    "freeze.layers": (lambda v: isinstance(v, str), "a text"),
    "freeze.batch_norm": _choice("frozen", "train"),
    "freeze.features": (
        lambda v: v in part_names(),
        f"one of {', '.join(part_names())} (a stage's last block has the stage's name)",
    ),
    "augment.flip": SWITCH,
    "augment.crop_padding": _whole(0, 16),
    "augment.policy": _choice("none", "trivial"),
    "augment.mixup": NOT_NEGATIVE,
    "augment.cutmix": NOT_NEGATIVE,
    "execution": _choice("jit", "pmap"),
    "matmul_precision": _choice("default", "high", "highest"),
    "data.source": _choice("auto", "sample", "tfds"),
    "data.directory": TEXT,
    "data.protocol": _choice("notebook", "standard"),
    "data.split_seed": SEED,
    "data.images_a_class": _whole(0),
    "data.on_device": SWITCH,
    "model.name": _choice("mlp", "resnet50"),
    "model.compute_dtype": _choice("float32", "bfloat16"),
    "model.hidden_sizes": SIZES,
    "model.variant": _choice("keras", "torchvision"),
    "model.pretrained": TEXT,
    "model.preprocessing": _choice("unit", "keras", "torchvision"),
    "model.upsampling": _whole(UPSAMPLINGS[0], UPSAMPLINGS[-1]),
    "model.interpolation": _choice("nearest", "bilinear"),
    "model.head": _choice("flatten", "pooled"),
    "model.dropout": DECAY,
    "model.batch_norm": _choice("train", "eval", "frozen"),
    "model.remat": SWITCH,
    "model.test_time_flip": SWITCH,
    "optimizer.name": _choice("rmsprop", "sgd", "adam", "adamw"),
    "optimizer.learning_rate": POSITIVE,
    "optimizer.momentum": DECAY,
    "optimizer.nesterov": SWITCH,
    "optimizer.decay": DECAY,
    "optimizer.beta1": DECAY,
    "optimizer.beta2": DECAY,
    "optimizer.epsilon": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": NOT_NEGATIVE,
    "optimizer.head_rate": POSITIVE,
    "optimizer.layer_decay": _number(lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "optimizer.accumulate": _whole(1, 2**16),
    "schedule.name": _choice("constant", "cosine", "linear"),
    "schedule.warmup": TEXT,
    "schedule.final_fraction": FRACTION,
}

# What other models have no use for, and its value in configs/common.py.
ONLY_RESNET50 = {
    "freeze.batch_norm": "frozen",
    "optimizer.head_rate": 1.0,
    "optimizer.layer_decay": 1.0,
    "model.variant": "keras",
    "model.pretrained": "none",
    "model.preprocessing": "unit",
    "model.upsampling": 8,
    "model.interpolation": "nearest",
    "model.head": "flatten",
    "model.dropout": 0.5,
    "model.batch_norm": "train",
    "model.remat": False,
    "model.test_time_flip": False,
}
# What features that are computed once have no use for, and its value that asks for nothing.
NOT_WITH_FEATURES = {
    "progressive": "",
    "freeze.layers": "",
    "model.test_time_flip": False,
    "augment.flip": False,
    "augment.crop_padding": 0,
    "augment.policy": "none",
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
}
# Where a run stores, logs and looks may change between two starts; what it computes may not.
MAY_CHANGE = {
    "data.source",
    "data.directory",
    "data.on_device",  # the same batches
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "eval_batch_size",  # changes the last bits of a validation loss, nothing of the training
    "execution",  # one format of checkpoints serves both
    "test",
    "model.pretrained",  # read once, by the first start
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("optimizer.name", "rmsprop") and so on, in the order of the configuration."""
    for key, value in config.items():
        if isinstance(value, Mapping | ml_collections.ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns plain nested dictionaries and lists that JSON can hold.

    A relative `data.directory` becomes absolute: who reads it later may be in another folder.
    """
    plain = json.loads(json.dumps(config.to_dict()))
    if not plain["data"]["directory"].startswith("~"):
        plain["data"]["directory"] = os.path.abspath(plain["data"]["directory"])
    return plain


def check(config: ml_collections.ConfigDict) -> None:
    """Refuses impossible values before anything is read or written.

    Raises:
      UserError: naming the key, the value found and what would have been right.
    """
    values = dict(flatten(config))
    for key in sorted(RULES.keys() ^ values.keys()):
        what = "missing; configs/common.py has it" if key in RULES else "not a known field"
        raise UserError(f"config.{key} is {what}")
    for key, (is_right, expected) in RULES.items():
        if not is_right(values[key]):
            raise UserError(f"config.{key} is {values[key]!r}; expected {expected}")
    for key in (*PERIODS, "schedule.warmup"):
        Duration.parse(values[key], key=key)
    check_spans(values)
    for key, off in ONLY_RESNET50.items():
        if values["model.name"] != "resnet50" and values[key] != off:
            raise UserError(f"config.{key} is {values[key]!r}; only a resnet50 uses this field")
    if values["optimizer.nesterov"] and not values["optimizer.momentum"]:
        raise UserError("config.optimizer.nesterov is True; it needs config.optimizer.momentum > 0")


def check_whole_model(config: Mapping[str, Any]) -> None:
    """Refuses a configuration that trains only what follows cached features.

    Args:
      config: as `to_dict` gives it.

    Raises:
      UserError: naming the key.
    """
    features = config["freeze"]["features"]
    if features != "stage4":
        raise UserError(
            f'config.freeze.features is "{features}"; cifar_jax.features reads it, here '
            "config.freeze.layers names what does not learn"
        )


def check_features(config: Mapping[str, Any]) -> None:
    """Refuses a configuration whose images have no features that could be kept.

    Args:
      config: as `to_dict` gives it.

    Raises:
      UserError: naming the key.
    """
    values = dict(flatten(config))
    wrong = {key: off for key, off in NOT_WITH_FEATURES.items() if values[key] != off}
    if wrong:
        found = ", ".join(f"config.{key} is {values[key]!r}" for key in wrong)
        flags = " ".join(f"--config.{key}={off}" for key, off in wrong.items())
        raise UserError(
            f"{found}; features are computed once, of each image as it is, by what "
            f"config.freeze.features names: {flags}"
        )
    if values["model.name"] != "resnet50":
        raise UserError(
            f'config.model.name is "{values["model.name"]}"; features come from a backbone: '
            'expected "resnet50"'
        )
    if values["model.pretrained"] == "none":
        raise UserError(
            'config.model.pretrained is "none"; features of random weights are of no use: set '
            '"keras", "torchvision" or the path of a file of weights'
        )


def check_version(saved: Mapping[str, Any], *, workdir: str) -> None:
    """Refuses a checkpoint whose configuration has not the fields that there are now.

    Raises:
      UserError: naming them and the workdir.
    """
    other = sorted(RULES.keys() ^ dict(flatten(saved)).keys())
    if other:
        raise UserError(
            f"{workdir} is of another version of cifar_jax, whose configuration differs in "
            f"{', '.join(other)}; use that version, or another --workdir"
        )


def check_same_run(config: Mapping[str, Any], saved: Mapping[str, Any], *, workdir: str) -> None:
    """Refuses to go on with a checkpoint that another configuration made.

    Args:
      config: the run's configuration, as `to_dict` gives it.
      saved: the configuration stored with the checkpoint.
      workdir: named in the message.

    Raises:
      UserError: listing every key that differs and may not; for a run of another version.
    """
    check_version(saved, workdir=workdir)
    ours, theirs = dict(flatten(config)), dict(flatten(saved))
    free = MAY_CHANGE | ({"train_for"} if ours["schedule.name"] == "constant" else set())
    differing = [
        f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if key not in free and ours.get(key) != theirs.get(key)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(differing)}. "
            "Use another --workdir, or the configuration it was started with"
        )
