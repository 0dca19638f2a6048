"""A network cut behind any of its parts: names, shapes, and what both pieces compute together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_jax.backbone import Backbone
from cifar_jax.models import resnet50
from cifar_jax.models.registry import create_model
from cifar_jax.models.transfer import TailClassifier, TransferClassifier
from cifar_jax.parts import part_names
from cifar_jax.state import model_leaves, split_model
from configs import resnet50_probe
from tests.references import weights

CONFIG = resnet50_probe.get_config().model.to_dict() | {"pretrained": "none", "head": "flatten"}


def names_and_maps(part):
    """Names of all arrays, of those behind `part`, and the shape of that part's maps."""

    def create():
        return create_model(CONFIG, seed=0)

    whole = model_leaves(split_model(nnx.eval_shape(create))[1])
    tail = model_leaves(split_model(nnx.eval_shape(lambda: TailClassifier(create(), part)))[1])
    images = jax.ShapeDtypeStruct((3, 32, 32, 3), np.uint8)
    maps = nnx.eval_shape(lambda x: create().backbone_maps(x, train=False, part=part), images)
    return whole, tail, maps.shape


def test_a_stage_is_named_by_its_last_block():
    assert part_names((2, 1, 3)) == (
        *("stem", "stage1.block1", "stage1", "stage2"),
        *("stage3.block1", "stage3.block2", "stage3"),
    )
    assert len(part_names()) == 1 + 16


@pytest.mark.parametrize("part", part_names())
def test_every_array_is_before_a_part_or_behind_it(part):
    whole, tail, shape = names_and_maps(part)
    backbone = Backbone(CONFIG, dict.fromkeys(whole, np.zeros(1, np.float32)), part)
    assert backbone.values.keys() | tail.keys() == whole.keys()
    assert not backbone.values.keys() & tail.keys()
    assert backbone.shape(np.empty((3, 32, 32, 3), np.uint8)) == shape


@pytest.mark.parametrize("part", ["stage2.block1", "stage2"])
def test_both_pieces_compute_the_whole(part, monkeypatch):
    monkeypatch.setattr(resnet50, "STAGE_BLOCKS", (1, 3, 1, 1))
    monkeypatch.setattr(resnet50, "STAGE_WIDTHS", (8, 16, 32, 64))
    images = weights.natural_images(2, 32, 32)

    def create():
        return TransferClassifier(upsampling=1, rngs=nnx.Rngs(0))

    whole, tail = weights.random_model(create), TailClassifier(weights.random_model(create), part)
    expected = nnx.jit(lambda model: model(images, train=False))(whole)
    maps = nnx.jit(lambda model: model.backbone_maps(images, train=False, part=part))(whole)
    found = nnx.jit(lambda model, maps: model(maps, train=False))(tail, maps)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Unchanged(nnx.Module):
    def __call__(self, maps, **_):
        return maps


def test_cached_maps_are_rounded_as_the_whole_rounds_them(monkeypatch):
    """They come as float32, which identity shortcuts would carry on to the end of the stage."""
    monkeypatch.setattr(resnet50, "STAGE_BLOCKS", (1, 1, 1, 3))
    whole = nnx.eval_shape(lambda: TransferClassifier(dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    images, maps = np.zeros((2, 32, 32, 3), np.uint8), np.zeros((2, 8, 8, 2048), np.float32)
    expected = nnx.eval_shape(lambda model: model.backbone_maps(images, train=False), whole)
    tail = TailClassifier(whole, "stage4.block1")
    tail.head = Unchanged()
    found = nnx.eval_shape(lambda model: model(maps, train=False), tail)
    assert (found.shape, found.dtype) == (expected.shape, jnp.bfloat16)
    assert expected.dtype == jnp.bfloat16
