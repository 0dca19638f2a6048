"""Gradients in float32 against float64, with the kinks of the network held.

A ReLU and a maximum have a kink, and rounding may choose its other side: one choice of 2.5 million
moves the whole gradient by up to a hundredth. So both precisions are given the same choices, and
how many they would make differently is counted; at one size nothing is held. In float64 the model
is Keras's and PyTorch's: test_resnet50.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_jax.models import layers
from cifar_jax.models.blocks import VARIANTS
from tests import test_resnet50 as resnet50
from tests.references import runs, weights

ROUNDING = 2e-5  # of the gradient's length; measured: 4e-6
KINKS = 1e-5  # share of choices; measured: 2 of 2.5 million at most
FREE = 1e-3  # with no choice held, where rounding turns none; measured: 8e-6
SIZES = [resnet50.SMALL, (56, 40)]
UNTURNED = (32, 56)


def gradient(monkeypatch, variant, size, dtype, *, choices=None):
    """The gradient of sum(logits * cotangent) as one float64 vector, and the choices made.

    Args:
        choices: of an earlier call, to be made again.
    """
    graph, params, statistics = runs.split(resnet50.create(variant, dtype))
    x, cotangent = (a.astype(dtype) for a in (resnet50.images(size), resnet50.cotangent()))

    def choose(made, computed):
        made.append(computed if choices is None else jnp.asarray(choices[len(made)]))
        return made[-1]

    def loss(params):
        made = []
        monkeypatch.setattr(nnx, "relu", lambda x: jnp.where(choose(made, x > 0), x, 0))
        monkeypatch.setattr(layers, "_first_max", lambda a, b: jnp.where(choose(made, b > a), b, a))
        model = nnx.merge(graph, params, statistics)
        return jnp.sum(model.features(x, train=True)["logits"] * cotangent), made

    gradients, made = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))
    flat = weights.flatten(gradients)
    return np.concatenate([np.float64(flat[path]).ravel() for path in sorted(flat)]), made


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_gradients_are_close(variant, size, monkeypatch):
    of = functools.partial(gradient, monkeypatch, variant, size)
    narrow, choices = of(jnp.float32)
    with jax.enable_x64(True):
        _, others = of(jnp.float64)
        wide, _ = of(jnp.float64, choices=choices)
    assert distance(narrow, wide) < ROUNDING
    different = sum(np.sum(a != b) for a, b in zip(choices, others, strict=True))
    assert different < KINKS * sum(a.size for a in choices)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_free_float32_gradients_are_close(variant, monkeypatch):
    of = functools.partial(gradient, monkeypatch, variant, UNTURNED)
    narrow, _ = of(jnp.float32)
    with jax.enable_x64(True):
        wide, _ = of(jnp.float64)
    assert distance(narrow, wide) < FREE


@pytest.mark.slow
def test_a_coarser_gradient_is_seen(monkeypatch):
    """Control: images with the precision of bfloat16."""
    of = functools.partial(gradient, monkeypatch, "keras", resnet50.SMALL, jnp.float32)
    narrow, choices = of()
    images = resnet50.images(resnet50.SMALL)
    monkeypatch.setattr(resnet50, "images", lambda size: np.float32(jnp.bfloat16(images)))
    assert distance(of(choices=choices)[0], narrow) > 10 * ROUNDING
