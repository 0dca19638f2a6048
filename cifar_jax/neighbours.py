"""Weighted nearest neighbours of features, by cosine."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cifar_jax.data.splits import Split
from cifar_jax.labels import CLASS_NAMES

TEMPERATURE = 0.07  # Wu et al., 2018
BATCH = 1000  # images: the similarities to 45,000 others take 180 MB


def accuracy_by_k(train: Split, queries: Split, ks: Sequence[int]) -> dict[int, float]:
    """Returns the accuracy on `queries` for each number of neighbours in `train`.

    Args:
      train: its images are features, float32 [N, 1, 1, C].
      queries: the same.
      ks: numbers of neighbours; more than there are count as all.
    """
    bank, labels = _unit(train.images[train.indices]), jnp.asarray(train.labels[train.indices])
    right = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), BATCH):
        rows = queries.indices[start : start + BATCH]
        votes = _vote(_unit(queries.images[rows]), bank, labels, ks=tuple(ks))
        for k, predicted in zip(ks, votes, strict=True):
            right[k] += int(np.sum(np.asarray(predicted) == queries.labels[rows]))
    return {k: count / len(queries) for k, count in right.items()}


def _unit(features: np.ndarray) -> jax.Array:
    flat = jnp.asarray(features).reshape(len(features), -1)
    return flat / jnp.linalg.norm(flat, axis=1, keepdims=True)


@functools.partial(jax.jit, static_argnames="ks")
def _vote(
    queries: jax.Array, bank: jax.Array, labels: jax.Array, *, ks: tuple[int, ...]
) -> list[jax.Array]:
    """Returns the predicted class of each query, for each k."""
    cosines, nearest = jax.lax.top_k(queries @ bank.T, min(max(ks), len(bank)))
    votes = jax.nn.one_hot(labels[nearest], len(CLASS_NAMES))
    # Relative to the nearest one, so that nothing overflows.
    weights = jnp.exp((cosines - cosines[:, :1]) / TEMPERATURE)[..., None]
    return [jnp.argmax(jnp.sum((weights * votes)[:, :k], axis=1), axis=-1) for k in ks]
