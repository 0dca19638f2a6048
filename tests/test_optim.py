"""Optimizers and schedules: every field changes an update, and by how much it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from cifar_jax.config import to_dict
from cifar_jax.optim import OptimizerConfig, make_optimizer, make_schedule, unread
from configs import common

BASE = OptimizerConfig(
    name="rmsprop",
    learning_rate=0.1,
    momentum=0.0,
    nesterov=False,
    decay=0.9,
    beta1=0.9,
    beta2=0.999,
    epsilon=1e-7,
    weight_decay=0.0,
    clip_norm=0.0,
)
PARAMS = {"dense1": {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5, 0.25])}}
GRADS = [
    {"dense1": {"kernel": jnp.array([[0.3, -0.1]]), "bias": jnp.array([-0.2, 0.05])}},
    {"dense1": {"kernel": jnp.array([[-0.2, 0.4]]), "bias": jnp.array([0.1, 0.3])}},
]


def run(config, params=PARAMS):
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    state = optimizer.init(params)
    for grads in GRADS:
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("rmsprop", "learning_rate", 0.2),
        ("rmsprop", "momentum", 0.9),
        ("rmsprop", "decay", 0.99),
        ("rmsprop", "epsilon", 1e-3),
        ("sgd", "learning_rate", 0.2),
        ("sgd", "momentum", 0.9),
        ("adam", "beta1", 0.5),
        ("adam", "beta2", 0.9),
        ("adam", "epsilon", 1e-1),
        ("adamw", "weight_decay", 0.1),
        ("sgd", "clip_norm", 0.1),
        ("sgd", "name", "adam"),
    ],
)
def test_every_field_changes_an_update(name, field, value):
    base = dataclasses.replace(BASE, name=name)
    changed = dataclasses.replace(base, **{field: value})
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), run(base), run(changed))
    assert not same["dense1"]["kernel"]


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("field", ["momentum", "nesterov", "decay", "beta1", "beta2", "epsilon"])
def test_a_field_is_read_where_it_is_said_to_be(name, field):
    """A value that changes nothing is noted at a run's start."""
    config = to_dict(common.get_config())
    base = dataclasses.replace(BASE, name=name, momentum=0.9 if field == "nesterov" else 0.0)
    value = True if field == "nesterov" else 0.5
    changed = dataclasses.replace(base, **{field: value})
    same = jax.tree.map(np.array_equal, run(base), run(changed))
    assert unread(config) == []
    config["optimizer"] |= {"name": name, field: value}
    note = (
        f'config.optimizer.{field} is {value}, which config.optimizer.name="{name}" does not read'
    )
    assert unread(config) == ([note] if same["dense1"]["kernel"] else [])


def test_a_constant_rate_has_no_final_fraction():
    config = to_dict(common.get_config())
    config["schedule"] |= {"name": "linear", "final_fraction": 0.5}
    assert unread(config) == []
    config["schedule"]["name"] = "constant"
    assert len(unread(config)) == 1 and "schedule.final_fraction is 0.5" in unread(config)[0]


