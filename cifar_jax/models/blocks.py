"""What ResNet-50 is built of: its two published variants, bottleneck blocks, stages."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from cifar_jax.models.batch_norm import BatchNorm, BatchNormMode
from cifar_jax.models.layers import convolve, pointwise

EXPANSION = 4

# Gaussian with the variance 2 / fan_out that keeps gradients at scale through ReLU (He et al.).
_HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between the published forms; `momentum` is the share of the old value kept."""

    stride_in_3x3: bool
    conv_bias: bool
    epsilon: float
    momentum: float
    unbiased_running_var: bool


VARIANTS = {
    "keras": Variant(
        stride_in_3x3=False,
        conv_bias=True,
        epsilon=1.001e-5,
        momentum=0.99,
        unbiased_running_var=False,
    ),
    "torchvision": Variant(
        stride_in_3x3=True,
        conv_bias=False,
        epsilon=1e-5,
        momentum=0.9,
        unbiased_running_var=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layer constructors with everything filled in that all blocks share."""

    conv: Callable[..., nnx.Conv]
    pointwise: Callable[..., nnx.Linear]
    norm: Callable[..., BatchNorm]
    last_norm: Callable[..., BatchNorm]
    stride_in_3x3: bool

    @classmethod
    def of(
        cls,
        spec: Variant,
        *,
        zero_gamma: bool,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> "Layers":
        """Fills in what a variant's layers share; see `ResNet50`."""
        shared = dict(dtype=dtype, param_dtype=param_dtype)
        weights = dict(use_bias=spec.conv_bias, kernel_init=_HE, rngs=rngs, **shared)
        norm = functools.partial(
            BatchNorm,
            epsilon=spec.epsilon,
            momentum=spec.momentum,
            unbiased=spec.unbiased_running_var,
            **shared,
        )
        return cls(
            conv=functools.partial(nnx.Conv, conv_general_dilated=convolve, **weights),
            pointwise=functools.partial(nnx.Linear, dot_general=_dot_general, **weights),
            norm=norm,
            last_norm=functools.partial(norm, initial_scale=0.0 if zero_gamma else 1.0),
            stride_in_3x3=spec.stride_in_3x3,
        )


def _dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """What `nnx.Linear` asks of `jax.lax.dot_general`, by `pointwise`."""
    return pointwise(x, kernel)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut: [B, H, W, in] to [B, H', W', 4 * width].

    A 1x1 convolution is a matrix product over the channel axis of the pixels that its stride
    keeps, which XLA runs much faster than a convolution, backwards above all.
    """

    def __init__(
        self, features_in: int, width: int, *, stride: int, projects: bool, layers: Layers
    ):
        features_out = EXPANSION * width
        self.stride = stride
        self.stride_in_3x3 = layers.stride_in_3x3
        self.conv1 = layers.pointwise(features_in, width)
        self.norm1 = layers.norm(width)
        self.conv2 = layers.conv(
            width, width, (3, 3), strides=stride if layers.stride_in_3x3 else 1, padding=1
        )
        self.norm2 = layers.norm(width)
        self.conv3 = layers.pointwise(width, features_out)
        self.norm3 = layers.last_norm(features_out)
        self.shortcut_conv = layers.pointwise(features_in, features_out) if projects else None
        self.shortcut_norm = layers.norm(features_out) if projects else None

    def __call__(self, x: jax.Array, *, mode: BatchNormMode, axis_name: str | None) -> jax.Array:
        strided = x[:, :: self.stride, :: self.stride]
        y = self.conv1(x if self.stride_in_3x3 else strided)
        y = nnx.relu(self.norm1(y, mode, axis_name=axis_name))
        y = nnx.relu(self.norm2(self.conv2(y), mode, axis_name=axis_name))
        y = self.norm3(self.conv3(y), mode, axis_name=axis_name)
        if self.shortcut_conv is not None:
            if self.stride_in_3x3 and self.stride > 1:
                # XLA for GPUs (jaxlib 0.10.2 and 0.11.2) aborts where it fuses the ReLU before the
                # block, which conv1 reads too, through this slice into the shortcut's product.
                strided = lax.optimization_barrier(strided)
            x = self.shortcut_norm(self.shortcut_conv(strided), mode, axis_name=axis_name)
        return nnx.relu(x + y)


class Stage(nnx.Module):
    """Blocks of one resolution, named block1, block2, ...; the first one strides and projects."""

    def __init__(
        self,
        features_in: int,
        width: int,
        *,
        blocks: int,
        stride: int,
        remat: bool,
        layers: Layers,
    ):
        self.last_block = f"block{blocks}"
        self.remat = remat
        for i in range(1, blocks + 1):
            first = i == 1
            block = Bottleneck(
                features_in if first else EXPANSION * width,
                width,
                stride=stride if first else 1,
                projects=first,
                layers=layers,
            )
            setattr(self, f"block{i}", block)

    def run(
        self, block: str, x: jax.Array, *, mode: BatchNormMode, axis_name: str | None
    ) -> jax.Array:
        """Runs one block, such as "block2", on maps [B, H, W, C]."""

        def run(block: Bottleneck, x: jax.Array) -> jax.Array:
            return block(x, mode=mode, axis_name=axis_name)

        run = nnx.remat(run) if self.remat else run
        return run(getattr(self, block), x)
