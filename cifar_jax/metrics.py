"""Metrics as sums that merge: a mean of means would be wrong for unequal batches."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Metrics:
    """Sums over examples: of the loss, of right answers, of the examples themselves."""

    loss: jax.Array  # float [], nats
    correct: jax.Array  # int32 []
    count: jax.Array  # int32 []

    @classmethod
    def of(cls, losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array):
        """Returns the sums of one batch; examples whose mask is False do not count.

        Args:
          losses: float [B].
          logits: float [B, classes].
          labels: int [B].
          mask: bool [B].
        """
        correct = (jnp.argmax(logits, axis=-1) == labels) & mask
        return cls(
            loss=jnp.sum(jnp.where(mask, losses, 0)),
            correct=jnp.sum(correct, dtype=jnp.int32),
            count=jnp.sum(mask, dtype=jnp.int32),
        )


@dataclasses.dataclass
class Totals:
    """Sums on the host, in Python numbers: exact counts, float64 loss, exact through JSON."""

    loss: float = 0.0
    correct: int = 0
    count: int = 0

    def add(self, metrics: Metrics) -> None:
        """Adds one batch's sums, or a stack of them (leading axis) in order."""
        # One by one: a pairwise sum would give other bits when a resume cuts the stack in two.
        for loss in np.atleast_1d(np.asarray(metrics.loss, np.float64)):
            self.loss += float(loss)
        self.correct += int(np.sum(metrics.correct))
        self.count += int(np.sum(metrics.count))

    def means(self, prefix: str = "") -> dict[str, float]:
        """Returns {prefix + "loss": nats, prefix + "accuracy": 0..1}."""
        return {
            f"{prefix}loss": self.loss / self.count,
            f"{prefix}accuracy": self.correct / self.count,
        }
