"""What follows a frozen part of the backbone: features computed once, trained on like images."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import jax
import ml_collections
import numpy as np
from flax import nnx

from cifar_jax import config as configuration
from cifar_jax.backbone import Backbone
from cifar_jax.checkpoint import HEAD_FOLDER, find_step, has_checkpoints
from cifar_jax.data.sources import Dataset
from cifar_jax.data.splits import NAMES, Split
from cifar_jax.errors import tell
from cifar_jax.feature_cache import FeatureCache
from cifar_jax.initial import find_weights, load_initial_weights
from cifar_jax.lock import locked
from cifar_jax.models.registry import create_model
from cifar_jax.models.transfer import TailClassifier
from cifar_jax.parallel import check_devices
from cifar_jax.pretrained.load import Loaded
from cifar_jax.recording.progress import Counter
from cifar_jax.recording.run_record import field, record_so_far
from cifar_jax.setup import Setup, set_up
from cifar_jax.signals import StopSignal
from cifar_jax.state import model_leaves, split_model
from cifar_jax.train import Result, run
from cifar_jax.whole_model import is_whole, is_written, steps_of_heads, write_whole_model
from cifar_jax.workdir import check_workdir

FORMAT_VERSION = 1  # of the features: another one makes them anew


def train_head(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, *, profile: bool = False
) -> Result:
    """Trains, or goes on training, what follows `config.freeze.features` on that part's maps.

    Features that are not in `config.data.directory` are computed first. At the end the whole model
    stands in `workdir/checkpoints`, like that of any other run.

    Args:
      config: as `configs/common.py` gives it; `model.pretrained` names the backbone's weights.
      workdir: takes checkpoints, metrics, figure and record; a run found there is resumed.
      profile: writes a trace of a few calls to `workdir/profile`.

    Raises:
      UserError: for a wrong configuration, missing data or weights, damaged features, too small a
        disk, a workdir in use or of another run.
      RunError: when the loss is not finite or a file cannot be written.
    """
    configuration.check(config)
    plain = configuration.to_dict(config)
    configuration.check_features(plain)
    workdir = pathlib.Path(workdir).expanduser().absolute()
    check_devices()
    if not has_checkpoints(workdir / HEAD_FOLDER):
        find_weights(plain["model"])  # a file that is missing is told before images are fetched

    part = plain["freeze"]["features"]

    def whole_model(config):
        return create_model(config, seed=plain["seed"])

    with jax.default_matmul_precision(config.matmul_precision):
        # The head starts as the one in the whole model of this seed does.
        setup = set_up(plain, lambda config: TailClassifier(whole_model(config), part))
        setup = dataclasses.replace(setup, checkpoints=HEAD_FOLDER)
        if features := _features_of_finished(setup, workdir):
            setup = dataclasses.replace(setup, features=features)
            with locked(workdir, setting="--workdir"), StopSignal() as stop:
                return run(setup, workdir, stop=stop, profile=profile)
        template = _template(plain)
        setup, backbone = _load_weights(setup)
        with locked(workdir, setting="--workdir"), StopSignal() as stop:
            # Before features are computed, which may take hours.
            check_workdir(workdir, plain, features=setup.features, checkpoints=HEAD_FOLDER)
            names = NAMES if plain["test"] else NAMES[:2]
            splits = {name: setup.splits[name] for name in names}
            inputs = feature_splits(plain, setup.data, splits, backbone, stop)
            if inputs is None:
                head = workdir / HEAD_FOLDER
                step = find_step(head, "latest") if has_checkpoints(head) else 0
                return Result(step=step, stopped_by=stop.received, record={}, rows=[])
            setup = dataclasses.replace(setup, inputs=inputs)
            result = run(setup, workdir, stop=stop, profile=profile)
            if result.stopped_by is None:
                write_whole_model(workdir, backbone.values, template)
            return result


def _template(config: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the whole model's arrays, by part."""
    return split_model(nnx.eval_shape(lambda: create_model(config["model"], seed=0)))[1]


