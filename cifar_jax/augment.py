"""Augmentation on the device, inside the training step: one key an example.

What an example becomes depends on its own key (and, mixed, on its partner's) and nothing else, so
that the number of devices changes no pixel.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cifar_jax.labels import CLASS_NAMES
from cifar_jax.trivial_augment import trivial_augment

_STREAM = 0x617567  # keeps these draws apart from those of dropout, which have the same keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """`config.augment`, field by field; see `configs/common.py`."""

    flip: bool = False
    crop_padding: int = 0
    policy: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0


def augment(
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
    config: Augment,
    *,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns what the training step sees of a batch.

    Args:
      images: uint8 [B, 32, 32, 3].
      labels: int32 [B].
      keys: typed PRNG keys [B].
      config: what to do; nothing leaves both as they are.
      axis_name: the `pmap` axis over which the batch is spread, or None.

    Returns:
      Images, float32 in 0..255 once anything was done to them, and labels: int32 [B], or where
      examples are mixed the probabilities of the classes, float32 [B, 10].
    """
    if config == Augment():
        return images, labels
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, _STREAM)
    streams = jax.vmap(lambda key: jax.random.split(key, 4))(keys)
    crop_keys, flip_keys, policy_keys, mix_keys = (streams[:, i] for i in range(4))
    images = images.astype(jnp.float32)
    if config.crop_padding:
        images = jax.vmap(pad_and_crop, in_axes=(0, 0, None))(
            crop_keys, images, config.crop_padding
        )
    if config.flip:
        images = jax.vmap(random_flip)(flip_keys, images)
    if config.policy == "trivial":
        images = jax.vmap(trivial_augment)(policy_keys, images)
    if not (config.mixup or config.cutmix):
        return images, labels
    targets = jax.nn.one_hot(labels, len(CLASS_NAMES))
    partners = _next_of((images, targets), axis_name)
    return jax.vmap(lambda key, own, other: _mix(key, own, other, config))(
        mix_keys, (images, targets), partners
    )


def pad_and_crop(key: jax.Array, image: jax.Array, padding: int) -> jax.Array:
    """Moves an image [H, W, C] by up to `padding` pixels each way; zeros come in."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)


def random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """Mirrors an image [H, W, C] left to right, every second time."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


Example = tuple[jax.Array, jax.Array]  # image, probabilities of the classes


def mixup(key: jax.Array, own: Example, other: Example, alpha: float) -> Example:
    """Blends two examples; the share of the first is Beta(alpha, alpha) (Zhang et al., 2018)."""
    share = jax.random.beta(key, alpha, alpha)
    return jax.tree.map(lambda a, b: share * a + (1 - share) * b, own, other)


def cutmix(key: jax.Array, own: Example, other: Example, alpha: float) -> Example:
    """Puts a rectangle of the second image into the first (Yun et al., 2019).

    The rectangle has the image's proportions and any place, cut off at the border; labels share
    by the pixels that are really replaced.
    """
    share_key, place_key = jax.random.split(key)
    height, width = own[0].shape[:2]
    half = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha)) / 2
    centre = jax.random.uniform(place_key, (2,))
    rows, columns = jnp.arange(height) + 0.5, jnp.arange(width) + 0.5
    in_rows = jnp.abs(rows - centre[0] * height) < half * height
    in_columns = jnp.abs(columns - centre[1] * width) < half * width
    inside = in_rows[:, None] & in_columns[None, :]
    share = 1 - jnp.mean(inside, dtype=jnp.float32)
    image = jnp.where(inside[..., None], other[0], own[0])
    return image, share * own[1] + (1 - share) * other[1]


def _mix(key: jax.Array, own: Example, other: Example, config: Augment) -> Example:
    """Mixup or CutMix; where both are asked for, one of them at even odds."""
    if not config.cutmix:
        return mixup(key, own, other, config.mixup)
    if not config.mixup:
        return cutmix(key, own, other, config.cutmix)
    choice, key = jax.random.split(key)
    return jax.tree.map(
        lambda a, b: jnp.where(jax.random.bernoulli(choice), a, b),
        mixup(key, own, other, config.mixup),
        cutmix(key, own, other, config.cutmix),
    )


def _next_of(examples: Example, axis_name: str | None) -> Example:
    """Returns each example's partner: the next one of the global batch, which is shuffled."""
    if axis_name is None:
        return jax.tree.map(lambda x: jnp.roll(x, -1, axis=0), examples)
    count = jax.lax.axis_size(axis_name)
    # Only the first example of the next device is not here.
    before = [(device, (device - 1) % count) for device in range(count)]
    return jax.tree.map(
        lambda x: jnp.concatenate([x[1:], jax.lax.ppermute(x[:1], axis_name, before)]), examples
    )
