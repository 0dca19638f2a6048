"""The running statistics of a model measured anew: for averaged weights, or for another size."""

from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx

from cifar_jax.models.batch_norm import BatchNorm


def with_statistics_of(model: nnx.Module, batches: Iterable[np.ndarray]) -> nnx.Module:
    """Returns the model with the mean statistics of these batches as its running ones.

    What is moved is what a training step would move, so frozen norms keep theirs: as
    `torch.optim.swa_utils.update_bn` does it (Izmailov et al., "Averaging Weights Leads to Wider
    Optima and Better Generalization", 2018, section 3.2).

    Where no norm moves it is the model itself that is returned, after the first batch.

    Args:
      model: with batch norms; it is not changed.
      batches: images, uint8 [B, 32, 32, 3], at least one batch; all of one shape compile once.
    """
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    measuring = nnx.merge(graphdef, params, batch_stats)
    for _, module in nnx.iter_modules(measuring):
        if isinstance(module, BatchNorm):
            module.momentum = 0.0  # nothing is kept of the statistics before
    measuring_graphdef = nnx.split(measuring, nnx.Param, nnx.BatchStat)[0]

    @jax.jit
    def statistics_of(params, batch_stats, images, number):
        model = nnx.merge(measuring_graphdef, params, batch_stats)
        key = jax.random.fold_in(jax.random.key(0), number)  # other dropout masks in each batch
        model(images, train=True, keys=jax.random.split(key, len(images)))
        return nnx.state(model, nnx.BatchStat)

    sums, count = jax.tree.map(lambda x: np.zeros(x.shape), batch_stats), 0
    for images in batches:
        found = statistics_of(params, batch_stats, images, np.uint32(count))
        if not count and jax.tree.all(jax.tree.map(np.array_equal, found, batch_stats)):
            return model
        sums = jax.tree.map(lambda total, x: total + np.asarray(x, np.float64), sums, found)
        count += 1
    means = jax.tree.map(lambda total, x: (total / count).astype(x.dtype), sums, batch_stats)
    return nnx.merge(graphdef, params, means)
