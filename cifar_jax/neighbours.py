"""Weighted nearest neighbours of features, by cosine."""

from collections.abc import Sequence

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
    bank, labels = _unit(train.images[train.indices]), train.labels[train.indices]
    right = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), BATCH):
        rows = queries.indices[start : start + BATCH]
        cosines = _unit(queries.images[rows]) @ bank.T
        nearest = _largest(cosines, min(max(ks), len(labels)))
        cosines = np.take_along_axis(cosines, nearest, axis=1)
        # Relative to the nearest one, so that nothing overflows.
        weights = np.exp((cosines - cosines[:, :1]) / TEMPERATURE)
        votes = weights[..., None] * np.eye(len(CLASS_NAMES))[labels[nearest]]
        for k in ks:
            predicted = votes[:, :k].sum(1).argmax(-1)
            right[k] += int(np.sum(predicted == queries.labels[rows]))
    return {k: count / len(queries) for k, count in right.items()}


def _unit(features: np.ndarray) -> np.ndarray:
    flat = features.reshape(len(features), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns of each row's largest values, the largest first."""
    # NumPy's: on a CPU XLA sorts the whole of a row, which takes longer than all else here.
    found = np.argpartition(-values, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(values, found, axis=1), axis=1)
    return np.take_along_axis(found, order, axis=1)
