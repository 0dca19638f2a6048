"""Eight devices train the transfer model as one does: three steps of the recipe, in float64.

Compared is how far each variable has moved, relative to the largest movement in its tensor. Next to
the values themselves three steps at 2e-5 are small, and an error in them would be smaller still.

Why 1e-10: devices differ by the order of their sums, 1e-16 of a value or a few. Of a parameter near
1 that moves by 1e-4 this is 1e-12 of its movement, and so it was measured on the whole model, under
`jit` as under `pmap`: parameters 3e-12, optimizer state 9e-14, statistics 2e-14, losses 3e-15, and
2e-11 of the learning rate where the gradient is 0 (`largest_error`). Changing every weight of the
one-device run in its last bit does as much: rounding grows little in three steps. That takes
weights like trained ones (`tests.references.weights`) and a batch of 32; with last scales of order
1 in the residual blocks training is steeper. Wrong statistics or masks move some tensor by several
times its movement, as the controls show.
"""

import contextlib
import ctypes
import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cifar_jax.metrics import Metrics
from cifar_jax.models import resnet50
from cifar_jax.models.batch_norm import BatchNorm
from cifar_jax.models.transfer import FlattenHead, TransferClassifier, preprocess
from cifar_jax.parallel import JitExecution, PmapExecution, scan_train_steps
from cifar_jax.state import TrainState, create_state, to_arrays
from cifar_jax.steps import example_keys
from tests.references import weights

STEPS, BATCH = 3, 32
LEARNING_RATE, EPSILON = 2e-5, 1e-7  # the notebook's, as the batch
TOLERANCE = 1e-10
SEEN = 0.1


class HeadOnly(nnx.Module):
    """The notebook's head on the pixels: batch norms and dropout that compile in a second."""

    def __init__(self, **options):
        self.head = FlattenHead(32 * 32 * 3, 10, **options)

    def __call__(self, images, *, train, keys=None, axis_name=None):
        x = preprocess(images, "unit", dtype=jnp.float64)
        return self.head(x, train=train, keys=keys, axis_name=axis_name)


class OneDevice:
    """The same step compiled for the first device alone: no mesh, no axis name."""

    def __init__(self):
        self.compiled_train = jax.jit(scan_train_steps, donate_argnums=0)

    def place(self, state):
        return jax.device_put(state, jax.devices()[0])

    def train(self, state, batches):
        return self.compiled_train(state, batches)

    def to_host_tree(self, state):
        return state


def create(size: str, dropout: float) -> TrainState:
    """The notebook's model, but for its upsampling, and its optimizer."""
    options = dict(dropout=dropout, dtype=jnp.float64, param_dtype=jnp.float64)
    with pytest.MonkeyPatch.context() as patch:
        if size == "head":
            make = HeadOnly
        elif size == "narrow":  # everything that repeats, once
            patch.setattr(resnet50, "STAGE_BLOCKS", (1, 1, 1, 1))
            patch.setattr(resnet50, "STAGE_WIDTHS", (8, 16, 32, 64))
            make = functools.partial(TransferClassifier, upsampling=2)
        else:
            make = functools.partial(TransferClassifier, upsampling=1)
        model = weights.random_model(lambda: make(rngs=nnx.Rngs(0), **options))
    optimizer = optax.rmsprop(LEARNING_RATE, decay=0.9, eps=EPSILON, eps_in_sqrt=True)
    return create_state(model, optimizer, seed=5)


