"""One pass through a model in each framework, with the results under our names."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.references import torch_resnet50, weights

# Our stage names to the layers of keras.applications.ResNet50.
KERAS_STAGES = {
    "stem": "pool1_pool",
    "stage1": "conv2_block3_out",
    "stage2": "conv3_block4_out",
    "stage3": "conv4_block6_out",
    "stage4": "conv5_block3_out",
    "pooled": "avg_pool",
    "logits": "predictions",
}


@dataclasses.dataclass
class Run:
    """Stage outputs, and of a training pass the moved statistics and the gradients too."""

    outputs: weights.Flat
    statistics: weights.Flat | None = None
    gradients: weights.Flat | None = None


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """JAX and Keras in double precision, and as they were afterwards."""
    from tests.references.precision import keras_precision  # imports TensorFlow: seconds

    with keras_precision("float64"), jax.enable_x64(True):
        yield


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """Graph, parameters and statistics, the last two as nested dictionaries of arrays."""
    graph, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)


def run_ours(model: nnx.Module, x: np.ndarray, *, train: bool, cotangent=None) -> Run:
    """`model.features(x)`; in training also the gradient of sum(logits * cotangent)."""
    graph, params, statistics = split(model)
    x = jnp.asarray(x)
    if not train:
        return Run(jax.device_get(_evaluate(graph, params, statistics, x)))
    gradients, (outputs, moved) = jax.device_get(
        _differentiate(graph, params, statistics, x, jnp.asarray(cotangent))
    )
    return Run(outputs, weights.flatten(moved), weights.flatten(gradients))


# Jitted once for all tests: models of the same structure share a compilation.
@functools.partial(jax.jit, static_argnums=0)
def _evaluate(graph, params, statistics, x):
    return nnx.merge(graph, params, statistics).features(x, train=False)


@functools.partial(jax.jit, static_argnums=0)
def _differentiate(graph, params, statistics, x, cotangent):
    def loss(params):
        model = nnx.merge(graph, params, statistics)
        outputs = model.features(x, train=True)
        moved = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return jnp.sum(outputs["logits"] * cotangent), (outputs, moved)

    return jax.grad(loss, has_aux=True)(params)


def run_keras(flat: weights.Flat, x: np.ndarray, *, train: bool, cotangent=None) -> Run:
    """keras.applications.ResNet50 with these values, in Keras's current float type."""
    import keras
    import tensorflow as tf

    model = keras.applications.ResNet50(
        weights=None, input_shape=x.shape[1:], classifier_activation=None
    )
    weights.to_keras(flat, model)
    stages = {name: model.get_layer(layer).output for name, layer in KERAS_STAGES.items()}
    stages = keras.Model(model.input, stages)
    with tf.GradientTape() as tape:
        outputs = stages(tf.constant(x), training=train)
        loss = tf.reduce_sum(outputs["logits"] * cotangent) if train else None
    run = Run({name: y.numpy() for name, y in outputs.items()})
    if train:
        trained = {name: w for name, w in weights.keras_weights(model).items() if w.trainable}
        gradients = tape.gradient(loss, [w.value for w in trained.values()])
        _fill(run, flat, weights.from_keras, weights.keras_weights(model), gradients, list(trained))
    return run


def run_torch(flat: weights.Flat, x: np.ndarray, *, train: bool, cotangent=None) -> Run:
    """The PyTorch ResNet-50 v1.5 with these values, in the dtype of `x`."""
    import torch

    model = torch_resnet50.ResNet50().to(torch.from_numpy(x).dtype)
    weights.to_torch(flat, model)
    model.train(train)
    with torch.set_grad_enabled(train):
        outputs = model.features(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    run = Run({name: y.detach().numpy() for name, y in outputs.items()})
    if train:
        (outputs["logits"] * torch.from_numpy(cotangent)).sum().backward()
        trained = dict(model.named_parameters())
        gradients = [p.grad for p in trained.values()]
        _fill(run, flat, weights.from_torch, model.state_dict(), gradients, list(trained))
    return run


def _fill(run: Run, flat: weights.Flat, back: Callable, values, gradients, names) -> None:
    statistics = {p: v for p, v in flat.items() if p.endswith((".mean", ".var"))}
    params = {p: v for p, v in flat.items() if p not in statistics}
    run.statistics = back(values, statistics)
    run.gradients = back(dict(zip(names, gradients, strict=True)), params)


def gradient_errors(ours: weights.Flat, reference: weights.Flat) -> dict[str, float]:
    """`weights.error`, but of a convolution's bias in units of its batch norm's bias gradient.

    The batch norm takes that bias out again: its true gradient is 0, and has no scale of its own.
    """
    assert set(ours) == set(reference)
    scales = {path: np.abs(value).max() for path, value in reference.items()}
    return {
        path: weights.largest_difference(ours[path], value)
        / scales[path.replace("conv", "norm") if path.endswith(".bias") else path]
        for path, value in reference.items()
    }
