"""TrivialAugment: one random operation of random strength an image (Müller and Hutter, 2021).

The "wide" set of operations and strengths, as torchvision's `TrivialAugmentWide`; the operations
are Pillow's, on real values, so that up to Pillow's rounding the pixels are the same.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, Pillow's "L"


def blend(image: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    """Moves from `other` (factor 0) to `image` (1) or beyond, as `PIL.ImageEnhance`."""
    return jnp.clip(other + factor * (image - other), 0, 255)


def grey(image: jax.Array) -> jax.Array:
    """Returns the luminance, [H, W, 1]."""
    return jnp.sum(image * GREY.reshape(1, 1, 3), -1, keepdims=True)


def brightness(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Darker (strength < 0) or brighter."""
    return blend(image, jnp.zeros_like(image), 1 + strength)


def color(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Greyer or more colourful."""
    return blend(image, jnp.broadcast_to(grey(image), image.shape), 1 + strength)


def contrast(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Nearer to its mean luminance or farther from it."""
    return blend(image, jnp.full_like(image, jnp.floor(jnp.mean(grey(image)) + 0.5)), 1 + strength)


def sharpness(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Smoother or sharper; the border stays as it is."""
    weights = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
    height, width = image.shape[:2]
    inner = sum(
        weights[i, j] * image[i : i + height - 2, j : j + width - 2] for i, j in np.ndindex(3, 3)
    )
    return blend(image, image.at[1:-1, 1:-1].set(inner), 1 + strength)


def posterize(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Drops the lowest bits: 0 to 6 of them."""
    step = 2.0 ** jnp.round(6 * jnp.abs(strength))
    return jnp.floor(image / step) * step


def solarize(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Inverts what is as bright as a threshold from 255 down to 0, or brighter."""
    return jnp.where(image >= 255 * (1 - jnp.abs(strength)), 255 - image, image)


def autocontrast(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Stretches each channel to 0..255."""
    del strength
    low, high = (f(image, (0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    scale = 255 / jnp.where(high > low, high - low, 255)
    return jnp.where(high > low, (image - low) * scale, image)


def equalize(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Makes each channel's histogram flat."""
    del strength
    return jnp.stack([_equalize_channel(image[..., i]) for i in range(image.shape[-1])], -1)


def _equalize_channel(channel: jax.Array) -> jax.Array:
    """`PIL.ImageOps.equalize` of [H, W]."""
    levels = jnp.clip(jnp.round(channel), 0, 255).astype(jnp.int32)
    histogram = jnp.zeros(256, jnp.int32).at[levels.reshape(-1)].add(1)
    last = histogram[jnp.max(levels)]
    step = (levels.size - last) // 255
    before = jnp.cumsum(histogram) - histogram
    table = jnp.clip((before + step // 2) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table[levels].astype(channel.dtype), channel)


def affine(image: jax.Array, matrix: jax.Array, offset: jax.Array) -> jax.Array:
    """Moves pixels, as `PIL.Image.transform(AFFINE, NEAREST)`; zeros come in.

    Args:
      image: [H, W, C].
      matrix: [2, 2], from offsets (x, y) from the centre in the result to such in the image.
      offset: [2], added to them, in pixels.
    """
    height, width = image.shape[:2]
    x, y = jnp.meshgrid(jnp.arange(width) + 0.5, jnp.arange(height) + 0.5)
    x, y = x - width / 2, y - height / 2
    source_x = matrix[0, 0] * x + matrix[0, 1] * y + offset[0] + width / 2
    source_y = matrix[1, 0] * x + matrix[1, 1] * y + offset[1] + height / 2
    column, row = (jnp.floor(s).astype(jnp.int32) for s in (source_x, source_y))
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    moved = image[jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)]
    return jnp.where(inside[..., None], moved, 0)


def shear(image: jax.Array, strength: jax.Array, *, axis: int) -> jax.Array:
    """Shears along x (axis 0) or y, by up to 0.99 pixel a pixel; the top left corner stays."""
    slope = -0.99 * strength
    matrix = jnp.eye(2).at[axis, 1 - axis].set(slope)
    return affine(image, matrix, jnp.zeros(2).at[axis].set(slope * image.shape[axis] / 2))


def translate(image: jax.Array, strength: jax.Array, *, axis: int) -> jax.Array:
    """Moves along x (axis 0) or y, by up to 32 whole pixels."""
    offset = jnp.zeros(2).at[axis].set(-jnp.trunc(32 * strength))
    return affine(image, jnp.eye(2), offset)


def rotate(image: jax.Array, strength: jax.Array) -> jax.Array:
    """Turns counterclockwise, by up to 135 degrees."""
    angle = jnp.deg2rad(135 * strength)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return affine(image, jnp.array([[cos, -sin], [sin, cos]]), jnp.zeros(2))


# Of an image [H, W, 3], float in 0..255, and a strength in -1..1.
OPERATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "identity": lambda image, strength: image,
    "shear_x": functools.partial(shear, axis=0),
    "shear_y": functools.partial(shear, axis=1),
    "translate_x": functools.partial(translate, axis=0),
    "translate_y": functools.partial(translate, axis=1),
    "rotate": rotate,
    "brightness": lambda image, strength: brightness(image, 0.99 * strength),
    "color": lambda image, strength: color(image, 0.99 * strength),
    "contrast": lambda image, strength: contrast(image, 0.99 * strength),
    "sharpness": lambda image, strength: sharpness(image, 0.99 * strength),
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}


def trivial_augment(key: jax.Array, image: jax.Array) -> jax.Array:
    """Applies one operation, at even odds, with a strength from -30/30 to 30/30.

    Args:
      key: a typed PRNG key.
      image: [H, W, 3], float32 in 0..255.
    """
    which, how, sign = jax.random.split(key, 3)
    strength = jax.random.randint(how, (), 0, 31) / 30
    strength = jnp.where(jax.random.bernoulli(sign), strength, -strength)
    index = jax.random.randint(which, (), 0, len(OPERATIONS))
    return jax.lax.switch(index, list(OPERATIONS.values()), image, strength)
