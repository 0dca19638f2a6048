"""Models by the name that a configuration gives."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from cifar_jax.models.mlp import MLP
from cifar_jax.models.transfer import TransferClassifier


def create_model(config: Mapping[str, Any], *, seed: int) -> nnx.Module:
    """Returns the model of `config.model` with freshly drawn weights.

    Args:
      config: `config.model`: name, compute_dtype, and the model's own fields.
      seed: of the initial weights.
    """
    shared = dict(dtype=jnp.dtype(config["compute_dtype"]), rngs=nnx.Rngs(seed))
    if config["name"] == "mlp":
        return MLP(hidden_sizes=tuple(config["hidden_sizes"]), **shared)
    return TransferClassifier(
        config["variant"],
        preprocessing=config["preprocessing"],
        upsampling=config["upsampling"],
        interpolation=config["interpolation"],
        head=config["head"],
        dropout=config["dropout"],
        batch_norm=config["batch_norm"],
        test_time_flip=config["test_time_flip"],
        remat=config["remat"],
        **shared,
    )