def give_memory_back() -> None:
    """Eight replicas of ResNet-50 take 6 GB, which glibc would keep beside the next run's."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@dataclasses.dataclass
class Run:
    moved: weights.Flat  # of every real variable, what three steps add
    metrics: list[Metrics]  # of each step
    replicas: int
    replicas_agree: bool  # bit for bit, the first and the last


def train(execution, case, stack) -> Run:
    give_memory_back()
    with jax.enable_x64(True):
        state, metrics = execution.place(create(*case)), []
        for k in range(STEPS):
            # One step a call: in a loop XLA compiles convolutions for the CPU several times slower.
            batches = {name: x[k : k + 1] for name, x in stack.items()}
            state, of_step = execution.train(state, batches)
            metrics.append(jax.device_get(of_step))
        shards = [leaf.addressable_shards for leaf in jax.tree.leaves(state)]
        (replicas,) = {len(copies) for copies in shards}
        agree = all(np.array_equal(copies[0].data, copies[-1].data) for copies in shards)
        after = to_arrays(execution.to_host_tree(state))
        del state, shards
        before = to_arrays(create(*case))
    assert int(after["step"]) == STEPS
    real = [name for name, x in before.items() if x.dtype == np.float64]
    return Run({name: after[name] - before[name] for name in real}, metrics, replicas, agree)


def largest_error(moved: weights.Flat, reference: weights.Flat) -> float:
    """Of all variables: the largest difference as a share of its tensor's largest movement.

    A convolution's bias is taken out again by its batch norm: its true gradient is 0, and what
    moves it is rounding, with no scale of its own. Both sides must be nothing, in units of the
    learning rate and, for its mean square, of the epsilon that is added to it.
    """
    assert moved.keys() == reference.keys()
    errors = []
    for name, expected in reference.items():
        if "conv" in name and name.endswith("bias"):
            scale = LEARNING_RATE if name.startswith("params") else EPSILON
            errors += [np.abs(x).max() / scale for x in (moved[name], expected)]
        else:
            errors.append(weights.error(moved[name], expected))
    return max(errors)


@pytest.fixture(scope="module")
def case(request):
    """(size, dropout)."""
    return request.param


@pytest.fixture(scope="module")
def stack(sample):
    rows = np.random.default_rng(0).integers(0, 2000, (STEPS, BATCH))
    return {"image": sample.train_images[rows], "label": sample.train_labels[rows]}


@pytest.fixture(scope="module")
def single(case, stack):
    run = train(OneDevice(), case, stack)
    assert run.replicas == 1
    return run


def cases(*slow: tuple[str, float]) -> pytest.MarkDecorator:
    """The head alone by default, with dropout, and others in the slow suite."""
    every = [("head", 0.5), *(pytest.param(case, marks=pytest.mark.slow) for case in slow)]
    return pytest.mark.parametrize("case", every, indirect=True, ids="{0[0]} {0[1]}".format)


@pytest.mark.parametrize("execution", [JitExecution, PmapExecution])
@cases(("narrow", 0.5), ("resnet50", 0.0), ("resnet50", 0.5))
def test_three_steps_equal_one_device(execution, case, stack, single):
    run = train(execution(), case, stack)
    assert run.replicas == 8
    assert run.replicas_agree
    assert largest_error(run.moved, single.moved) < TOLERANCE
    for found, expected in zip(run.metrics, single.metrics, strict=True):
        np.testing.assert_allclose(found.loss, expected.loss, rtol=TOLERANCE)
        np.testing.assert_array_equal(found.correct, expected.correct)


@cases(("narrow", 0.5))
def test_statistics_of_each_device_alone_are_seen(case, stack, single, monkeypatch):
    """Every batch norm without the axis name: it sees four examples instead of 32."""
    call = BatchNorm.__call__
    monkeypatch.setattr(BatchNorm, "__call__", lambda self, x, mode, axis_name: call(self, x, mode))
    run = train(PmapExecution(), case, stack)
    assert not run.replicas_agree
    assert largest_error(run.moved, single.moved) > SEEN


@cases(("narrow", 0.5))
def test_keys_by_position_on_the_device_are_seen(case, stack, single, monkeypatch):
    """The same masks on every device."""
    monkeypatch.setattr(
        "cifar_jax.steps.example_keys",
        lambda state, batch_size, axis_name: example_keys(state, batch_size, None),
    )
    run = train(PmapExecution(), case, stack)
    assert largest_error(run.moved, single.moved) > SEEN
