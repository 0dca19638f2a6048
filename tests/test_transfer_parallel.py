"""Three updates of the transfer model on eight devices equal those on one.

Float64, 1e-10: batch statistics are global, and dropout masks belong to the example. At 32 px, the
maps of the last stage are single pixels, and a replica's own statistics would be over two images:
the control shows how far off that is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cifar_jax.models.transfer import TransferClassifier
from cifar_jax.parallel import AXIS, JitExecution, PmapExecution, scan_train_steps
from cifar_jax.state import create_state, to_arrays
from cifar_jax.steps import train_step

STEPS, BATCH = 3, 16
TOLERANCE = 1e-10


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def new_state(dropout):
    model = TransferClassifier(
        "torchvision",
        upsampling=1,
        head="flatten",
        dropout=dropout,
        dtype=jnp.float64,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    optimizer = optax.rmsprop(2e-5, 0.9, 1e-7, eps_in_sqrt=True)
    return create_state(model, optimizer, seed=3)


@pytest.fixture
def stack(sample):
    rows = np.random.default_rng(0).integers(0, 2000, (STEPS, BATCH))
    return {"image": sample.train_images[rows], "label": sample.train_labels[rows]}


def run(execution, dropout, stack):
    """One call a step, as a large model is trained."""
    state = execution.place(new_state(dropout))
    for k in range(STEPS):
        state, _ = execution.train(state, {name: x[k : k + 1] for name, x in stack.items()})
    return to_arrays(execution.to_host_tree(state))


def largest_difference(arrays, reference):
    """Of any tensor, relative to its own scale."""
    assert arrays.keys() == reference.keys()
    return max(
        np.max(np.abs(arrays[name] - x)) / max(np.max(np.abs(x)), 1e-6)
        for name, x in reference.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_eight_devices_equal_one(x64, stack, dropout):
    state, step = new_state(dropout), jax.jit(train_step)
    for k in range(STEPS):
        state, _ = step(state, {name: x[k] for name, x in stack.items()})
    reference = to_arrays(state)
    del state
    for execution in (JitExecution, PmapExecution):
        assert largest_difference(run(execution(), dropout, stack), reference) < TOLERANCE
    if not dropout:
        local = PmapExecution()
        local.compiled_train = jax.pmap(
            functools.partial(scan_train_steps, axis_name=None), axis_name=AXIS
        )
        assert largest_difference(run(local, dropout, stack), reference) > 1e-3
