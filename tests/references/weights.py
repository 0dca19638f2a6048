"""One set of values under our names, Keras's and PyTorch's, for comparing models.

Values travel as flat dictionaries {"stage1.block2.conv1.kernel": array} of our paths and shapes.
The names are worked out here on their own: nothing of `cifar_jax.pretrained` is used.
"""

import functools
import re
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

Flat = dict[str, np.ndarray]

_BLOCK = re.compile(r"(?:backbone\.)?stage(\d)\.block(\d)\.(conv|norm|shortcut_)(\d|conv|norm)")


def flatten(tree: Mapping) -> dict[str, jax.Array]:
    """Nested dictionaries to {"a.b.c": leaf}."""
    return traverse_util.flatten_dict(dict(tree), sep=".")


def unflatten(flat: Mapping) -> dict:
    return traverse_util.unflatten_dict(dict(flat), sep=".")


def variables(model: nnx.Module, kind: type[nnx.Variable] = nnx.Variable) -> Flat:
    return flatten(nnx.to_pure_dict(nnx.state(model, kind)))


def random_model(create: Callable[[], nnx.Module]) -> nnx.Module:
    """The model with every parameter and statistic drawn, far from its initial value."""
    graph, state = nnx.split(nnx.eval_shape(create))
    flat = {
        path: jnp.asarray(draw(path.removeprefix("backbone."), leaf.shape), leaf.dtype)
        for path, leaf in flatten(nnx.to_pure_dict(state)).items()
    }
    return nnx.merge(graph, unflatten(flat))


@functools.cache
def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values for one variable, float64, the same at every call."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    name = path.rsplit(".")[-1]
    if name == "kernel":
        return rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
    if name in ("scale", "var"):
        # Trained networks have small last scales in their blocks. With large ones a few random
        # examples make the map from weights to loss so steep that rounding alone grows 1e4-fold
        # with every optimizer step.
        size = 0.2 if path.endswith("norm3.scale") and "block" in path else 1.0
        return size * rng.uniform(0.5, 1.5, shape)
    return rng.normal(0, 0.2, shape)


def as_resnet50(flat: Mapping) -> dict:
    """A transfer model with a pooled head is a ResNet-50 with a top: its values by those names."""
    renamed = {name.removeprefix("backbone."): x for name, x in flat.items()}
    return {name.replace("head.logits", "top"): x for name, x in renamed.items()}


def load(model: nnx.Module, flat: Flat) -> None:
    """Puts values into a model; the paths must be the model's, all of them."""
    assert set(flat) == set(variables(model))
    nnx.update(model, unflatten(flat))


# --- Keras ---------------------------------------------------------------------------------------

