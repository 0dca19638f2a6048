"""A frozen, pretrained backbone: what a head reads of each image."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cifar_jax.checkpoint import digest
from cifar_jax.models.blocks import EXPANSION
from cifar_jax.models.registry import create_model
from cifar_jax.models.resnet50 import LAST_PART, STAGE_WIDTHS
from cifar_jax.models.transfer import keep_parts
from cifar_jax.parallel import JitExecution
from cifar_jax.parts import part_names, stage_number
from cifar_jax.state import MODEL_PARTS, fill, split_model

PREFIX = "backbone."
_IN_MODEL_CONFIG = ("variant", "preprocessing", "upsampling", "interpolation", "compute_dtype")


class Backbone:
    """The backbone of a transfer model up to a part, in evaluation mode."""

    def __init__(
        self, config: Mapping[str, Any], values: Mapping[str, np.ndarray], part: str = LAST_PART
    ):
        """Takes the weights; nothing is computed.

        Args:
            config: `config.model` of a transfer model.
            values: its parameters and statistics by name; those up to `part` are taken.
            part: the last one that is computed, a name in `parts.part_names()`.
        """
        self.part = part
        parts = part_names()
        self._kept = parts[: parts.index(part) + 1]
        prefixes = tuple(PREFIX + name for name in self._kept)
        self.values = {name: x for name, x in values.items() if name.startswith(prefixes)}
        self._config = config
        # Of the last maps a pooled head takes the mean: so it is the mean that is kept, as maps of
        # one pixel, whose mean is itself.
        self._is_pooled = (config["head"], part) == ("pooled", LAST_PART)

    def key(self) -> dict[str, Any]:
        """Returns what the features depend on, the images and `matmul_precision` aside."""
        fields = {name: self._config[name] for name in _IN_MODEL_CONFIG}
        # Of the numbers, not of a file: two files with the same numbers give the same features.
        cut = "pooled" if self._is_pooled else self.part
        return {"cut": cut, "weights_sha256": digest(self.values, {}), **fields}

    def shape(self, images: np.ndarray) -> tuple[int, ...]:
        """Returns the shape [N, h, w, C] of the features of images [N, 32, 32, 3]."""
        number = stage_number(self.part)
        channels = EXPANSION * STAGE_WIDTHS[number - 1] if number else STAGE_WIDTHS[0]
        # Strides make 4 up to stage 1, and 2 in each stage behind it.
        side = 32 * self._config["upsampling"] // (4 * 2 ** max(number - 1, 0))
        side = 1 if self._is_pooled else side
        return (len(images), side, side, channels)

    def features(self, images: np.ndarray, start: int, *, batch_size: int) -> Iterator[np.ndarray]:
        """Yields the features of the images from `start` on, float32 [at most batch_size, h, w, C].

        Args:
            images: uint8 [N, 32, 32, 3].
            start: the first one to compute.
            batch_size: of the compiled program, on all devices; the last batch is padded.
        """
        pending, count = None, 0
        for first in range(start, len(images), batch_size):
            rows = np.minimum(np.arange(first, first + batch_size), len(images) - 1)
            computed = self._program(images[rows])
            # A batch behind, so that the device has the next one while this one is written.
            if pending is not None:
                yield np.asarray(pending)
            pending, count = computed, min(batch_size, len(images) - first)
        if pending is not None:
            yield np.asarray(pending)[:count]

    @functools.cached_property
    def _program(self) -> Callable[[np.ndarray], jax.Array]:
        def create():
            model = keep_parts(create_model(self._config, seed=0), self._kept)
            model.head = None
            return model

        graphdef, template = split_model(nnx.eval_shape(create))
        execution = JitExecution()
        parts = jax.device_put(fill(template, self.values), execution.replicated)

        # The weights are an argument: closed over, they would be compiled into the program.
        @jax.jit
        def compute(parts, images):
            model = nnx.merge(graphdef, *(parts[part] for part in MODEL_PARTS))
            maps = model.backbone_maps(images, train=False, part=self.part)
            features = maps.mean((1, 2), keepdims=True) if self._is_pooled else maps
            return features.astype(jnp.float32)

        return lambda images: compute(parts, jax.device_put(images, execution.batch_sharding))
