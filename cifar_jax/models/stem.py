"""Upsampling by a whole factor, and a strided convolution of its result from the small image."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def repeat_pixels(x: jax.Array, factor: int) -> jax.Array:
    """Nearest-neighbour upsampling: [B, H, W, C] to [B, factor * H, factor * W, C]."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def interpolate_pixels(x: jax.Array, factor: int) -> jax.Array:
    """Bilinear upsampling: [B, H, W, C] to [B, factor * H, factor * W, C], in x's dtype.

    Pixels are areas, and beyond the border lie copies of it, as in `jax.image.resize`, PyTorch
    (align_corners=False) and TensorFlow 2. `resize` makes it products of matrices, which take
    two to four times as long on a CPU, and which XLA refuses for a GPU that it cannot try them on.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    for axis in (1, 2):
        size = x.shape[axis]
        places = (np.arange(factor * size) + 0.5) / factor - 0.5
        left = np.floor(places).astype(int)
        others = [i for i in range(4) if i != axis]
        share = np.expand_dims(places - left, others).astype(y.dtype)
        first, second = (y.take(i, axis, mode="clip") for i in (left, left + 1))
        y = first * (1 - share) + second * share
    return y.astype(x.dtype)


def conv_of_repeated(x: jax.Array, kernel: jax.Array, factor: int) -> jax.Array:
    """A stride-2, zero-padded convolution of `repeat_pixels(x, factor)`, which is never built.

    Output o = (factor / 2) q + r reads the upsampled pixels 2 o - pad + tap, which are copies of
    the source pixels q + floor((2 r - pad + tap) / factor). For each phase r the taps that fall on
    the same source pixel share one weight, their sum. So one small stride-1 convolution with a set
    of output channels per pair of phases, then a depth-to-space, gives every output. A source
    pixel lies outside the image exactly where its copies do: zero padding means the same on both.

    With the 7x7 kernel of ResNet-50 and factor 8 the small kernel is 3x3 with 16 phases.

    Args:
        x: [B, H, W, C], already preprocessed; the output has its dtype.
        kernel: [K, K, C, O] of the convolution of the upsampled image, K odd; padding K // 2.
        factor: even.

    Returns:
        [B, factor / 2 * H, factor / 2 * W, O].
    """
    batch, height, width, _ = x.shape
    size, _, channels_in, channels_out = kernel.shape
    phases = factor // 2
    offsets = (2 * np.arange(phases)[:, None] - size // 2 + np.arange(size)) // factor
    lowest, highest = int(offsets.min()), int(offsets.max())
    # fold[phase, i, tap] = 1 where the tap reads source pixel q + lowest + i
    fold = offsets[:, None] == np.arange(lowest, highest + 1)[:, None]
    fold = jnp.asarray(fold, kernel.dtype)
    small = jnp.einsum(
        "ait,bju,tuco->ijcabo", fold, fold, kernel, precision=lax.Precision.HIGHEST
    ).reshape(fold.shape[1], fold.shape[1], channels_in, phases**2 * channels_out)
    padding = (-lowest, highest)
    y = lax.conv_general_dilated(
        x,
        small.astype(x.dtype),
        window_strides=(1, 1),
        padding=(padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.reshape(batch, height, width, phases, phases, channels_out)
    return y.transpose(0, 1, 3, 2, 4, 5).reshape(
        batch, phases * height, phases * width, channels_out
    )
