"""BatchNorm against Keras and PyTorch: modes, statistics, gradients, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_jax.models import batch_norm
from cifar_jax.models.batch_norm import BatchNorm
from tests.references import runs, weights

EXACT = 1e-12  # float64 rounding, as a share of the largest value
KERAS = dict(epsilon=1e-3, momentum=0.99, unbiased=False)
TORCH = dict(epsilon=1e-5, momentum=0.9, unbiased=True)


@pytest.fixture
def x64():
    with runs.float64():
        yield


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
    """Whose moments are computed, on the CPU that is here."""
    if request.param == "accelerator":
        choose = lambda *operands, default, **by_platform: default(*operands)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param


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
def test_batch_norm_equals_the_reference(convention, other, reference, mode, shape, platform, x64):
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


def test_a_batch_may_have_more_pixels_than_an_int32_counts():
    """As 512 images of 256 px on each of 256 chips; nothing is computed."""
    x = jax.ShapeDtypeStruct((2**17, 128, 128, 1), jnp.float32)
    channel = jax.ShapeDtypeStruct((1,), jnp.float32)

    def loss(x, *channels):
        return jnp.sum(batch_norm.normalize(x, *channels, 1e-3, None)[0])

    assert jax.eval_shape(jax.grad(loss), x, channel, channel, channel) == x


@pytest.mark.parametrize("running_mean", [0, 1e4], ids=["far running mean", "near running mean"])
def test_batch_norm_is_exact_far_from_zero(running_mean, monkeypatch):
    """Mean 1e4 deviations from 0: the difference of plain squares would have no digit left.

    On a CPU; elsewhere the running mean must be near, as the next test has it.
    """
    x = (1e4 + batch(4096, 5)).astype(np.float32)
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def found(dtype) -> dict[str, jax.Array]:
        model = norm(dtype=dtype)
        model.mean.set_value(jnp.full(5, running_mean, dtype))
        return apply_norm(model, jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype), "train")

    with jax.enable_x64(True):
        expected = found(jnp.float64)
    # Float32 holds the mean to 1e-7 of itself, 5e-4 deviations.
    assert weights.worst(found(jnp.float32), expected) < 1e-3
    monkeypatch.setattr(batch_norm, "_SAFE", np.inf)
    assert weights.errors(found(jnp.float32), expected)["y"] > 0.1


@pytest.mark.parametrize(("off", "error"), [(0, 1e-6), (10, 1e-4), (100, 1e-2)])
def test_how_near_the_shift_must_be(off, error):
    """Float32's variance, where the shift is so many deviations from the mean 1e4."""
    x = (1e4 + batch(4096, 5)).astype(np.float32)
    _, var = batch_norm._shifted_moments(x, jnp.full(5, 1e4 - off, jnp.float32), None)
    expected = x.astype(np.float64).var(tuple(range(x.ndim - 1)))
    found = np.abs(np.asarray(var) / expected - 1).max()
    assert found < error, found


@pytest.mark.parametrize("deviations", [1, 3, 9, 11, 30, 50, 100, 1000])
def test_plain_sums_are_left_where_they_lose_digits(deviations):
    """Of a CPU, whatever the running mean is."""
    x = (2 * deviations + batch(4096, 5)).astype(np.float32)
    _, var = batch_norm._plain_moments(x, 1e-3, None)
    np.testing.assert_allclose(var, x.astype(np.float64).var(0), rtol=3e-5)


@pytest.mark.parametrize("distance", [0, 5, 50], ids="mean {} deviations from 0".format)
def test_sums_are_the_same_on_every_platform(distance, x64):
    """What a CPU sums plainly, where that is safe, other platforms sum with a shift."""
    rng = np.random.default_rng(0)
    x, dy = rng.normal(2 * distance, 2, (4, 3, 2, 5)), rng.normal(size=(4, 3, 2, 5))
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    for moments in (
        batch_norm._plain_moments(x, 1e-3, None),
        batch_norm._shifted_moments(x, jnp.full(5, 3.0), None),
    ):
        np.testing.assert_allclose(moments[0], mean, rtol=EXACT, atol=EXACT)
        np.testing.assert_allclose(moments[1], var, rtol=1e-11)  # some 100 x 1e-16 at the limit
    inverse = 1 / np.sqrt(var)
    expected = dy.sum((0, 1, 2)), (dy * (x - mean)).sum((0, 1, 2))
    for sums in (batch_norm._plain_sums, batch_norm._centred_sums):
        np.testing.assert_allclose(sums(dy, x, mean, inverse), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("convention", [KERAS, TORCH], ids=["keras", "torch"])
def test_batch_norm_under_pmap_is_the_global_one(convention, platform, x64):
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
