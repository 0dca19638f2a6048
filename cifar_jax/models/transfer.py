"""ResNet-50 on CIFAR-10: preprocessing, upsampling, backbone, new head."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from cifar_jax.models.batch_norm import BatchNorm, BatchNormMode
from cifar_jax.models.layers import check_name, dropout
from cifar_jax.models.resnet50 import LAST_PART, ResNet50
from cifar_jax.models.stem import interpolate_pixels, repeat_pixels
from cifar_jax.phases import UPSAMPLINGS

INTERPOLATIONS = ("nearest", "bilinear")
HEADS = ("flatten", "pooled")

# name: (channels reversed to BGR, mean, deviation), of pixels in 0..255. "keras" ("caffe" mode
# there) and "torchvision" are what those ImageNet weights were trained with; "unit" only divides.
PREPROCESSINGS = {
    "keras": (True, (103.939, 116.779, 123.68), (1.0, 1.0, 1.0)),
    "torchvision": (
        False,
        (255 * 0.485, 255 * 0.456, 255 * 0.406),
        (255 * 0.229, 255 * 0.224, 255 * 0.225),
    ),
    "unit": (False, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
}


def preprocess(images: jax.Array, kind: str, *, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Turns RGB pixels into what the weights of that name were trained on.

    Args:
        images: [B, H, W, 3], uint8 or real, in 0..255.
        kind: a name in `PREPROCESSINGS`.
        dtype: of the result; computed in float32 at least, since bfloat16 cannot hold a pixel
            less its mean.

    Raises:
        ValueError: `kind` is none of the known ones.
    """
    check_name("preprocessing", kind, PREPROCESSINGS)
    reverse_channels, mean, deviation = PREPROCESSINGS[kind]
    wide = jnp.promote_types(dtype, jnp.float32)
    x = images.astype(wide)
    if reverse_channels:
        x = x[..., ::-1]
    mean, deviation = (jnp.asarray(row, wide).reshape(1, 1, 1, 3) for row in (mean, deviation))
    return ((x - mean) / deviation).astype(dtype)


class FlattenHead(nnx.Module):
    """The notebook's head: Flatten and two hidden layers of 128 and 64, with dropout.

    BatchNorm, Dense 128 ReLU, Dropout, BatchNorm, Dense 64 ReLU, Dropout, BatchNorm, Dense;
    settings that the notebook leaves open are Keras's defaults.
    """

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        dropout: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        wide = jnp.promote_types(dtype, jnp.float32)
        shared = dict(kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs)
        self.norm1 = BatchNorm(features, dtype=dtype, param_dtype=param_dtype)
        self.dense1 = nnx.Linear(features, 128, dtype=dtype, param_dtype=param_dtype, **shared)
        self.norm2 = BatchNorm(128, dtype=dtype, param_dtype=param_dtype)
        self.dense2 = nnx.Linear(128, 64, dtype=dtype, param_dtype=param_dtype, **shared)
        self.norm3 = BatchNorm(64, dtype=wide, param_dtype=param_dtype)
        self.logits = nnx.Linear(64, num_classes, dtype=wide, param_dtype=param_dtype, **shared)

    def __call__(
        self, x: jax.Array, *, train: bool, keys: jax.Array | None, axis_name: str | None
    ) -> jax.Array:
        """Feature maps [B, h, w, C] to logits [B, num_classes]."""
        mode: BatchNormMode = "train" if train else "eval"
        rate = self.dropout if train else 0
        x = self.norm1(x.reshape(len(x), -1), mode, axis_name=axis_name)
        x = dropout(nnx.relu(self.dense1(x)), rate, keys, layer=1)
        x = self.norm2(x, mode, axis_name=axis_name)
        x = dropout(nnx.relu(self.dense2(x)), rate, keys, layer=2)
        return self.logits(self.norm3(x, mode, axis_name=axis_name))


