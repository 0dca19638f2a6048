"""The loss: softmax cross-entropy over integer labels."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each example, in nats (Keras: SparseCategoricalCrossentropy).

    Args:
      logits: [B, classes], any float type; computed in float32 or wider.
      labels: int [B].

    Returns:
      [B], float32 or wider.
    """
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits.astype(wide))
    return -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
