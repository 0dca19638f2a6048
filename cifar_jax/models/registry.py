"""Models by the name that a configuration gives."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from cifar_jax.models.mlp import MLP


def create_model(config: Mapping[str, Any], *, seed: int) -> nnx.Module:
    """Returns the model of `config.model` with freshly drawn weights.

    Args:
      config: `config.model`: name, compute_dtype, and the model's own fields.
      seed: of the initial weights.
    """
    dtype = jnp.dtype(config["compute_dtype"])
    return MLP(hidden_sizes=tuple(config["hidden_sizes"]), dtype=dtype, rngs=nnx.Rngs(seed))
