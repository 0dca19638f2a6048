"""A trained model, as a workdir holds it: what predictions and evaluations start from."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from cifar_jax.checkpoint import find_step, read_checkpoint
from cifar_jax.models.registry import create_model
from cifar_jax.state import MODEL_PARTS, from_arrays, split_model


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model with the parameters and statistics of one checkpoint."""

    model: nnx.Module
    extra: dict[str, Any]  # what the checkpoint says of its run: "config", hashes, history
    step: int

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Returns logits, float32 or wider [N, 10], of uint8 [N, 32, 32, 3] images."""
        with jax.default_matmul_precision(self.extra["config"]["matmul_precision"]):
            return np.asarray(_logits(self.model, images))

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Returns class probabilities, float32 [N, 10], of uint8 [N, 32, 32, 3] images."""
        return np.asarray(jax.nn.softmax(self.logits(images).astype(np.float32)))


@nnx.jit
def _logits(model: nnx.Module, images: jax.Array) -> jax.Array:
    return model(images, train=False)


def load_trained(workdir: str | os.PathLike, checkpoint: str = "latest") -> Trained:
    """Reads a run's model back; nothing but the checkpoint is needed.

    Args:
      workdir: of a run.
      checkpoint: "latest", or "best" on validation.

    Raises:
      UserError: without such a checkpoint, or if it is damaged or does not fit its model.
    """
    workdir = pathlib.Path(workdir).expanduser().absolute()  # orbax insists
    step = find_step(workdir, checkpoint)
    arrays, extra = read_checkpoint(workdir, step)
    model_config = extra["config"]["model"]
    abstract = nnx.eval_shape(lambda: create_model(model_config, seed=0))
    graphdef, template = split_model(abstract)
    wanted = {name: x for name, x in arrays.items() if name.split(".")[0] in MODEL_PARTS}
    tree = from_arrays(template, wanted, origin=f"checkpoint {step} of {workdir}")
    model = nnx.merge(graphdef, *(tree[part] for part in MODEL_PARTS))
    return Trained(model, extra, step)
