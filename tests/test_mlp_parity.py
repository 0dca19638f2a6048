"""200 updates of our MLP follow Keras's and PyTorch's, from the same weights and batches.

In float64 the sides differ by rounding alone, and 1e-10 leaves it room to grow over 200 steps
(measured 1e-15 of a parameter's scale for RMSprop). In float32 a step rounds at 6e-8 of the values:
1e-5 for RMSprop and SGD is 160 such steps (measured 7e-7). Adam turns the rounding of an almost
vanishing gradient into a step of full size, so that single parameters may part by two learning
rates, 2e-3 (measured 3e-4). The losses see all parameters together: 1e-4 of them (measured 9e-6).
"""

import functools

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from cifar_jax.models.mlp import MLP
from cifar_jax.optim import OptimizerConfig, make_optimizer, make_schedule
from cifar_jax.parallel import scan_train_steps
from cifar_jax.state import create_state
from tests.references.precision import keras_precision

STEPS, BATCH = 200, 32
FLOAT64_TOLERANCE = 1e-10
FLOAT32_LOSS_TOLERANCE = 1e-4
FLOAT32_PARAMETER_TOLERANCE = {"rmsprop": 1e-5, "sgd": 1e-5, "adam": 2e-3}
OPTIMIZERS = {
    "rmsprop": {"learning_rate": 1e-3},
    # Keras rounds the momentum to float32 on its way to float64: take one that float32 holds.
    "sgd": {"learning_rate": 0.01, "momentum": 0.875},
    "adam": {"learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def batches(sample):
    rows = np.random.default_rng(1).permutation(len(sample.train_images))
    rows = np.resize(rows, (STEPS, BATCH))
    return {"image": sample.train_images[rows], "label": sample.train_labels[rows]}


@pytest.fixture(scope="module")
def weights():
    """Kernels and biases of the three layers; non-zero biases, so that none goes untested."""
    rng = np.random.default_rng(2)
    sizes = (3072, 64, 64, 10)
    return [
        (rng.normal(0, 1 / np.sqrt(a), (a, b)), rng.normal(0, 0.1, b))
        for a, b in zip(sizes, sizes[1:], strict=False)
    ]


def optimizer_config(name, **changes):
    fields = dict(
        momentum=0.0, nesterov=False, decay=0.9, beta1=0.9, beta2=0.999, epsilon=1e-7,
        weight_decay=0.0, clip_norm=0.0,
    )  # fmt: skip
    return OptimizerConfig(name=name, **(fields | OPTIMIZERS[name] | changes))


def run_ours(weights, batches, dtype, config):
    with jax.enable_x64(dtype == "float64"):
        schedule = make_schedule(
            config.learning_rate, name="constant", warmup=0, steps=STEPS, final_fraction=0.0
        )
        model = MLP(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
        for i, (kernel, bias) in enumerate(weights, start=1):
            layer = getattr(model, f"dense{i}")
            layer.kernel[...] = jnp.asarray(kernel, dtype)
            layer.bias[...] = jnp.asarray(bias, dtype)
        state = create_state(model, make_optimizer(config, schedule), seed=0)
        state, metrics = jax.jit(scan_train_steps)(state, batches)
        layers = [state.params[f"dense{i}"] for i in (1, 2, 3)]
        losses = np.asarray(metrics.loss) / BATCH
        return losses, [np.asarray(x) for layer in layers for x in (layer["kernel"], layer["bias"])]


@functools.cache
def keras_optimizer(name):
    return {"rmsprop": keras.optimizers.RMSprop, "sgd": keras.optimizers.SGD}[name]


def run_keras(weights, batches, dtype, name):
    with keras_precision(dtype):
        layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(64, "relu")]
        model = keras.Sequential(
            [keras.Input((32, 32, 3)), keras.layers.Flatten(), *layers, keras.layers.Dense(10)]
        )
        model.set_weights([x.astype(dtype) for layer in weights for x in layer])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras_optimizer(name)(**OPTIMIZERS[name]), loss)
        losses = [
            model.train_on_batch(images.astype(dtype) / 255, labels)
            for images, labels in zip(batches["image"], batches["label"], strict=True)
        ]
        values = model.get_weights()
        assert values[0].dtype == dtype
        return np.array(losses), values


def run_torch(weights, batches, dtype):
    dtype = getattr(torch, dtype)
    tensors = [torch.tensor(x, dtype=dtype, requires_grad=True) for pair in weights for x in pair]
    optimizer = torch.optim.Adam(tensors, lr=1e-3, eps=1e-7)
    losses = []
    for images, labels in zip(batches["image"], batches["label"], strict=True):
        x = torch.tensor(images, dtype=dtype).reshape(BATCH, -1) / 255
        for kernel, bias in (tensors[0:2], tensors[2:4]):
            x = torch.relu(x @ kernel + bias)
        logits = x @ tensors[4] + tensors[5]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), [t.detach().numpy() for t in tensors]