def load_backbone(config: Mapping[str, Any]) -> tuple[Loaded, Backbone]:
    """Reads what `config.model.pretrained` names, and its backbone up to `config.freeze.features`.

    Raises:
      UserError: if the weights are missing, damaged, of another variant, or do not fit.
    """
    loaded = load_initial_weights(model_leaves(_template(config)), config["model"], tell=tell)
    return loaded, Backbone(config["model"], loaded.values, config["freeze"]["features"])


def _load_weights(setup: Setup) -> tuple[Setup, Backbone]:
    """Adds to the setup the features' key, and what the file holds of the part that is trained."""
    loaded, backbone = load_backbone(setup.config)
    tail = {name: x for name, x in loaded.values.items() if name not in backbone.values}
    setup = dataclasses.replace(
        setup,
        pretrained=lambda: dataclasses.replace(loaded, values=tail),
        features=feature_key(setup.config, backbone, images_sha256=setup.data.sha256),
    )
    return setup, backbone


def _features_of_finished(setup: Setup, workdir: pathlib.Path) -> dict[str, Any] | None:
    """Gives what the features of a finished run depend on, as its record has it.

    Such a run is shown without its weights' file and features: nothing is left to do with them.

    Returns:
      None where anything is left to train, test or write, or another file is named now, whose
      numbers must be compared.
    """
    record = record_so_far(workdir)
    asked, total = setup.config["model"]["pretrained"], setup.plan.total
    steps = steps_of_heads(workdir)
    finished = (
        # The whole model is written after all that a run does, but for a test asked for later.
        (field(record, "result.step") == total or not setup.config["test"])
        and field(record, "config.model.pretrained") == asked
        and total in steps
        and is_whole(workdir / HEAD_FOLDER, total)
        and all(is_written(workdir, step) for step in steps)
    )
    return record.get("features") if finished else None


def feature_key(
    config: Mapping[str, Any], backbone: Backbone, *, images_sha256: Mapping[str, str]
) -> dict[str, Any]:
    """Returns all that features depend on, as JSON values."""
    return {
        "format_version": FORMAT_VERSION,
        **backbone.key(),
        "matmul_precision": config["matmul_precision"],
        "images_sha256": dict(images_sha256),
    }


def feature_splits(
    config: Mapping[str, Any],
    data: Dataset,
    splits: Mapping[str, Split],
    backbone: Backbone,
    stop: StopSignal,
) -> dict[str, Split] | None:
    """Gives splits features for images, computed where they are not in the cache.

    Args:
      config: as `config.to_dict` gives it.
      data: the images.
      splits: some of theirs.
      backbone: which computes them.
      stop: ends it early.

    Returns:
      The splits, float32 [N, h, w, C]; None if a signal cut the computation short.

    Raises:
      UserError: damaged features, too small a disk, or a cache in use.
    """
    images = {"train": data.train_images}
    if "test" in splits and splits["test"].images is data.test_images:
        images["test"] = data.test_images
    key = feature_key(config, backbone, images_sha256=data.sha256)
    cache = FeatureCache(config["data"]["directory"], key)
    shapes = {name: backbone.shape(pixels) for name, pixels in images.items()}
    found = {name: cache.read(name, shape) for name, shape in shapes.items()}
    missing = [name for name in images if found[name] is None]
    if missing:
        cache.check_space(shapes)
        tell(f"features go to {cache.folder}")
    batch_size = config["eval_batch_size"]
    for name in missing:

        def compute(start: int, name: str = name) -> Iterator[np.ndarray]:
            blocks = backbone.features(images[name], start, batch_size=batch_size)
            return _until_stopped(name, blocks, total=len(images[name]), start=start, stop=stop)

        cache.fill(name, shapes[name], batch_size=batch_size, compute=compute)
        found[name] = cache.read(name, shapes[name])
        if found[name] is None:
            return None
    return {
        name: dataclasses.replace(split, images=found.get(name, found["train"]))
        for name, split in splits.items()
    }


def _until_stopped(
    name: str, blocks: Iterator[np.ndarray], *, total: int, start: int, stop: StopSignal
) -> Iterator[np.ndarray]:
    """Passes blocks of features on and shows their number, until a signal comes."""
    with closing(Counter(f"features of the {name} set", total=total, start=start)) as counter:
        for block in blocks:
            yield block
            counter.update(len(block))
            if stop.received is not None:
                return
