"""ResNet-50 as Flax's own layers give it: the network that our fast paths are measured against."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from cifar_jax.models.blocks import VARIANTS, Variant
from experiments.benchmarks.limit import CHANNELS, STAGES


class PlainBlock(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut, each an `nnx.Conv`."""

    def __init__(
        self,
        features_in: int,
        width: int,
        *,
        stride: int,
        projects: bool,
        variant: Variant,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shared = dict(dtype=dtype, rngs=rngs)
        conv = functools.partial(nnx.Conv, use_bias=variant.conv_bias, **shared)
        norm = functools.partial(
            nnx.BatchNorm, momentum=variant.momentum, epsilon=variant.epsilon, **shared
        )
        first, second = (1, stride) if variant.stride_in_3x3 else (stride, 1)
        self.conv1, self.norm1 = conv(features_in, width, (1, 1), strides=first), norm(width)
        self.conv2 = conv(width, width, (3, 3), strides=second, padding=1)
        self.norm2 = norm(width)
        self.conv3, self.norm3 = conv(width, 4 * width, (1, 1)), norm(4 * width)
        shortcut = conv(features_in, 4 * width, (1, 1), strides=stride) if projects else None
        self.shortcut_conv, self.shortcut_norm = shortcut, norm(4 * width) if projects else None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        use = dict(use_running_average=not train)
        y = nnx.relu(self.norm1(self.conv1(x), **use))
        y = nnx.relu(self.norm2(self.conv2(y), **use))
        y = self.norm3(self.conv3(y), **use)
        if self.shortcut_conv is not None:
            x = self.shortcut_norm(self.shortcut_conv(x), **use)
        return nnx.relu(x + y)


class PlainBackbone(nnx.Module):
    """Stands in for `ResNet50` as a transfer model's backbone."""

    features_out = CHANNELS

    def __init__(self, variant: str, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        spec = VARIANTS[variant]
        shared = dict(dtype=dtype, rngs=rngs)
        self.stem_conv = nnx.Conv(
            3, 64, (7, 7), strides=2, padding=3, use_bias=spec.conv_bias, **shared
        )
        self.stem_norm = nnx.BatchNorm(64, momentum=spec.momentum, epsilon=spec.epsilon, **shared)
        features = 64
        for i, (blocks, width) in enumerate(STAGES, start=1):
            for j in range(1, blocks + 1):
                block = PlainBlock(
                    features,
                    width,
                    stride=2 if j == 1 and i > 1 else 1,
                    projects=j == 1,
                    variant=spec,
                    **shared,
                )
                setattr(self, f"stage{i}_block{j}", block)
                features = 4 * width

    def features(
        self, x: jax.Array, *, train: bool, axis_name: str | None, repeats: int, until: str
    ) -> dict[str, jax.Array]:
        """As `ResNet50.features`, but only what a head reads; on one device."""
        del axis_name
        return {until: self(x, train=train, repeats=repeats)}

    def __call__(self, x: jax.Array, *, train: bool, repeats: int = 1) -> jax.Array:
        """Maps [B, h, w, 2048] of images [B, H, W, 3], each pixel repeated."""
        x = jnp.repeat(jnp.repeat(x, repeats, axis=1), repeats, axis=2)
        x = nnx.relu(self.stem_norm(self.stem_conv(x), use_running_average=not train))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for i, (blocks, _) in enumerate(STAGES, start=1):
            for j in range(1, blocks + 1):
                x = getattr(self, f"stage{i}_block{j}")(x, train=train)
        return x
