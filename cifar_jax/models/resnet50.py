"""ResNet-50 in the two forms whose ImageNet weights are published.

He et al., "Deep Residual Learning for Image Recognition", 2015. Parameter paths read like
"stage2.block1.shortcut_conv.kernel"; kernels are [k, k, in, out], those of 1x1 convolutions
[in, out].
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from cifar_jax.models.batch_norm import BATCH_NORM_MODES, BatchNormMode
from cifar_jax.models.blocks import EXPANSION, VARIANTS, Layers, Stage
from cifar_jax.models.layers import check_name, max_pool
from cifar_jax.models.stem import conv_of_repeated
from cifar_jax.parts import STAGE_BLOCKS, part_names

STAGE_WIDTHS = (64, 128, 256, 512)
LAST_PART = part_names()[-1]
IMAGENET_CLASSES = 1000


class ResNet50(nnx.Module):
    """The network on preprocessed images of any size."""

    def __init__(
        self,
        variant: str = "keras",
        *,
        num_classes: int | None = IMAGENET_CLASSES,
        batch_norm: BatchNormMode = "train",
        zero_gamma: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Creates the network with He's initial values.

        Args:
            variant: a name in `VARIANTS`: "keras" (v1) or "torchvision" (v1.5).
            num_classes: outputs of the top layer; None leaves it out.
            batch_norm: mode of every batch norm in training; "frozen" or "eval" keep the running
                statistics of the loaded weights (see `batch_norm.BatchNorm`).
            zero_gamma: the last scale of every block starts at 0, so that every block starts as
                its shortcut (Goyal et al., 2017). For training from scratch.
            remat: keep only the input of each block and compute its inside again on the way back:
                less memory, about a third more work (XLA undoes it on CPUs).
            dtype: of the computation.
            param_dtype: of the parameters and running statistics.
            rngs: the stream "params" draws the initial values.

        Raises:
            ValueError: `variant` or `batch_norm` is none of the known ones.
        """
        check_name("variant", variant, VARIANTS)
        check_name("batch_norm", batch_norm, BATCH_NORM_MODES)
        self.batch_norm = batch_norm
        self.dtype = dtype
        precision = dict(dtype=dtype, param_dtype=param_dtype)
        layers = Layers.of(VARIANTS[variant], zero_gamma=zero_gamma, rngs=rngs, **precision)
        features = STAGE_WIDTHS[0]
        self.stem_conv = layers.conv(3, features, (7, 7), strides=2, padding=3)
        self.stem_norm = layers.norm(features)
        for i, (blocks, width) in enumerate(zip(STAGE_BLOCKS, STAGE_WIDTHS, strict=True), start=1):
            stride = 1 if i == 1 else 2
            stage = Stage(features, width, blocks=blocks, stride=stride, remat=remat, layers=layers)
            setattr(self, f"stage{i}", stage)
            features = EXPANSION * width
        self.features_out = features
        self.parts = part_names(STAGE_BLOCKS)
        top = functools.partial(
            nnx.Linear,
            kernel_init=nnx.initializers.normal(0.01),
            dtype=jnp.promote_types(dtype, jnp.float32),
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.top = None if num_classes is None else top(features, num_classes)

    def __call__(
        self, x: jax.Array, *, train: bool, axis_name: str | None = None, repeats: int = 1
    ) -> jax.Array:
        """The last of `features`: the logits, or without a top the maps of stage 4."""
        outputs = self.features(x, train=train, axis_name=axis_name, repeats=repeats)
        return outputs[LAST_PART if self.top is None else "logits"]

    def features(
        self,
        x: jax.Array,
        *,
        train: bool,
        axis_name: str | None = None,
        repeats: int = 1,
        until: str = LAST_PART,
    ) -> dict[str, jax.Array]:
        """Every stage's output by name, from one forward pass.

        Args:
            x: preprocessed images [B, H, W, 3], real values.
            train: True normalises as `batch_norm` says, and "train" there moves the running
                statistics; False uses them as they are.
            axis_name: pmap axis over which the batch statistics are shared.
            repeats: 1, or an even number: the network sees each pixel as a square of
                repeats x repeats pixels, without that image being built.
            until: the last part to run, a name in `parts`.

        Returns:
            "stem" (after the pooling) [B, h, w, 64], "stage1" ... "stage4" [B, h, w, 256 ... 2048],
            "pooled" [B, 2048] and, with a top, "logits" [B, num_classes], in float32 at least; up
            to `until`, be that a block.
        """
        mode = self.batch_norm if train else "eval"
        x = self.stem(x.astype(self.dtype), repeats)
        x = max_pool(nnx.relu(self.stem_norm(x, mode, axis_name=axis_name)))
        outputs = {
            "stem": x,
            **self.after("stem", x, train=train, axis_name=axis_name, until=until),
        }
        if until != LAST_PART:
            return outputs
        outputs["pooled"] = outputs[until].mean((1, 2))
        if self.top is not None:
            outputs["logits"] = self.top(outputs["pooled"])
        return outputs

    def after(
        self,
        part: str,
        x: jax.Array,
        *,
        train: bool,
        axis_name: str | None = None,
        until: str = LAST_PART,
    ) -> dict[str, jax.Array]:
        """Runs the blocks behind a part, up to another one.

        Args:
            part: a name in `parts`.
            x: its output, as `features` gives it.
            train: see `features`.
            axis_name: see `features`.
            until: see `features`.

        Returns:
            The outputs of stages, and that of `until`, by name, in order; none behind the last.
        """
        mode = self.batch_norm if train else "eval"
        outputs = {}
        for name in self.parts[self.parts.index(part) + 1 : self.parts.index(until) + 1]:
            stage_name, _, block = name.partition(".")
            stage = getattr(self, stage_name)
            x = stage.run(block or stage.last_block, x, mode=mode, axis_name=axis_name)
            if not block or name == until:
                outputs[name] = x
        return outputs

    def stem(self, x: jax.Array, repeats: int) -> jax.Array:
        """The first convolution, of `x` with every pixel repeated."""
        if repeats % 2 and repeats != 1:
            raise ValueError(f"repeats is {repeats}, expected 1 or an even number")
        if repeats == 1:
            return self.stem_conv(x)
        y = conv_of_repeated(x, self.stem_conv.kernel[...], repeats)
        if self.stem_conv.bias is None:
            return y
        return y + jnp.broadcast_to(self.stem_conv.bias[...].astype(y.dtype), y.shape)