class PooledHead(nnx.Module):
    """Mean over the pixels and one linear layer, as on ImageNet; dropout on the means."""

    def __init__(
        self,
        features: int,
        num_classes: int,
        *,
        dropout: float,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.dropout = dropout
        self.logits = nnx.Linear(
            features,
            num_classes,
            kernel_init=nnx.initializers.glorot_uniform(),
            dtype=jnp.promote_types(dtype, jnp.float32),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: jax.Array, *, train: bool, keys: jax.Array | None, axis_name: str | None
    ) -> jax.Array:
        """Feature maps [B, h, w, C] to logits [B, num_classes]."""
        del axis_name  # no statistics here
        return self.logits(dropout(x.mean((1, 2)), self.dropout if train else 0, keys))


class TransferClassifier(nnx.Module):
    """Classifies 32x32 images with an upsampling, a ResNet-50 backbone and a new head."""

    def __init__(
        self,
        variant: str = "keras",
        *,
        preprocessing: str = "unit",
        upsampling: int = 8,
        interpolation: str = "nearest",
        head: str = "flatten",
        dropout: float = 0.5,
        batch_norm: BatchNormMode = "train",
        num_classes: int = 10,
        test_time_flip: bool = False,
        remat: bool = False,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Creates the model with initial values; the defaults are the notebook's.

        Args:
            variant: of the backbone, see `blocks.VARIANTS`.
            preprocessing: a name in `PREPROCESSINGS`; pretrained weights expect theirs.
            upsampling: side of the backbone's input, in units of 32 pixels.
            interpolation: "nearest" or "bilinear".
            head: "flatten" (`FlattenHead`) or "pooled" (`PooledHead`).
            dropout: share of hidden outputs dropped in training; 0 needs no keys.
            batch_norm: mode of the backbone's batch norms in training; the head's always train.
            num_classes: number of logits.
            test_time_flip: outside training, logits are the mean of those of an image and of its
                mirror image.
            remat: see `ResNet50`.
            dtype: of the computation; the last layer computes in float32 at least.
            param_dtype: of the parameters and running statistics.
            rngs: the stream "params" draws the initial values.

        Raises:
            ValueError: a name or the upsampling is none of the known ones.
        """
        check_name("preprocessing", preprocessing, PREPROCESSINGS)
        check_name("upsampling", upsampling, UPSAMPLINGS)
        check_name("interpolation", interpolation, INTERPOLATIONS)
        check_name("head", head, HEADS)
        self.preprocessing = preprocessing
        self.upsampling = upsampling
        self.interpolation = interpolation
        self.test_time_flip = test_time_flip
        self.dtype = dtype
        shared = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.backbone = ResNet50(
            variant, num_classes=None, batch_norm=batch_norm, remat=remat, **shared
        )
        channels = self.backbone.features_out
        # A 32x32 image leaves the backbone, whose strides make 32, as one pixel.
        if head == "flatten":
            flat = upsampling**2 * channels
            self.head = FlattenHead(flat, num_classes, dropout=dropout, **shared)
        else:
            self.head = PooledHead(channels, num_classes, dropout=dropout, **shared)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:
        """Logits [B, num_classes], in float32 at least.

        Args:
            images: RGB [B, 32, 32, 3], uint8 or real in 0..255.
            train: True drops, and normalises by batch statistics (in the backbone: as its
                `batch_norm` says), which moves the running ones.
            keys: typed PRNG keys [B] for dropout, one per example.
            axis_name: pmap axis over which the batch statistics are shared.
        """

        def logits(images):
            maps = self.backbone_maps(images, train=train, axis_name=axis_name)
            return self.head(maps, train=train, keys=keys, axis_name=axis_name)

        if self.test_time_flip and not train:
            return (logits(images) + logits(images[:, :, ::-1])) / 2
        return logits(images)

    def backbone_maps(
        self,
        images: jax.Array,
        *,
        train: bool,
        axis_name: str | None = None,
        part: str = LAST_PART,
    ) -> jax.Array:
        """A part's maps; the head reads the last one's, [B, upsampling, upsampling, 2048]."""
        # Affine per channel, so it may as well come before the upsampling, on fewer pixels.
        x = preprocess(images, self.preprocessing, dtype=self.dtype)
        repeats = self.upsampling
        if self.interpolation == "nearest" and repeats % 2:
            x, repeats = repeat_pixels(x, repeats), 1
        elif self.interpolation == "bilinear":
            x, repeats = interpolate_pixels(x, repeats), 1
        outputs = self.backbone.features(
            x, train=train, axis_name=axis_name, repeats=repeats, until=part
        )
        return outputs[part]


class TailClassifier(nnx.Module):
    """What follows a part of a transfer model's backbone: it classifies that part's maps."""

    def __init__(self, model: TransferClassifier, part: str):
        """Takes the layers behind `part`, a name in `ResNet50.parts`; they keep their names."""
        self.part = part
        parts = model.backbone.parts
        self.backbone = keep_parts(model, parts[parts.index(part) + 1 :]).backbone
        self.head = model.head

    def __call__(
        self,
        maps: jax.Array,
        *,
        train: bool,
        keys: jax.Array | None = None,
        axis_name: str | None = None,
    ) -> jax.Array:
        """Logits of maps [B, h, w, C]; a pooled head also takes the means of the last maps."""
        # As the whole model has them there; a head that follows at once takes means as they are.
        rounded = maps.astype(self.backbone.dtype)
        behind = self.backbone.after(self.part, rounded, train=train, axis_name=axis_name)
        return self.head(behind.get(LAST_PART, maps), train=train, keys=keys, axis_name=axis_name)


def keep_parts(model: TransferClassifier, parts: Collection[str]) -> TransferClassifier:
    """Deletes the other parts of a model's backbone, which are never called; returns it."""
    backbone = model.backbone
    if "stem" not in parts:
        backbone.stem_conv = backbone.stem_norm = None
    for name in backbone.parts[1:]:
        if name not in parts:
            stage_name, _, block = name.partition(".")
            stage = getattr(backbone, stage_name)
            setattr(stage, block or stage.last_block, None)
    return model