@functools.cache
def reference(name, dtype, weights_and_batches):
    weights, batches = weights_and_batches.value
    if name == "adam":
        return run_torch(weights, batches, dtype)
    return run_keras(weights, batches, dtype, name)


class Once:
    """Hashes by identity, so that the references run once for a test and its controls."""

    def __init__(self, value):
        self.value = value


@pytest.fixture(scope="module")
def inputs(weights, batches):
    return Once((weights, batches))


def largest_difference(ours, theirs):
    losses = np.max(np.abs(ours[0] - theirs[0]) / np.abs(theirs[0]))
    parameters = max(
        np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in zip(ours[1], theirs[1], strict=True)
    )
    return losses, parameters


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float64_agrees_to_rounding(name, inputs):
    ours = run_ours(*inputs.value, "float64", optimizer_config(name))
    assert ours[1][0].dtype == np.float64
    losses, parameters = largest_difference(ours, reference(name, "float64", inputs))
    assert losses < FLOAT64_TOLERANCE and parameters < FLOAT64_TOLERANCE, (losses, parameters)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32_stays_together(name, inputs):
    ours = run_ours(*inputs.value, "float32", optimizer_config(name))
    losses, parameters = largest_difference(ours, reference(name, "float32", inputs))
    assert losses < FLOAT32_LOSS_TOLERANCE, losses
    assert parameters < FLOAT32_PARAMETER_TOLERANCE[name], parameters


def transpose_second_kernel(weights, batches):
    kernel, bias = weights[1]
    return [weights[0], (kernel.T, bias), weights[2]], batches


def shift_one_label(weights, batches):
    labels = batches["label"].copy()
    labels[100, 5] = (labels[100, 5] + 1) % 10
    return weights, {**batches, "label": labels}


@pytest.mark.parametrize("change", [transpose_second_kernel, shift_one_label])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_controls_are_seen_in_both_precisions(name, change, inputs):
    """In float32 already, and so by the far narrower bounds of float64."""
    ours = run_ours(*change(*inputs.value), "float32", optimizer_config(name))
    losses, parameters = largest_difference(ours, reference(name, "float32", inputs))
    assert losses > 10 * FLOAT32_LOSS_TOLERANCE, losses
    assert parameters > 1.5 * FLOAT32_PARAMETER_TOLERANCE[name], parameters


def test_epsilon_outside_the_root_is_seen(inputs, monkeypatch):
    scale_by_rms = optax.scale_by_rms
    monkeypatch.setattr(
        "cifar_jax.optim.optax.scale_by_rms",
        lambda decay, epsilon, eps_in_sqrt: scale_by_rms(decay, epsilon, eps_in_sqrt=False),
    )
    ours = run_ours(*inputs.value, "float64", optimizer_config("rmsprop"))
    losses, _ = largest_difference(ours, reference("rmsprop", "float64", inputs))
    assert losses > 1e4 * FLOAT64_TOLERANCE


def test_logits_are_float32_where_the_rest_computes_in_bfloat16():
    model = MLP(hidden_sizes=(4,), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits = model(np.zeros((1, 32, 32, 3), np.uint8), train=False)
    assert logits.dtype == np.float32 and model.dense1.dtype == jnp.bfloat16
