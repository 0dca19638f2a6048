"""A trained model, as a workdir or a file holds it: what predictions and evaluations start from."""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from cifar_jax import config as configuration
from cifar_jax.checkpoint import find_step, read_checkpoint
from cifar_jax.data.pipeline import eval_batches
from cifar_jax.data.splits import Split
from cifar_jax.errors import UserError
from cifar_jax.labels import CLASS_NAMES
from cifar_jax.losses import cross_entropy
from cifar_jax.metrics import Metrics, Totals
from cifar_jax.models.registry import create_model
from cifar_jax.models.transfer import TransferClassifier
from cifar_jax.parallel import check_devices
from cifar_jax.pretrained import port
from cifar_jax.pretrained.fetch import PORT_A_RUN
from cifar_jax.pretrained.load import fit
from cifar_jax.recording.progress import counted
from cifar_jax.state import (
    MODEL_PARTS,
    fill,
    from_arrays,
    model_leaves,
    split_model,
    trained_arrays,
)

_AT_ONCE = 128  # images: 2.3 GB of a ResNet-50's maps at 256 px


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with the parameters and statistics of one checkpoint or file, as they were read."""

    model: nnx.Module
    extra: dict[str, Any]  # what a checkpoint says of its run: "config", hashes, history
    step: int | None  # None: from a file

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns logits, float32 or wider [N, 10], of uint8 [N, 32, 32, 3] images.

        However many there are, no more than 128 are computed at once, in one compiled size.
        """
        if len(images) <= _AT_ONCE:
            return self.batch_logits(images)
        padding = np.zeros((-len(images) % _AT_ONCE, *images.shape[1:]), images.dtype)
        parts = np.concatenate([images, padding]).reshape(-1, _AT_ONCE, *images.shape[1:])
        return np.concatenate([self.batch_logits(part) for part in parts])[: len(images)]

    def batch_logits(self, images: np.ndarray) -> np.ndarray:
        """Returns the same of images that are computed at once."""
        precision = self.extra["config"]["matmul_precision"] if self.extra else "highest"
        with jax.default_matmul_precision(precision):
            return np.asarray(_logits(*self._split, images))

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        # Once: for a ResNet-50 it takes as long as a small picture (so does `nnx.jit`, and more).
        return nnx.split(self.model)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Returns class probabilities, float32 [N, 10], of uint8 [N, 32, 32, 3] images."""
        return np.asarray(jax.nn.softmax(self.logits(images).astype(np.float32)))


def measure(trained: Trained, split: Split, *, batch_size: int) -> Totals:
    """Returns the sums over all images of a split, each counted once; shows how far it is."""
    totals = Totals()
    batches = eval_batches(split, batch_size=batch_size)
    for batch in counted(batches, name=split.name, total=len(split)):
        logits = trained.batch_logits(batch["image"])
        losses = cross_entropy(logits, batch["label"])
        totals.add(Metrics.of(losses, logits, batch["label"], batch["mask"]))
    return totals


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, state)(images, train=False)


def load_trained(
    workdir: str | os.PathLike | None = None,
    checkpoint: str = "latest",
    *,
    weights: str | os.PathLike | None = None,
) -> Trained:
    """Reads a trained model; nothing but the checkpoint, or else the file, is needed.

    Args:
      workdir: of a run.
      checkpoint: of the run: "latest", or "best" on validation.
      weights: in place of a workdir, a file from `port_weights` or `average` of a model fine-tuned
        on CIFAR-10.

    Raises:
      UserError: without such a checkpoint, or if it is damaged or does not fit its model; if the
        file is damaged, has no head for CIFAR-10, or does not say what its images went through.
    """
    if (workdir is None) == (weights is None):
        raise UserError("expected either the workdir of a run or a file of weights")
    check_devices()  # or orbax would call an intact checkpoint unreadable
    if workdir is not None:
        return _load_run(workdir, checkpoint)
    if checkpoint != "latest":
        raise UserError(f"{weights} is a file; only a workdir has a {checkpoint} checkpoint")
    return _load_file(pathlib.Path(weights).expanduser())


def _load_run(workdir: str | os.PathLike, checkpoint: str) -> Trained:
    workdir = pathlib.Path(workdir).expanduser().absolute()  # orbax insists
    step = find_step(workdir, checkpoint)
    arrays, extra = read_checkpoint(workdir, step)
    configuration.check_version(extra["config"], workdir=str(workdir))
    model_config = extra["config"]["model"]
    abstract = nnx.eval_shape(lambda: create_model(model_config, seed=0))
    graphdef, template = split_model(abstract)
    tree = from_arrays(template, trained_arrays(arrays), origin=f"checkpoint {step} of {workdir}")
    model = nnx.merge(graphdef, *(tree[part] for part in MODEL_PARTS))
    return Trained(model, extra, step)


def _load_file(path: pathlib.Path) -> Trained:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; name that of a run with --workdir, or {PORT_A_RUN}")
    weights = port.read(path)
    _check_runnable(weights, path)
    header = weights.header
    abstract = nnx.eval_shape(
        lambda: TransferClassifier(
            header.variant,
            preprocessing=header.preprocessing,
            upsampling=header.upsampling,
            interpolation=header.interpolation,
            head=weights.structure.tuned_head,
            test_time_flip=header.test_time_flip,
            rngs=nnx.Rngs(0),
        )
    )
    graphdef, template = split_model(abstract)
    tree = fill(template, fit(model_leaves(template), weights, path).values)
    return Trained(nnx.merge(graphdef, *(tree[part] for part in MODEL_PARTS)), extra={}, step=None)


def _check_runnable(weights: port.Weights, path: pathlib.Path) -> None:
    found, expected = weights.structure.outputs, len(CLASS_NAMES)
    if found != expected:
        has = "no head" if found is None else f"a head of {found:,} classes"
        raise UserError(
            f"{path} has {has}, CIFAR-10 has {expected} classes; fine-tune it first, with "
            "config.model.pretrained"
        )
    header = weights.header
    fields = "preprocessing", "upsampling", "interpolation"
    missing = [name for name in fields if getattr(header, name) in (None, "unknown")]
    if missing:
        options = " ".join(f"--{name}=..." for name in missing)
        raise UserError(
            f"{path} does not say which {', '.join(missing)} it was fine-tuned with; write that "
            f"into it: python -m cifar_jax.port_weights {path} NEW.safetensors {options}"
        )
