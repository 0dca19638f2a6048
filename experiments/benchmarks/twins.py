"""The plain twin of every fast path of the ResNet-50's step: what JAX or Flax would compute."""

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx

from cifar_jax import parallel
from cifar_jax.models import batch_norm, blocks, resnet50
from cifar_jax.models.stem import repeat_pixels
from cifar_jax.steps import train_step


@dataclasses.dataclass(frozen=True)
class Twin:
    """A fast path, `name` of `module`, and the function that can stand in for it."""

    module: ModuleType
    name: str
    plain: Callable


def _stem(x, kernel, factor):
    return jax.lax.conv_general_dilated(
        repeat_pixels(x, factor),
        kernel,
        (2, 2),
        ((3, 3),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _max_pool(x):
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def _normalize(x, scale, bias, running_mean, epsilon, axis_name):
    """By `jnp.var`, and differentiated by JAX: without the moments' and sums' fast paths too."""
    del running_mean, axis_name
    axes = tuple(range(x.ndim - 1))
    mean, var = (f(x, axes, keepdims=True) for f in (jnp.mean, jnp.var))
    scale, bias = scale.reshape(mean.shape), bias.reshape(mean.shape)
    y = (x - mean) * jax.lax.rsqrt(var + epsilon) * scale + bias
    return y, mean.ravel(), var.ravel()


def _centred_sums(dy, x, mean, inverse):
    return batch_norm._centred_sums(dy, x, mean, inverse)


def _two_pass_moments(x, epsilon, axis_name):
    del epsilon
    return batch_norm._shifted_moments(x, batch_norm._mean(x), axis_name)


def _looped_steps(state, batches, dataset=None):
    del dataset
    return jax.lax.scan(train_step, state, batches)


TWINS = {
    "folded stem": Twin(resnet50, "conv_of_repeated", _stem),
    "sliced max pooling": Twin(resnet50, "max_pool", _max_pool),
    "weight gradient of 1x1 convolutions": Twin(blocks, "pointwise", jnp.matmul),
    "products of patches for tiny maps": Twin(blocks, "convolve", jax.lax.conv_general_dilated),
    "batch norm's gradient written out": Twin(batch_norm, "normalize", _normalize),
    "moments from plain sums": Twin(batch_norm, "_plain_moments", _two_pass_moments),
    "gradient from plain sums": Twin(batch_norm, "_plain_sums", _centred_sums),
    "a loop of one is no loop": Twin(parallel, "scan_train_steps", _looped_steps),
}
