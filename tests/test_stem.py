"""The folded stem against its plain twin: repeat the pixels, then convolve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from cifar_jax.models.stem import conv_of_repeated, interpolate_pixels, repeat_pixels
from tests.references import weights

EXACT = 1e-12  # float64 rounding, as a share of the largest value


def plain_stem(x: jax.Array, kernel: jax.Array, factor: int) -> jax.Array:
    pad = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        repeat_pixels(x, factor),
        kernel,
        window_strides=(2, 2),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.jit, static_argnames=("function", "factor"))
def value_and_gradients(function, x, kernel, factor, cotangent) -> dict[str, jax.Array]:
    def loss(x, kernel):
        y = function(x, kernel, factor)
        return jnp.sum(y * cotangent), y

    (d_x, d_kernel), y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, kernel)
    return {"y": y, "d_x": d_x, "d_kernel": d_kernel}


STEMS = dict(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    factor=st.sampled_from([2, 4, 6, 8, 16]),
    size=st.sampled_from([3, 5, 7]),
    channels=st.integers(1, 3),
)


def check_folded_stem(height: int, width: int, factor: int, size: int, channels: int) -> None:
    rng = np.random.default_rng(height + 10 * width)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(1, 1, (2, height, width, channels)))
        kernel = jnp.asarray(rng.normal(size=(size, size, channels, 4)))
        shape = (2, factor * height // 2, factor * width // 2, 4)
        arguments = (x, kernel, factor, jnp.asarray(rng.normal(size=shape)))
        folded = value_and_gradients(conv_of_repeated, *arguments)
        plain = value_and_gradients(plain_stem, *arguments)
        assert weights.worst(folded, plain) < EXACT


@settings(max_examples=8, deadline=None, derandomize=True)
@given(**STEMS)
def test_folded_stem_equals_the_plain_one(**case):
    """Borders included: at these sizes most outputs touch one."""
    check_folded_stem(**case)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**STEMS)
def test_folded_stem_equals_the_plain_one_widely(**case):
    check_folded_stem(**case)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_folded_stem_of_the_real_size(factor):
    """32x32 images and the 7x7 kernel in float32; and the comparison sees a flipped kernel."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(weights.natural_images(2, 32, 32), jnp.float32) / 255
    kernel = jnp.asarray(rng.normal(0, 0.1, (7, 7, 3, 64)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(2, 16 * factor, 16 * factor, 64)), jnp.float32)
    folded = value_and_gradients(conv_of_repeated, x, kernel, factor, cotangent)
    plain = value_and_gradients(plain_stem, x, kernel, factor, cotangent)
    assert weights.worst(folded, plain) < 1e-5  # sums of up to 50,000 float32 terms
    flipped = conv_of_repeated(x, kernel[::-1], factor)
    assert weights.error(flipped, plain["y"]) > 0.1


@pytest.mark.parametrize("factor", range(1, 9))
def test_interpolation_is_that_of_jax(factor):
    batch, height, width, channels = shape = (2, 5, 7, 3)
    large = (batch, factor * height, factor * width, channels)
    with jax.enable_x64(True):
        x = jax.random.uniform(jax.random.key(0), shape, jnp.float64)
        y = interpolate_pixels(x, factor)
        expected = jax.image.resize(x, large, "bilinear")
        assert weights.error(y, expected) < EXACT
        assert (weights.error(repeat_pixels(x, factor), expected) < EXACT) == (factor == 1)
    # Weights such as 1/14 are none that bfloat16 has: only the result is rounded.
    narrow = x.astype(jnp.bfloat16)
    expected = interpolate_pixels(narrow.astype(jnp.float32), factor).astype(jnp.bfloat16)
    np.testing.assert_array_equal(interpolate_pixels(narrow, factor), expected)
