"""BatchNorm, dropout and max pooling, against Keras, PyTorch and plain twins."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_jax.models.layers import BatchNorm, dropout, matmul, max_pool
from tests.references import runs, weights

EXACT = 1e-12  # float64 rounding, as a share of the largest value
KERAS = dict(epsilon=1e-3, momentum=0.99, unbiased=False)
TORCH = dict(epsilon=1e-5, momentum=0.9, unbiased=True)


@pytest.fixture
def x64():
    with runs.float64():
        yield


def norm(features: int = 5, dtype=jnp.float64, **options) -> BatchNorm:
    options = dict(dtype=dtype, param_dtype=dtype) | options
    return weights.random_model(lambda: BatchNorm(features, **options))


def batch(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(1, 2, shape)


def apply_norm(model: BatchNorm, x, cotangent, mode: str, axis_name=None) -> dict[str, jax.Array]:
    """Output, moved statistics, and gradients of sum(output * cotangent)."""
    graph, params, statistics = runs.split(model)

    def loss(params, x):
        model = nnx.merge(graph, params, statistics)
        y = model(x, mode, axis_name=axis_name)
        moved = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return jnp.sum(y * cotangent), (y, moved)

    (d_params, d_x), (y, moved) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return {"y": y, "d_x": d_x, "d_scale": d_params["scale"], "d_bias": d_params["bias"], **moved}


def keras_norm(model: BatchNorm, x, cotangent, mode: str) -> dict[str, np.ndarray]:
    import keras
    import tensorflow as tf

    layer = keras.layers.BatchNormalization(epsilon=KERAS["epsilon"], momentum=KERAS["momentum"])
    layer.build(x.shape)
    layer.set_weights(
        [np.asarray(v[...]) for v in (model.scale, model.bias, model.mean, model.var)]
    )
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=mode == "train")
        loss = tf.reduce_sum(y * cotangent)
    d_x, d_scale, d_bias = tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])
    result = dict(y=y, d_x=d_x, d_scale=d_scale, d_bias=d_bias)
    result |= dict(mean=layer.moving_mean, var=layer.moving_variance)
    return {name: value.numpy() for name, value in result.items()}


def torch_norm(model: BatchNorm, x, cotangent, mode: str) -> dict[str, np.ndarray]:
    import torch

    layer = torch.nn.BatchNorm1d(x.shape[-1], eps=TORCH["epsilon"]).double()
    state = dict(
        weight=model.scale, bias=model.bias, running_mean=model.mean, running_var=model.var
    )
    state = {name: torch.from_numpy(np.array(v[...])) for name, v in state.items()}
    layer.load_state_dict(state, strict=False)
    layer.train(mode == "train")
    rows = torch.from_numpy(x).requires_grad_()
    y = layer(rows.reshape(-1, x.shape[-1])).reshape(x.shape)
    (y * torch.from_numpy(cotangent)).sum().backward()
    result = dict(y=y, d_x=rows.grad, d_scale=layer.weight.grad, d_bias=layer.bias.grad)
    result |= dict(mean=layer.running_mean, var=layer.running_var)
    return {name: value.detach().numpy() for name, value in result.items()}


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 2, 5)])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("convention", "other", "reference"),
    [(KERAS, TORCH, keras_norm), (TORCH, KERAS, torch_norm)],
    ids=["keras", "torch"],
)
def test_batch_norm_equals_the_reference(convention, other, reference, mode, shape, x64):
    x, cotangent = batch(*shape), np.random.default_rng(1).normal(size=shape)
    model = norm(**convention)
    expected = reference(model, x, cotangent, mode)
    assert weights.worst(apply_norm(model, x, cotangent, mode), expected) < EXACT
    # Control: the other framework's convention is told apart, each part of it where it acts.
    acts = (
        {"epsilon": "y"} if mode == "eval" else dict(epsilon="y", momentum="mean", unbiased="var")
    )
    for option, where in acts.items():
        wrong = apply_norm(norm(**convention | {option: other[option]}), x, cotangent, mode)
        assert weights.error(wrong[where], expected[where]) > 1e-6, option


def test_only_training_moves_statistics_and_only_frozen_stops_gradients(x64):
    x = jnp.asarray(batch(6, 5))
    cotangent, model = x**2, norm()
    found = {mode: apply_norm(model, x, cotangent, mode) for mode in ("train", "eval", "frozen")}
    for mode, result in found.items():
        still = all(np.array_equal(result[n], getattr(model, n)[...]) for n in ("mean", "var"))
        assert still == (mode != "train")
        learns = np.any(result["d_scale"]) and np.any(result["d_bias"])
        assert learns == (mode != "frozen")
    for same in ("y", "d_x"):
        np.testing.assert_array_equal(found["frozen"][same], found["eval"][same])
        assert weights.error(found["train"][same], found["eval"][same]) > 1e-3


def test_batch_norm_statistics_are_float32_for_bfloat16():
    x = jnp.asarray(batch(512, 5), jnp.bfloat16)
    model = norm(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    wide = norm(dtype=jnp.float32)
    y = model(x, "train")
    wide(x.astype(jnp.float32), "train")
    assert y.dtype == jnp.bfloat16
    for name in ("mean", "var"):
        assert getattr(model, name)[...].dtype == jnp.float32
        np.testing.assert_array_equal(getattr(model, name)[...], getattr(wide, name)[...])


def test_batch_norm_is_exact_far_from_zero():
    """Mean 1e4 deviations from 0: the difference of plain squares would have no digit left."""
    x = 1e4 + batch(4096, 5)
    model = norm(dtype=jnp.float32)
    model.mean.set_value(jnp.full(5, 1e4, jnp.float32))
    y = model(jnp.asarray(x, jnp.float32), "train")
    with jax.enable_x64(True):
        exact = norm()
        exact.mean.set_value(jnp.full(5, 1e4))
        expected = exact(jnp.asarray(x), "train")
    assert weights.error(y, expected) < 1e-3  # the input itself is rounded to 1e-3


@pytest.mark.parametrize("convention", [KERAS, TORCH], ids=["keras", "torch"])
def test_batch_norm_under_pmap_is_the_global_one(convention, x64):
    devices = jax.local_device_count()
    assert devices == 8
    x, cotangent = batch(2 * devices, 3, 5), np.random.default_rng(1).normal(size=(16, 3, 5))
    model = norm(**convention)
    whole = apply_norm(model, x, cotangent, "train")
    shards = x.reshape(devices, 2, 3, 5), cotangent.reshape(devices, 2, 3, 5)

    def on_devices(axis_name):
        run = functools.partial(apply_norm, model, mode="train", axis_name=axis_name)
        found = jax.pmap(lambda x, c: run(x, c), axis_name="data")(*shards)
        for name in ("y", "d_x"):
            found[name] = found[name].reshape(x.shape)
        for name in ("d_scale", "d_bias"):
            found[name] = found[name].sum(0)
        for name in ("mean", "var"):  # the same on every device
            assert axis_name is None or np.ptp(found[name], axis=0).max() == 0
            found[name] = found[name][0]
        return found

    assert weights.worst(on_devices("data"), whole) < EXACT
    apart = weights.errors(on_devices(None), whole)
    assert min(apart[name] for name in ("y", "d_x", "d_scale", "mean", "var")) > 1e-3


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), count)


def test_dropout_masks_belong_to_the_examples():
    x = jnp.ones((16, 7, 5))
    y = dropout(x, 0.25, keys(16))
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(dropout(x, 0.25, keys(16)[order]), y[order])
    sharded = jax.pmap(lambda x, k: dropout(x, 0.25, k))(
        x.reshape(8, 2, 7, 5), keys(16).reshape(8, 2)
    )
    np.testing.assert_array_equal(sharded.reshape(x.shape), y)
    assert len(np.unique(np.asarray(y).reshape(16, -1), axis=0)) == 16
    assert not np.array_equal(dropout(x, 0.25, keys(16), layer=1), y)


def test_dropout_rate_scale_and_precision():
    x = jnp.ones((64, 1000))
    y = np.asarray(dropout(x, 0.25, keys(64)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    # 64,000 draws: the share kept has a deviation of 0.0017
    assert np.mean(y > 0) == pytest.approx(0.75, abs=0.007)
    with jax.enable_x64(True):
        wide = np.asarray(dropout(x.astype(jnp.float64), 0.25, keys(64)))
    narrow = np.asarray(dropout(x.astype(jnp.bfloat16), 0.25, keys(64)))
    assert (wide.dtype, narrow.dtype) == (np.float64, jnp.bfloat16)
    np.testing.assert_array_equal(y > 0, wide > 0)
    np.testing.assert_array_equal(y > 0, narrow > 0)


def test_dropout_without_keys_is_refused_not_skipped():
    assert dropout(jnp.ones((2, 3)), 0, None).all()
    with pytest.raises(ValueError, match="one per example"):
        dropout(jnp.ones((2, 3)), 0.5, None)


def plain_max_pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize("size", [(7, 10), (1, 2), (112, 5)])
def test_max_pool_equals_the_plain_one(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), plain_max_pool(jnp.asarray(x)))
    x[1, size[0] // 2, size[1] // 2] = np.nan
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), plain_max_pool(jnp.asarray(x)))


def splitting_max_pool(x: jax.Array) -> jax.Array:
    """Control: `jnp.maximum` halves the gradient of a tie."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    height, width = (x.shape[1] - 1) // 2, (x.shape[2] - 1) // 2
    parts = [
        x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i in range(3)
        for j in range(3)
    ]
    return functools.reduce(jnp.maximum, parts)


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_max_pool_gives_a_tie_to_the_first(size):
    import tensorflow as tf
    import torch

    rng = np.random.default_rng(0)
    x = rng.integers(1, 4, (4, *size, 3)).astype(np.float32)  # three values: ties in every window
    cotangent = rng.normal(size=plain_max_pool(x).shape).astype(np.float32)

    def gradient(pool):
        return jax.grad(lambda x: jnp.sum(pool(x) * cotangent))(jnp.asarray(x))

    leaf = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    y = torch.nn.functional.max_pool2d(leaf, 3, stride=2, padding=1)
    (y * torch.from_numpy(cotangent.transpose(0, 3, 1, 2).copy())).sum().backward()
    by_torch = leaf.grad.numpy().transpose(0, 2, 3, 1)

    variable = tf.Variable(x)
    with tf.GradientTape() as tape:
        padded = tf.pad(variable, [[0, 0], [1, 1], [1, 1], [0, 0]])  # as Keras does
        loss = tf.reduce_sum(tf.nn.max_pool2d(padded, 3, 2, "VALID") * cotangent)
    by_tensorflow = tape.gradient(loss, variable).numpy()

    # Up to four windows add their gradients to a pixel, in any order.
    np.testing.assert_allclose(gradient(max_pool), by_torch, atol=1e-6)
    np.testing.assert_allclose(gradient(max_pool), by_tensorflow, atol=1e-6)
    assert np.abs(gradient(splitting_max_pool) - by_torch).max() > 0.1


def test_matmul_has_the_gradients_of_the_plain_product():
    rng = np.random.default_rng(0)
    x, kernel, d = (rng.normal(size=shape) for shape in ((5, 7), (7, 3), (5, 3)))
    with jax.enable_x64(True):
        product, back = jax.vjp(matmul, jnp.asarray(x), jnp.asarray(kernel))
        to_x, to_kernel = back(jnp.asarray(d))
    np.testing.assert_allclose(product, x @ kernel, rtol=1e-13)
    np.testing.assert_allclose(to_x, d @ kernel.T, rtol=1e-13)
    np.testing.assert_allclose(to_kernel, x.T @ d, rtol=1e-13)
