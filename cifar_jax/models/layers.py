"""The layers that the models share and that Flax does not have in the form needed here.

Convolutions and dense layers are Flax's own `nnx.Conv` and `nnx.Linear`.
"""

import functools
from collections.abc import Collection
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

BatchNormMode = Literal["train", "eval", "frozen"]
BATCH_NORM_MODES = get_args(BatchNormMode)


def check_name(field: str, name: object, known: Collection) -> None:
    """Raises `ValueError`, which tells the choices, where `name` is none of the known ones."""
    if name not in known:
        raise ValueError(f"{field} is {name!r}; expected one of {', '.join(map(str, known))}")


class BatchNorm(nnx.Module):
    """Normalises over every axis but the last, and keeps running statistics.

    The mode is chosen per call:
      * "train": batch statistics; moves the running ones.
      * "eval": running statistics, left as they are.
      * "frozen": "eval" whose scale and bias get no gradient either (Keras's `trainable=False`).

    Statistics are computed and kept in float32 or wider, whatever the compute dtype. There are no
    masks: every row counts, so training batches must not be padded.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-3,
        momentum: float = 0.99,
        unbiased: bool = False,
        initial_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        """Creates the identity, up to epsilon; the defaults are Keras's.

        Args:
            features: length of the last axis.
            epsilon: added to the variance, inside the root.
            momentum: share of the old running value that is kept (PyTorch's is one minus this).
            unbiased: the running variance takes the n/(n-1) variance, as in PyTorch, instead of
                the n/n one that normalises the batch, as in Keras.
            initial_scale: 0 lets a residual branch start as nothing.
            dtype: of the output.
            param_dtype: of scale and bias; the running statistics take it too, float32 at least.
        """
        self.epsilon, self.momentum, self.unbiased = epsilon, momentum, unbiased
        self.dtype = dtype
        statistics_dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.scale = nnx.Param(jnp.full(features, initial_scale, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, statistics_dtype))
        self.var = nnx.BatchStat(jnp.ones(features, statistics_dtype))

    def __call__(
        self, x: jax.Array, mode: BatchNormMode, *, axis_name: str | None = None
    ) -> jax.Array:
        """Normalises `x` [..., features]; `axis_name` is the pmap axis that shares the batch."""
        x = x.astype(jnp.promote_types(x.dtype, self.mean[...].dtype))
        scale, bias = self.scale[...], self.bias[...]
        if mode == "train":
            mean, var = self._batch_moments(x, axis_name)
        else:
            mean, var = self.mean[...], self.var[...]
        if mode == "frozen":
            scale, bias = lax.stop_gradient((scale, bias))
        multiplier = scale * lax.rsqrt(var + self.epsilon)
        along = functools.partial(jnp.broadcast_to, shape=x.shape)
        return ((x - along(mean)) * along(multiplier) + along(bias)).astype(self.dtype)

    def _batch_moments(self, x: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
        """Mean and n/n variance over the whole batch; the running statistics move towards them."""
        axes = tuple(range(x.ndim - 1))
        count = x.size // x.shape[-1]
        # One pass for both moments. Any shift is exact; the running mean as the shift keeps the
        # difference of squares from cancelling where the mean is far larger than the deviation.
        shift = self.mean[...]
        centred = x - jnp.broadcast_to(shift, x.shape)
        first, second = jnp.mean(centred, axes), jnp.mean(jnp.square(centred), axes)
        if axis_name is not None:
            first, second = lax.pmean((first, second), axis_name)
            count *= lax.axis_size(axis_name)
        mean, var = first + shift, jnp.maximum(second - jnp.square(first), 0)

        running_var = var * (count / max(count - 1, 1)) if self.unbiased else var
        for running, batch in ((self.mean, mean), (self.var, running_var)):
            old, new = running[...], lax.stop_gradient(batch)
            running.set_value(self.momentum * old + (1 - self.momentum) * new)
        return mean, var


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` for [B, in] and [in, out], with a weight gradient that is fast on a CPU.

    The gradient of the kernel is x.T @ d. XLA's CPU backend has a fast product for arrays and none
    for a transpose that it has folded into it: the barrier keeps it from folding.
    """
    return x @ kernel


def _matmul_forward(
    x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _matmul_backward(
    saved: tuple[jax.Array, jax.Array], d: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    return d @ kernel.T, lax.optimization_barrier(x.T) @ d


matmul.defvjp(_matmul_forward, _matmul_backward)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None, *, layer: int = 0) -> jax.Array:
    """Zeroes a share `rate` of each example and scales the rest by 1 / (1 - rate).

    Args:
        x: [B, ...], any floating dtype.
        rate: in [0, 1); 0 needs no keys.
        keys: typed PRNG keys [B]. An example's mask depends on its own key and nothing else, so
            the number of devices changes no mask.
        layer: number of this dropout in its model: each draws masks of its own.
    """
    if rate == 0:
        return x
    if keys is None:
        raise ValueError("dropout in training needs keys, one per example")

    def keep_example(key: jax.Array) -> jax.Array:
        # A float32 probability draws the same mask in every precision.
        key = jax.random.fold_in(key, layer)
        return jax.random.bernoulli(key, jnp.float32(1 - rate), x.shape[1:])

    return jnp.where(jax.vmap(keep_example)(keys), x / (1 - rate), jnp.zeros_like(x))


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows, stride 2, one pixel of padding that never wins: [B, H, W, C].

    Equal to `nnx.max_pool` in value, NaN included. Its gradient goes to the first maximum of a
    window, row by row, as in TensorFlow and PyTorch, and costs less than `reduce_window`'s on a
    CPU. Columns first, then rows: the first of the row maxima lies in the first such row.
    """
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    x = jnp.pad(x, padding, constant_values=-jnp.inf)
    for axis in (2, 1):
        size = (x.shape[axis] - 1) // 2
        parts = [
            lax.slice_in_dim(x, start, start + 2 * size - 1, stride=2, axis=axis)
            for start in range(3)
        ]
        x = functools.reduce(_first_max, parts)
    return x


def _first_max(a: jax.Array, b: jax.Array) -> jax.Array:
    """Elementwise maximum whose gradient goes to `a` where both are equal; a NaN wins."""
    return jnp.where((b > a) | jnp.isnan(b), b, a)
