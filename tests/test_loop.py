"""The loop's clock and learning rates, with a device and a schedule made of paper."""

import types

import jax
import numpy as np
import optax
import pytest

from cifar_jax import loop as loop_module
from cifar_jax.loop import RATES_AT_ONCE, History, Loop
from cifar_jax.metrics import Metrics
from cifar_jax.optim import make_schedule
from cifar_jax.phases import Phase
from cifar_jax.plan import Plan
from cifar_jax.recipe import Recipe
from cifar_jax.recording.recorder import SilentRecorder
from cifar_jax.signals import StopSignal

STEPS, SECONDS = 20, 2.0
PHASE = Phase(0, 1, ())


class Device:
    """Works on one call after the other, each for `SECONDS`, while the host goes on."""

    def __init__(self):
        self.now = self.free = 0.0

    def place(self, state):
        return state

    def compile_train(self, state, batch):
        self.now += 100 * SECONDS

    def train(self, state, batch):
        self.free = max(self.free, self.now) + SECONDS
        return state, Metrics(self.free, np.ones(1), np.ones(1))

    def fetch(self, metrics):
        self.now = max(self.now, metrics.loss)
        return metrics.replace(loss=np.ones(1))

    def wait(self):
        self.now = max(self.now, self.free)
        return 0.1


def make_loop(device, schedule, **options):
    plan = dict.fromkeys(("seed", "warmup"), 0)
    plan |= dict.fromkeys(("batch_size", "eval_batch_size", "steps_per_call", "log_every"), 1)
    plan |= dict.fromkeys(("steps_per_epoch", "total", "evaluate_every"), 10**6)
    plan |= {"phases": (PHASE,)}
    state = types.SimpleNamespace(step=0, recipe=Recipe(), replace=lambda **changes: state)
    return Loop(
        **{"state": state, "history": History(), "plan": Plan(**plan, checkpoint_every=10**6)},
        **{"splits": {}, "execution": device, "on_device": False},
        **{"checkpointer": None, "checkpoint_extra": {}},
        **{"recorder": SilentRecorder(), "stop": StopSignal(), "schedule": schedule, **options},
        structures={PHASE: None},
    )


def test_the_time_of_every_call_counts_and_that_of_its_compilation_does_not(monkeypatch):
    """Not even where a schedule hides it: its learning rate waits for the step in flight."""
    device = Device()
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(jax, "device_get", device.fetch)
    loop = make_loop(device, lambda step: device.wait())
    for _ in range(STEPS):
        loop.dispatch({}, 1)
        loop.finish_edge()
    loop.settle()
    assert device.now == (100 + STEPS) * SECONDS
    assert loop.history.train_seconds == STEPS * SECONDS  # all of them, and no compilation


def test_the_host_works_while_the_device_does(monkeypatch):
    """Nothing is fetched before the next call is on its way."""
    device = Device()
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(jax, "device_get", device.fetch)
    loop = make_loop(device, lambda step: 0.1)
    for _ in range(STEPS):
        device.now += SECONDS / 2  # to make a batch
        loop.dispatch({}, 1)
        loop.finish_edge()
    loop.settle()
    assert device.now == (100 + STEPS + 0.5) * SECONDS


@pytest.mark.parametrize(
    "schedule",
    [
        make_schedule(3e-4, name="cosine", warmup=1000, steps=10_000, final_fraction=0.01),
        make_schedule(3e-4, name="constant", warmup=0, steps=10_000, final_fraction=0.0),
        make_schedule(1.0, name="constant", warmup=7, steps=10_000, final_fraction=0.0),
        optax.constant_schedule(0.1),
    ],
    ids=["cosine", "constant", "warm-up", "a Python float"],
)
def test_learning_rates_are_the_schedules_own(schedule):
    loop = make_loop(Device(), schedule)
    edges = [0, 1, 6, 7, 999, 1000, RATES_AT_ONCE - 1, RATES_AT_ONCE, RATES_AT_ONCE + 1, 9999]
    for step in (*edges, *range(3, 9000, 611), *edges):
        # The last bits: XLA divides many numbers otherwise than one.
        assert loop.learning_rate(step) == pytest.approx(float(schedule(step)), rel=2e-7), step
