"""The loss: softmax cross-entropy over integer labels, or over probabilities of the classes."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Returns the cross-entropy of each example, in nats (Keras: SparseCategoricalCrossentropy).

    Args:
      logits: [B, classes], any float type; computed in float32 or wider.
      labels: int [B], or the classes' probabilities, float [B, classes].
      smoothing: the share of a label that is spread over all classes (Szegedy et al., 2016).

    Returns:
      [B], float32 or wider.
    """
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits.astype(wide))
    if labels.ndim == 1:
        own = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    else:
        own = -jnp.sum(labels * log_probabilities, axis=-1)
    if not smoothing:
        return own
    return (1 - smoothing) * own - smoothing * jnp.mean(log_probabilities, axis=-1)