def test_nesterov_changes_momentum():
    plain = dataclasses.replace(BASE, name="sgd", momentum=0.9)
    nesterov = dataclasses.replace(plain, nesterov=True)
    assert not np.allclose(run(plain)["dense1"]["bias"], run(nesterov)["dense1"]["bias"])


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
def test_weight_decay_spares_biases_and_is_decoupled(name):
    base = dataclasses.replace(BASE, name=name)
    plain, decayed = run(base), run(dataclasses.replace(base, weight_decay=0.01))
    np.testing.assert_array_equal(plain["dense1"]["bias"], decayed["dense1"]["bias"])
    kernel = np.asarray(PARAMS["dense1"]["kernel"])
    first = kernel - 0.1 * 0.01 * kernel  # each of the two updates takes rate * decay * kernel
    moved = np.asarray(plain["dense1"]["kernel"]) - kernel
    one_step = run_one(base)["dense1"]["kernel"] - kernel
    second = (first + one_step) * (1 - 0.1 * 0.01) + moved - one_step
    np.testing.assert_allclose(decayed["dense1"]["kernel"], second, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weight_decay_is_outside_the_momentum(momentum, nesterov):
    """Inside it, momentum 0.9 would make ten of one."""
    config = dataclasses.replace(
        BASE, name="sgd", momentum=momentum, nesterov=nesterov, weight_decay=0.5
    )
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(5):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    expected = PARAMS["dense1"]["kernel"] * (1 - 0.1 * 0.5) ** 5
    np.testing.assert_allclose(params["dense1"]["kernel"], expected, rtol=1e-6)


def run_one(config):
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    updates, _ = optimizer.update(GRADS[0], optimizer.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


def test_clipping_scales_the_whole_gradient_to_the_norm():
    clipped = run_one(dataclasses.replace(BASE, name="sgd", clip_norm=0.1))
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(GRADS[0])))
    expected = jax.tree.map(lambda p, g: p - 0.1 * g * 0.1 / norm, PARAMS, GRADS[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)


def test_warmup_and_cosine_at_their_corners():
    rate = make_schedule(0.4, name="cosine", warmup=10, steps=110, final_fraction=0.1)
    assert [float(rate(k)) for k in (0, 5, 10)] == pytest.approx([0.0, 0.2, 0.4])
    half = 0.4 * (0.1 + 0.9 * 0.5)
    assert [float(rate(k)) for k in (60, 110, 500)] == pytest.approx([half, 0.04, 0.04])


def test_constant_with_and_without_warmup():
    rate = make_schedule(0.4, name="constant", warmup=0, steps=10, final_fraction=0.0)
    assert [float(rate(k)) for k in (0, 9)] == pytest.approx([0.4, 0.4])
    rate = make_schedule(0.4, name="constant", warmup=4, steps=10, final_fraction=0.0)
    assert [float(rate(k)) for k in (0, 1, 4, 9)] == pytest.approx([0.0, 0.1, 0.4, 0.4])


def test_adamw_under_a_schedule_is_pytorchs():
    """40 updates of a kernel and a bias in float32, with warm-up and a rate that falls to nothing.

    Rounding as in the test below. A decay that ignores the schedule parts by more than 1e-2.
    """
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    gradients = [{k: rng.normal(size=x.shape) for k, x in start.items()} for _ in range(40)]
    theirs = {k: torch.tensor(x, dtype=torch.float32) for k, x in start.items()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs["kernel"]], "weight_decay": 0.2},
            {"params": [theirs["bias"]], "weight_decay": 0.0},
        ],
        lr=0.05,
        eps=1e-7,
    )

    def share(k: int) -> float:
        return k / 8 if k < 8 else (1 + np.cos(np.pi * (k - 8) / 32)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    config = dataclasses.replace(BASE, name="adamw", weight_decay=0.2)
    schedule = make_schedule(0.05, name="cosine", warmup=8, steps=40, final_fraction=0.0)
    ours = make_optimizer(config, schedule)
    unscheduled = optax.chain(
        optax.scale_by_adam(eps=1e-7),
        optax.scale_by_learning_rate(schedule),
        optax.add_decayed_weights(-0.05 * 0.2, {"kernel": True, "bias": False}),
    )
    params = other = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    state, other_state = ours.init(params), unscheduled.init(params)
    for gradient in gradients:
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(gradient[name], dtype=torch.float32)
        optimizer.step()
        scheduler.step()
        gradient = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient)
        updates, state = ours.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        updates, other_state = unscheduled.update(gradient, other_state, other)
        other = optax.apply_updates(other, updates)
    for name, tensor in theirs.items():
        np.testing.assert_allclose(params[name], tensor.numpy(), rtol=1e-5, atol=1e-5)
    assert np.abs(other["kernel"] - theirs["kernel"].numpy()).max() > 1e-2


# Keras 3.15 turns its variables into arrays in a way that NumPy 2 warns of.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("nesterov", [False, True])  # Keras's RMSprop has none
@pytest.mark.parametrize("name", ["rmsprop", "sgd"])
def test_momentum_under_a_schedule_is_keras(name, nesterov):
    """40 updates of one variable in float32, with a rate that falls to nothing.

    Both sides round each update once or twice: 1e-5 of the values is a hundred times that. With the
    rate outside the momentum, as in PyTorch, the values part by more than 1e-2.
    """
    import keras

    rng = np.random.default_rng(0)
    start = rng.normal(size=(4, 3)).astype(np.float32)
    gradients = rng.normal(size=(40, 4, 3)).astype(np.float32)
    rate = keras.optimizers.schedules.CosineDecay(0.1, 40)
    options = {"learning_rate": rate, "momentum": 0.875}
    theirs = (
        keras.optimizers.RMSprop(**options)
        if name == "rmsprop"
        else keras.optimizers.SGD(**options, nesterov=nesterov)
    )
    variable = keras.Variable(start)
    config = dataclasses.replace(BASE, name=name, momentum=0.875, nesterov=nesterov)
    schedule = make_schedule(0.1, name="cosine", warmup=0, steps=40, final_fraction=0.0)
    ours = make_optimizer(config, schedule)
    params, outside = {"kernel": jnp.asarray(start)}, {"kernel": jnp.asarray(start)}
    state = ours.init(params)
    scale = optax.scale_by_rms(0.9, 1e-7) if name == "rmsprop" else optax.identity()
    pytorch = optax.chain(
        scale, optax.trace(0.875, nesterov), optax.scale_by_learning_rate(schedule)
    )
    other = pytorch.init(outside)
    for gradient in gradients:
        theirs.apply([keras.ops.convert_to_tensor(gradient)], [variable])
        updates, state = ours.update({"kernel": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        updates, other = pytorch.update({"kernel": jnp.asarray(gradient)}, other, outside)
        outside = optax.apply_updates(outside, updates)
    expected = keras.ops.convert_to_numpy(variable)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5, atol=1e-5)
    assert np.abs(outside["kernel"] - expected).max() > 1e-2
