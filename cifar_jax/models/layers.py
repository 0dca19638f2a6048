"""The layers that the models share and that Flax does not have in the form needed here.

Convolutions and dense layers are Flax's own `nnx.Conv` and `nnx.Linear`.
"""

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def check_name(field: str, name: object, known: Collection) -> None:
    """Raises `ValueError`, which tells the choices, where `name` is none of the known ones."""
    if name not in known:
        raise ValueError(f"{field} is {name!r}; expected one of {', '.join(map(str, known))}")


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


@jax.custom_vjp
def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution: `x @ kernel` for maps [B, H, W, in] and [in, out].

    JAX writes the gradient of the kernel as (d.T @ x).T, and XLA's CPU backend computes that d.T
    in the batch norm behind it, column by column, at several times the cost. x.T @ d needs none.
    """
    return x @ kernel


def _pointwise_backward(
    saved: tuple[jax.Array, jax.Array], d: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    rows, d_rows = (y.reshape(-1, y.shape[-1]) for y in (x, d))
    return d @ kernel.T, jnp.einsum("ni,no->io", rows, d_rows)


pointwise.defvjp(_matmul_forward, _pointwise_backward)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated` of [B, H, W, in] and [k, k, in, out], also for the smallest maps.

    Where a map is smaller than the kernel, XLA makes the kernel the image and the map the kernel,
    for which its CPU backend has no fast convolution: at 2x2 it takes 50 times as long. There the
    convolution is one product of patches. With dilation, groups, a precision or another type of
    the result it is `lax`'s for every size.
    """
    size = kernel.shape[:2]
    outputs = [
        (length + sum(pad) - k) // stride + 1
        for length, pad, k, stride in zip(x.shape[1:3], padding, size, strides, strict=True)
    ]
    others = ("lhs_dilation", "rhs_dilation", "feature_group_count")
    others += ("preferred_element_type", "precision")
    is_plain = all(set(np.ravel(options.get(name))) <= {None, 1} for name in others)
    if math.prod(outputs) >= math.prod(size) or not is_plain:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [stride * (length - 1) + 1 for stride, length in zip(strides, outputs, strict=True)]
    patches = [
        x[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        for i, j in np.ndindex(size)
    ]
    return pointwise(jnp.concatenate(patches, -1), kernel.reshape(-1, kernel.shape[-1]))


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
