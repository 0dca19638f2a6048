"""Batch normalisation in three modes, in few passes over the maps."""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

BatchNormMode = Literal["train", "eval", "frozen"]
BATCH_NORM_MODES = get_args(BatchNormMode)

# Largest mean**2 / (variance + epsilon) at which sums of plain squares are used: in float32 they
# leave the variance a relative error of about 1e-5 there.
_SAFE = 100.0


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
        self.frozen = False  # True: "train" is "frozen" here, whatever the other layers do
        statistics_dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.scale = nnx.Param(jnp.full(features, initial_scale, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, statistics_dtype))
        self.var = nnx.BatchStat(jnp.ones(features, statistics_dtype))

    def __call__(
        self, x: jax.Array, mode: BatchNormMode, *, axis_name: str | None = None
    ) -> jax.Array:
        """Normalises `x` [..., features]; `axis_name` is the pmap axis that shares the batch."""
        mode = "frozen" if self.frozen and mode == "train" else mode
        scale, bias, mean, var = (v[...] for v in (self.scale, self.bias, self.mean, self.var))
        if mode == "train":
            y, *moments = normalize(x, scale, bias, mean, self.epsilon, axis_name)
            self._move(*moments, count=x.size // x.shape[-1] * _devices(axis_name))
            return y.astype(self.dtype)
        if mode == "frozen":
            scale, bias = lax.stop_gradient((scale, bias))
        x = x.astype(jnp.promote_types(x.dtype, mean.dtype))
        return _affine(x, mean, scale * lax.rsqrt(var + self.epsilon), bias).astype(self.dtype)

    def _move(self, mean: jax.Array, var: jax.Array, *, count: int) -> None:
        if self.unbiased:
            var = var * (count / max(count - 1, 1))
        for running, batch in ((self.mean, mean), (self.var, var)):
            old, new = running[...], lax.stop_gradient(batch)
            running.set_value(self.momentum * old + (1 - self.momentum) * new)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalize(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    running_mean: jax.Array,
    epsilon: float,
    axis_name: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises by the statistics of the batch.

    The gradient is the usual one (Ioffe and Szegedy, 2015) written out, so that of `x`, and of
    nothing as large, is kept for the way back.

    Args:
        x: [..., features].
        scale: [features], like all that follow.
        bias: added last.
        running_mean: a guess of the mean, which only rounding depends on.
        epsilon: added to the variance.
        axis_name: pmap axis over which the batch is spread, or None.

    Returns:
        The result, in the statistics' dtype at least; mean and n/n variance of the whole batch,
        whose gradients are taken to be zero.
    """
    return _normalize_forward(x, scale, bias, running_mean, epsilon, axis_name)[0]


def _normalize_forward(x, scale, bias, running_mean, epsilon, axis_name):
    wide = x.astype(jnp.promote_types(x.dtype, running_mean.dtype))
    mean, var = lax.platform_dependent(
        wide,
        running_mean,
        cpu=lambda x, _: _plain_moments(x, epsilon, axis_name),
        default=lambda x, shift: _shifted_moments(x, shift, axis_name),
    )
    inverse = lax.rsqrt(var + epsilon)
    y = _affine(wide, mean, scale * inverse, bias)
    return (y, mean, var), (x, scale, mean, inverse)


def _normalize_backward(epsilon, axis_name, saved, gradients):
    x, scale, mean, inverse = saved
    dy = gradients[0]
    wide = x.astype(dy.dtype)
    sum_dy, sum_dy_centred = lax.platform_dependent(
        dy, wide, mean, inverse, cpu=_plain_sums, default=_centred_sums
    )
    count = float(x.size // x.shape[-1])  # a slice of chips has more than an int32 counts
    mean_dy, mean_dy_centred = _pmean((sum_dy / count, sum_dy_centred / count), axis_name)
    along = functools.partial(jnp.broadcast_to, shape=x.shape)
    slope = jnp.square(inverse) * mean_dy_centred
    dx = along(scale * inverse) * (dy - along(mean_dy) - (wide - along(mean)) * along(slope))
    d_scale = (sum_dy_centred * inverse).astype(scale.dtype)
    return dx.astype(x.dtype), d_scale, sum_dy.astype(scale.dtype), jnp.zeros_like(mean)


normalize.defvjp(_normalize_forward, _normalize_backward)


def _shifted_moments(
    x: jax.Array, shift: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance in one pass; the shift, near the mean, keeps squares from cancelling.

    In float32 the variance is wrong by some 1e-3 of itself where the shift is 100 deviations off.
    There is no second pass as in `_plain_moments`: a GPU would wait for each such decision.
    """
    centred = x - jnp.broadcast_to(shift, x.shape)
    first, second = _pmean((_mean(centred), _mean(jnp.square(centred))), axis_name)
    return first + shift, jnp.maximum(second - jnp.square(first), 0)


def _plain_moments(
    x: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance from sums of x and x * x, where that is safe.

    XLA's CPU backend sums those as it reads x; any difference it would first write to memory.
    """
    first, second = _pmean((_mean(x), _mean(x * x)), axis_name)
    var = second - jnp.square(first)
    is_safe = jnp.all(jnp.square(first) <= _SAFE * (var + epsilon))
    return lax.cond(
        is_safe,
        lambda: (first, jnp.maximum(var, 0)),
        lambda: _shifted_moments(x, first, axis_name),
    )


def _centred_sums(
    dy: jax.Array, x: jax.Array, mean: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums of dy and of dy * (x - mean), over all axes but the last."""
    del inverse
    return _sum(dy), _sum(dy * (x - jnp.broadcast_to(mean, x.shape)))


def _plain_sums(
    dy: jax.Array, x: jax.Array, mean: jax.Array, inverse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_centred_sums` without the difference, where that is safe: see `_plain_moments`."""
    sum_dy = _sum(dy)
    is_safe = jnp.all(jnp.square(mean * inverse) <= _SAFE)
    return lax.cond(
        is_safe,
        lambda: (sum_dy, _sum(dy * x) - mean * sum_dy),
        lambda: _centred_sums(dy, x, mean, inverse),
    )


def _affine(x: jax.Array, mean: jax.Array, multiplier: jax.Array, bias: jax.Array) -> jax.Array:
    along = functools.partial(jnp.broadcast_to, shape=x.shape)
    return (x - along(mean)) * along(multiplier) + along(bias)


def _sum(x: jax.Array) -> jax.Array:
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, tuple(range(x.ndim - 1)))


def _pmean(values: tuple[jax.Array, jax.Array], axis_name: str | None):
    return values if axis_name is None else lax.pmean(values, axis_name)


def _devices(axis_name: str | None) -> int:
    return 1 if axis_name is None else lax.axis_size(axis_name)
