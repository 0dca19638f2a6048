"""One training step and one evaluation step, as pure functions of (state, batch).

They know nothing of jit, devices, files or configurations: `parallel.py` compiles them, for a
sharded global batch or, with `axis_name`, for one device's share of it under `jax.pmap`.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from cifar_jax.augment import augment
from cifar_jax.losses import cross_entropy
from cifar_jax.metrics import Metrics
from cifar_jax.recipe import where_frozen
from cifar_jax.state import MODEL_PARTS, TrainState

Batch = Mapping[str, jax.Array]


def example_keys(state: TrainState, batch_size: int, axis_name: str | None) -> jax.Array:
    """Returns one random key for each example of this step's batch.

    A key depends on the seed, the step and the example's position in the global batch, so that
    the number of devices changes no dropout mask.

    Args:
      state: gives seed and step.
      batch_size: examples on this device under `pmap`, else of the global batch.
      axis_name: the `pmap` axis, or None.

    Returns:
      Typed keys [batch_size].
    """
    positions = jnp.arange(batch_size)
    if axis_name is not None:
        positions += jax.lax.axis_index(axis_name) * batch_size
    step_key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, positions)


def train_step(
    state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, Metrics]:
    """Makes one update.

    Args:
      state: the state after `state.step` updates.
      batch: "image" uint8 [B, 32, 32, 3], or features float32 [B, h, w, C] for a model of what
        follows them, and "label" int32 [B].
      axis_name: the `pmap` axis over which gradients, statistics and metrics are reduced.

    Returns:
      The state after one more update, and the batch's metrics before it, in training mode.
    """
    recipe, labels = state.recipe, batch["label"]
    batch_size = labels.shape[0]
    keys = example_keys(state, batch_size, axis_name)
    images, targets = augment(batch["image"], labels, keys, recipe.augment, axis_name=axis_name)
    frozen = where_frozen(state.params, recipe.frozen)
    count = batch_size if axis_name is None else batch_size * jax.lax.axis_size(axis_name)

    def loss_of(params):
        # What gets no gradient costs none.
        params = jax.tree.map(
            lambda x, still: jax.lax.stop_gradient(x) if still else x, params, frozen
        )
        model = nnx.merge(state.graphdef, params, state.batch_stats)
        logits = model(images, train=True, keys=keys, axis_name=axis_name)
        losses = cross_entropy(logits, targets, smoothing=recipe.label_smoothing)
        batch_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return jnp.sum(losses) / count, (losses, logits, batch_stats)

    grads, (losses, logits, batch_stats) = jax.grad(loss_of, has_aux=True)(state.params)
    metrics = Metrics.of(losses, logits, labels, jnp.ones(batch_size, bool))
    if axis_name is not None:
        grads, metrics = jax.lax.psum((grads, metrics), axis_name)
    updates, opt_state = state.optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(
        lambda old, new, still: old if still else new,
        state.params,
        optax.apply_updates(state.params, updates),
        frozen,
    )
    state = state.replace(
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
    )
    return (_average(state) if recipe.ema_decay else state), metrics


def _average(state: TrainState) -> TrainState:
    """Moves the averages towards the state after an update; the first, far from the end, less."""
    recipe = state.recipe

    def move(old, new, start):
        updates, left = jnp.divmod(state.step - start, recipe.accumulate)
        updates = updates.astype(jnp.float32)
        decay = jnp.minimum(recipe.ema_decay, (1 + updates) / (10 + updates))
        moved = (new + decay * (old - new)).astype(old.dtype)
        return moved if recipe.accumulate == 1 else jnp.where(left == 0, moved, old)

    # Images of another size have other statistics, whose averages begin anew.
    starts = {"params": 0, "batch_stats": recipe.resized_at}
    ema = {
        name: jax.tree.map(functools.partial(move, start=starts[name]), state.ema[name], part)
        for name, part in state.parts.items()
    }
    return state.replace(ema=ema)


def eval_step(state: TrainState, batch: Batch, *, axis_name: str | None = None) -> Metrics:
    """Returns the metrics of a batch in evaluation mode.

    Args:
      state: gives parameters and running statistics, or their averages where it keeps them.
      batch: "image" and "label" as in `train_step`, "mask" bool [B], False on padding.
      axis_name: the `pmap` axis over which the metrics are summed.
    """
    parts = state.ema or state.parts
    model = nnx.merge(state.graphdef, *(parts[name] for name in MODEL_PARTS))
    logits = model(batch["image"], train=False)
    losses = cross_entropy(logits, batch["label"])
    metrics = Metrics.of(losses, logits, batch["label"], batch["mask"])
    return metrics if axis_name is None else jax.lax.psum(metrics, axis_name)
