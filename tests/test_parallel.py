"""Eight devices make the updates of one: under `jit` with a sharded batch, and under `pmap`.

In float64 the executions differ by the order of their sums: 1e-10 after 50 steps. The model has
dropout, so that random keys are compared too, and the controls show what a wrong reduction costs.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cifar_jax.errors import UserError
from cifar_jax.models.layers import dropout
from cifar_jax.models.mlp import MLP
from cifar_jax.parallel import (
    AXIS,
    JitExecution,
    PmapExecution,
    check_batch_size,
    create_execution,
    scan_train_steps,
)
from cifar_jax.state import create_state, to_arrays
from cifar_jax.steps import eval_step, example_keys, train_step

STEPS, BATCH = 50, 32
TOLERANCE = 1e-10


class DropoutMLP(MLP):
    """The MLP with dropout on its pixels."""

    def __call__(self, images, *, train, keys=None, axis_name=None):
        if train:
            images = dropout(images.astype(self.dtype), 0.2, keys)
        return super().__call__(images, train=train)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def new_state(x64):
    def make():
        model = DropoutMLP(
            hidden_sizes=(16,), dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        optimizer = optax.rmsprop(1e-3, 0.9, 1e-7, eps_in_sqrt=True)
        return create_state(model, optimizer, seed=5)

    return make


@pytest.fixture
def rows():
    return np.random.default_rng(0).integers(0, 2000, (STEPS, BATCH), np.int32)


@pytest.fixture
def stack(sample, rows):
    return {"image": sample.train_images[rows], "label": sample.train_labels[rows]}


@pytest.fixture
def single(new_state, stack):
    """Arrays and metrics of 50 steps on one device."""
    with jax.default_device(jax.devices()[0]):
        state, metrics = jax.jit(scan_train_steps)(new_state(), stack)
        return to_arrays(state), jax.device_get(metrics)


def largest_difference(arrays, reference):
    assert arrays.keys() == reference.keys()
    return max(np.max(np.abs(arrays[name] - reference[name])) for name in reference)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize("execution", [JitExecution, PmapExecution])
def test_training_equals_one_device(execution, new_state, stack, single):
    execution = execution()
    state, metrics = execution.train(execution.place(new_state()), stack)
    arrays = to_arrays(execution.to_host_tree(state))
    assert arrays["params.dense1.kernel"].dtype == np.float64
    assert int(arrays["step"]) == STEPS
    assert largest_difference(arrays, single[0]) < TOLERANCE
    np.testing.assert_allclose(metrics.loss, single[1].loss, rtol=TOLERANCE)
    np.testing.assert_array_equal(metrics.correct, single[1].correct)
    np.testing.assert_array_equal(metrics.count, np.full(STEPS, BATCH))


@pytest.mark.parametrize("execution", [JitExecution, PmapExecution])
def test_a_set_on_the_devices_gives_the_same_batches(execution, new_state, sample, rows, single):
    execution = execution()
    execution.keep({"image": sample.train_images, "label": sample.train_labels})
    for name, array in execution.dataset.items():
        assert array.sharding.is_fully_replicated and len(array.sharding.device_set) == 8, name
    state = execution.place(new_state())
    execution.compile_train(state, {"row": rows})
    state, metrics = execution.train(state, {"row": rows})
    arrays = to_arrays(execution.to_host_tree(state))
    assert largest_difference(arrays, single[0]) < TOLERANCE
    np.testing.assert_array_equal(metrics.correct, single[1].correct)
    state, _ = execution.train(execution.place(new_state()), {"row": rows[::-1]})
    arrays = to_arrays(execution.to_host_tree(state))
    assert largest_difference(arrays, single[0]) > 1e-4  # the control: another order


@pytest.mark.parametrize("execution", [JitExecution, PmapExecution])
def test_what_is_compiled_ahead_is_what_the_calls_run(execution, new_state, stack, caplog):
    def compiled():
        found = re.findall(r"Finished XLA compilation of (\S+)", caplog.text)
        caplog.clear()
        return set(found)

    execution = execution()
    state = execution.place(new_state())
    with jax.log_compiles():
        compiled()
        execution.compile_train(state, stack)
        ahead = compiled()
        for _ in range(2):  # the second one takes what the first one gave
            state, _ = execution.train(state, stack)
        assert ahead and not ahead & compiled()
        execution.train(state, {name: x[:1] for name, x in stack.items()})
        assert ahead & compiled()  # the control: another length


@pytest.mark.parametrize("execution", [JitExecution, PmapExecution])
def test_evaluation_equals_one_device_and_skips_padding(execution, new_state, batch):
    padded = batch(0, 24) | {"mask": np.arange(24) < 21}
    whole = batch(0, 21) | {"mask": np.ones(21, bool)}
    state = new_state()
    expected = jax.device_get(eval_step(state, whole))
    execution = execution()
    metrics = jax.device_get(execution.evaluate(execution.place(state), padded))
    assert metrics.count == expected.count == 21
    assert metrics.correct == expected.correct
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-12)


def test_a_missing_reduction_is_seen(new_state, stack, single):
    """Without an axis name, every replica of `pmap` trains on its own part of the batch."""
    execution = PmapExecution()
    execution.compiled_train = jax.pmap(
        functools.partial(scan_train_steps, axis_name=None), axis_name=AXIS
    )
    state, _ = execution.train(execution.place(new_state()), stack)
    assert largest_difference(to_arrays(execution.to_host_tree(state)), single[0]) > 1e-4


def test_keys_that_ignore_the_device_are_seen(new_state, stack, single, monkeypatch):
    """The same masks on every device are other masks than those of the whole batch."""
    monkeypatch.setattr(
        "cifar_jax.steps.example_keys",
        lambda state, batch_size, axis_name: example_keys(state, batch_size, None),
    )
    execution = PmapExecution()
    state, _ = execution.train(execution.place(new_state()), stack)
    assert largest_difference(to_arrays(execution.to_host_tree(state)), single[0]) > 1e-4


def test_one_replica_for_the_host_takes_one_device_s_memory(new_state):
    """Indexing the state of all devices would put the result on each of them."""
    execution = PmapExecution()
    state = execution.place(new_state())
    devices = [leaf.sharding.device_set for leaf in jax.tree.leaves(execution.to_host_tree(state))]
    assert {len(found) for found in devices} == {1}


def test_a_step_is_the_same_alone_and_in_a_scan(new_state, stack, single):
    state, step = new_state(), jax.jit(train_step)
    for k in range(STEPS):
        state, _ = step(state, {name: x[k] for name, x in stack.items()})
    assert largest_difference(to_arrays(state), single[0]) < TOLERANCE


def test_keys_depend_on_seed_step_and_position(new_state):
    state = new_state()

    def data(state, size=8):
        return jax.random.key_data(example_keys(state, size, None))

    keys = data(state)
    assert len(np.unique(keys, axis=0)) == 8
    np.testing.assert_array_equal(keys[:4], data(state, 4))
    assert np.all(np.any(keys != data(state.replace(step=state.step + 1)), axis=1))
    assert np.all(np.any(keys != data(state.replace(seed=state.seed + 1)), axis=1))


def test_a_batch_that_devices_cannot_share_is_refused():
    with pytest.raises(UserError, match="config.batch_size is 12.*8 devices"):
        check_batch_size(12, key="batch_size")
    check_batch_size(16, key="batch_size")


def test_executions_by_name():
    assert isinstance(create_execution("jit"), JitExecution)
    assert isinstance(create_execution("pmap"), PmapExecution)