_KERAS_WEIGHTS = {"scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}


def keras_name(path: str) -> str:
    """Our path to "layer/weight" of `keras.applications.ResNet50`; head layers keep our names."""
    layer, weight = path.rsplit(".", 1)
    is_norm = "norm" in layer
    if block := _BLOCK.fullmatch(layer):
        stage, number, part, index = block.groups()
        kind = "bn" if is_norm else "conv"
        index = "0" if part == "shortcut_" else index
        layer = f"conv{int(stage) + 1}_block{number}_{index}_{kind}"
    else:
        layer = layer.removeprefix("backbone.").removeprefix("head.")
        layer = {"stem_conv": "conv1_conv", "stem_norm": "conv1_bn", "top": "predictions"}.get(
            layer, layer
        )
    weight = "beta" if is_norm and weight == "bias" else _KERAS_WEIGHTS.get(weight, weight)
    return f"{layer}/{weight}"


def keras_weights(model) -> dict:
    """{"layer/weight": variable} of a Keras model, nested models included."""
    return {"/".join(w.path.split("/")[-2:]): w for w in model.weights}


def to_keras(flat: Flat, model) -> None:
    """Assigns every value; every weight of the Keras model must get one."""
    weights = keras_weights(model)
    names = {path: keras_name(path) for path in flat}
    assert sorted(names.values()) == sorted(weights)
    for path, name in names.items():
        weights[name].assign(np.asarray(flat[path]).reshape(weights[name].shape))


def from_keras(values: Mapping, like: Flat) -> Flat:
    """Arrays by "layer/weight" back under our paths and in our shapes."""
    return {p: np.asarray(values[keras_name(p)]).reshape(np.shape(v)) for p, v in like.items()}


# --- PyTorch -------------------------------------------------------------------------------------

_TORCH_WEIGHTS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_TORCH_STATISTICS = {"mean": "running_mean", "var": "running_var"}


def torch_name(path: str) -> str:
    """Our path to torchvision's."""
    layer, weight = path.rsplit(".", 1)
    if block := _BLOCK.fullmatch(layer):
        stage, number, part, index = block.groups()
        if part == "shortcut_":
            layer = "downsample." + {"conv": "0", "norm": "1"}[index]
        else:
            layer = {"conv": "conv", "norm": "bn"}[part] + index
        layer = f"layer{stage}.{int(number) - 1}.{layer}"
    else:
        layer = {"stem_conv": "conv1", "stem_norm": "bn1", "top": "fc"}[layer]
    return f"{layer}.{(_TORCH_WEIGHTS | _TORCH_STATISTICS)[weight]}"


def to_torch(flat: Flat, model) -> None:
    """Loads every value; every tensor of the PyTorch model but its batch counters must get one."""
    import torch  # only where a test compares with PyTorch

    state = model.state_dict()
    tensors = {}
    for path, value in flat.items():
        value, name = np.asarray(value), torch_name(path)
        if path.endswith("kernel"):
            value = np.moveaxis(value, -1, 0)  # [..., in, out] -> [out, ..., in]
            value = np.moveaxis(value, -1, 1)  # -> [out, in, ...]
        tensors[name] = torch.from_numpy(np.array(value)).reshape(state[name].shape)
    assert {n for n in state if not n.endswith("num_batches_tracked")} == set(tensors)
    model.load_state_dict(tensors, strict=False)


def from_torch(values: Mapping, like: Flat) -> Flat:
    """Tensors by torchvision's names back under our paths and in our shapes."""
    ours = {}
    for path, shaped_like in like.items():
        value = values[torch_name(path)].detach().numpy()
        if path.endswith("kernel"):
            value = np.moveaxis(np.moveaxis(value, 1, -1), 0, -1)
        ours[path] = value.reshape(np.shape(shaped_like))
    return ours


# --- Inputs and comparisons ----------------------------------------------------------------------


def natural_images(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [B, H, W, 3]: smooth shapes and a little noise, no symmetry, channels far apart."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = rng.uniform(1, 9, (batch, 3, 4, 2))
    phases = rng.uniform(0, 2 * np.pi, (batch, 3, 4))
    angles = np.einsum("bcwd,dyx->byxcw", waves, np.stack([y, x])) + phases[:, None, None]
    shade = np.sin(angles).sum(-1) * 25 + x[..., None] * 60 - y[..., None] * 30
    pixels = shade + np.array([150, 110, 70]) + rng.normal(0, 8, (batch, height, width, 3))
    return pixels.clip(0, 255).astype(np.uint8)


def error(ours, reference) -> float:
    """Largest absolute difference as a share of the reference's largest value."""
    return largest_difference(ours, reference) / float(np.abs(np.asarray(reference)).max())


def largest_difference(ours, reference) -> float:
    """Of finite numbers: NaN compares as no difference, and `max` passes over it."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    assert np.isfinite(ours).all() and np.isfinite(reference).all()
    return float(np.abs(ours - reference).max())


def errors(ours: Mapping, reference: Mapping) -> dict[str, float]:
    """`error` of every entry; both sides must have the same ones."""
    assert set(ours) == set(reference)
    return {name: error(ours[name], reference[name]) for name in reference}


def worst(ours: Mapping, reference: Mapping) -> float:
    return max(errors(ours, reference).values())
