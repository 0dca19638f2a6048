"""The notebook's baseline: Flatten, Dense relu, Dense relu, Dense."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cifar_jax.models.layers import matmul


def _dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """What `nnx.Linear` asks of `jax.lax.dot_general`, by `matmul`."""
    return matmul(x, kernel)


class MLP(nnx.Module):
    """Dense layers over the flattened pixels, scaled to 0..1; Keras's initialisers.

    Keras's Dense starts from Glorot-uniform kernels and zero biases, and so does this.
    """

    def __init__(
        self,
        *,
        hidden_sizes: Sequence[int] = (64, 64),
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        self.num_hidden = len(hidden_sizes)
        height, width, channels = image_shape
        sizes = (height * width * channels, *hidden_sizes, num_classes)
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
            is_last = i == len(hidden_sizes) + 1
            layer = nnx.Linear(
                inputs,
                outputs,
                kernel_init=nnx.initializers.glorot_uniform(),
                dtype=jnp.promote_types(dtype, jnp.float32) if is_last else dtype,
                param_dtype=param_dtype,
                dot_general=_dot_general,
                rngs=rngs,
            )
            setattr(self, f"dense{i}", layer)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:
        """Returns logits of images [B, H, W, C], uint8 or float in 0..255.

        They are [B, classes], float32 or wider.

        `train`, `keys` and `axis_name` are part of every model's signature; an MLP has neither
        dropout nor batch statistics and needs none of them.
        """
        x = images.reshape(images.shape[0], -1).astype(self.dtype) / 255
        for i in range(1, self.num_hidden + 1):
            x = nnx.relu(getattr(self, f"dense{i}")(x))
        return getattr(self, f"dense{self.num_hidden + 1}")(x)
