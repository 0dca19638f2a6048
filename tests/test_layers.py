"""Dropout, pooling, products and convolutions, against Keras, PyTorch and plain twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_jax.models.layers import convolve, dropout, matmul, max_pool, pointwise


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), count)


def test_dropout_masks_belong_to_the_examples():
    x = jnp.ones((16, 7, 5))
    y = dropout(x, 0.25, keys(16))
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(dropout(x, 0.25, keys(16)[order]), y[order])
    sharded = jax.pmap(lambda x, k: dropout(x, 0.25, k))(
        x.reshape(8, 2, 7, 5), keys(16).reshape(8, 2)
    )
    np.testing.assert_array_equal(sharded.reshape(x.shape), y)
    assert len(np.unique(np.asarray(y).reshape(16, -1), axis=0)) == 16
    assert not np.array_equal(dropout(x, 0.25, keys(16), layer=1), y)


def test_dropout_rate_scale_and_precision():
    x = jnp.ones((64, 1000))
    y = np.asarray(dropout(x, 0.25, keys(64)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    # 64,000 draws: the share kept has a deviation of 0.0017
    assert np.mean(y > 0) == pytest.approx(0.75, abs=0.007)
    with jax.enable_x64(True):
        wide = np.asarray(dropout(x.astype(jnp.float64), 0.25, keys(64)))
    narrow = np.asarray(dropout(x.astype(jnp.bfloat16), 0.25, keys(64)))
    assert (wide.dtype, narrow.dtype) == (np.float64, jnp.bfloat16)
    np.testing.assert_array_equal(y > 0, wide > 0)
    np.testing.assert_array_equal(y > 0, narrow > 0)


def test_dropout_without_keys_is_refused_not_skipped():
    assert dropout(jnp.ones((2, 3)), 0, None).all()
    with pytest.raises(ValueError, match="one per example"):
        dropout(jnp.ones((2, 3)), 0.5, None)


def plain_max_pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("size", [(7, 10), (1, 2), (112, 5)])
def test_max_pool_equals_the_plain_one(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), plain_max_pool(jnp.asarray(x)))
    x[1, size[0] // 2, size[1] // 2] = np.nan
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), plain_max_pool(jnp.asarray(x)))


def splitting_max_pool(x: jax.Array) -> jax.Array:
    """Control: `jnp.maximum` halves the gradient of a tie."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    height, width = (x.shape[1] - 1) // 2, (x.shape[2] - 1) // 2
    parts = [
        x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return functools.reduce(jnp.maximum, parts)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_max_pool_gives_a_tie_to_the_first(size):
    import tensorflow as tf
    import torch

    rng = np.random.default_rng(0)
    x = rng.integers(1, 4, (4, *size, 3)).astype(np.float32)  # three values: ties in every window
    cotangent = rng.normal(size=plain_max_pool(x).shape).astype(np.float32)

    def gradient(pool):
        return jax.grad(lambda x: jnp.sum(pool(x) * cotangent))(jnp.asarray(x))

    leaf = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    y = torch.nn.functional.max_pool2d(leaf, 3, stride=2, padding=1)
    (y * torch.from_numpy(cotangent.transpose(0, 3, 1, 2).copy())).sum().backward()
    by_torch = leaf.grad.numpy().transpose(0, 2, 3, 1)

    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        padded = tf.pad(variable, [[0, 0], [1, 1], [1, 1], [0, 0]])  # as Keras does
        loss = tf.reduce_sum(tf.nn.max_pool2d(padded, 3, 2, "VALID") * cotangent)
    by_tensorflow = tape.gradient(loss, variable).numpy()

    # Up to four windows add their gradients to a pixel, in any order.
    np.testing.assert_allclose(gradient(max_pool), by_torch, atol=1e-6)
    np.testing.assert_allclose(gradient(max_pool), by_tensorflow, atol=1e-6)
    assert np.abs(gradient(splitting_max_pool) - by_torch).max() > 0.1


@pytest.mark.parametrize(("product", "shape"), [(matmul, (5,)), (pointwise, (2, 3, 4))])
def test_products_have_the_gradients_of_the_plain_one(product, shape):
    rng = np.random.default_rng(0)
    x, kernel, d = (rng.normal(size=size) for size in ((*shape, 7), (7, 3), (*shape, 3)))
    with jax.enable_x64(True):
        y, back = jax.vjp(product, jnp.asarray(x), jnp.asarray(kernel))
        to_x, to_kernel = back(jnp.asarray(d))
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-12)
    np.testing.assert_allclose(to_x, d @ kernel.T, rtol=1e-12)
    np.testing.assert_allclose(to_kernel, np.tensordot(x, d, (range(len(shape)),) * 2), rtol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2), (2, 5), (4, 4), (7, 5)], ids=str)
def test_convolution_equals_the_plain_one(size, stride):
    """Maps smaller than the kernel and larger ones: values and both gradients."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *size, 3)), rng.normal(size=(3, 3, 3, 4))
    arguments = (stride, stride), ((1, 1), (1, 1))
    numbers = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"))
    with jax.enable_x64(True):
        results = []
        for convolution in (convolve, jax.lax.conv_general_dilated):
            y, back = jax.vjp(lambda x, k, f=convolution: f(x, k, *arguments, **numbers), x, kernel)
            d = np.random.default_rng(1).normal(size=y.shape)
            results.append((y, *back(jnp.asarray(d))))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "option",
    [
        {"lhs_dilation": (2, 2)},
        {"rhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"preferred_element_type": jnp.float32},
        {"precision": "highest"},
    ],
    ids=str,
)
def test_an_option_keeps_the_smallest_maps_a_convolution(option):
    """The product of patches knows none of them; without one, or where it says nothing, it is."""
    groups = option.get("feature_group_count", 1)
    x, kernel = jnp.ones((1, 2, 2, 4), jnp.bfloat16), jnp.ones((3, 3, 4 // groups, 4), jnp.bfloat16)
    geometry = ((1, 1), ((1, 1), (1, 1)))
    nothing = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), feature_group_count=1, precision=None)
    for options in (option, {**nothing, **option}):
        options = {**options, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        run = lambda x, k, o=options: convolve(x, k, *geometry, **o)  # noqa: E731
        assert "conv_general_dilated" in str(jax.make_jaxpr(run)(x, kernel))


def test_the_smallest_maps_are_no_convolution():
    """XLA would exchange map and kernel."""
    kernel, rest = jnp.ones((3, 3, 4, 4)), ((1, 1), ((1, 1), (1, 1)))
    nothing = dict(lhs_dilation=(1, 1), rhs_dilation=(1, 1), feature_group_count=1, precision=None)
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), **nothing)
    for side, is_one in ((2, False), (3, True)):
        x = jnp.ones((1, side, side, 4))
        text = str(jax.make_jaxpr(lambda x: convolve(x, kernel, *rest, **options))(x))
        assert ("conv_general_dilated" in text) == is_one
