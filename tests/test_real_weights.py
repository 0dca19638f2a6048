"""On real ImageNet weights, a dozen natural pictures get PyTorch's answers, and sensible ones.

Needs a file of torchvision-named weights: its path in CIFAR_JAX_WEIGHTS.
"""

import jax
import numpy as np
import pytest
import skimage.data
import sklearn.datasets
import torch
from flax import nnx
from PIL import Image, ImageOps
from safetensors.torch import load_file

from cifar_jax.models.resnet50 import ResNet50
from cifar_jax.models.transfer import preprocess
from cifar_jax.pretrained.load import load_pretrained
from cifar_jax.state import from_arrays, named_leaves
from tests.port_sources import real_weights
from tests.references import torch_resnet50

# Pictures with an ImageNet class of their own, and its numbers.
EXPECTED = {"coffee": {967}, "camera": {872}, "chelsea": {281, 282, 285}, "rocket": {657}}
PICTURES = (
    *EXPECTED,
    *("astronaut", "coins", "horse", "hubble_deep_field", "moon", "brick"),
    *("china.jpg", "flower.jpg"),
)
PROBABILITY_TOLERANCE = 1e-4


def picture(name: str) -> np.ndarray:
    """A sample picture of scikit-image or scikit-learn, uint8 [224, 224, 3]."""
    from_sklearn = name.endswith(".jpg")
    pixels = sklearn.datasets.load_sample_image(name) if from_sklearn else getattr(
        skimage.data, name
    )()  # fmt: skip
    pixels = pixels.astype(np.uint8) * (255 if pixels.dtype == bool else 1)
    image = ImageOps.fit(Image.fromarray(pixels).convert("RGB"), (256, 256))
    return np.asarray(image.crop((16, 16, 240, 240)))  # the usual centre crop


@pytest.fixture(scope="module")
def images():
    return np.stack([picture(name) for name in PICTURES])


@pytest.fixture(scope="module")
def ours(images):
    """A function: logits of the pictures for a channel order."""
    path = real_weights()
    graph, state = nnx.split(nnx.eval_shape(lambda: ResNet50("torchvision", rngs=nnx.Rngs(0))))
    expected = nnx.to_pure_dict(state)
    values = load_pretrained(named_leaves(expected), path).values
    state = from_arrays(expected, values, origin=path)

    @jax.jit
    def logits(state, images):
        return nnx.merge(graph, state)(preprocess(images, "torchvision"), train=False)

    return lambda channels=(0, 1, 2): np.asarray(logits(state, images[..., list(channels)]))


@pytest.fixture(scope="module")
def theirs(images):
    model = torch_resnet50.ResNet50()
    model.load_state_dict(load_file(real_weights()), strict=False)  # without batch counters
    model.eval()
    mean, std = (
        torch.tensor(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    x = (torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return model(x).numpy()


def probabilities(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def top5(logits):
    return np.argsort(-logits, axis=1)[:, :5]


def test_top_5_and_probabilities_are_pytorchs(ours, theirs):
    np.testing.assert_array_equal(top5(ours()), top5(theirs))
    difference = np.abs(probabilities(ours()) - probabilities(theirs)).max()
    assert difference < PROBABILITY_TOLERANCE, difference


def test_pictures_of_known_things_are_recognised(ours):
    best = dict(zip(PICTURES, ours().argmax(axis=1), strict=True))
    assert {name: best[name] for name in EXPECTED if best[name] not in EXPECTED[name]} == {}


def test_swapped_channels_are_seen(ours, theirs):
    swapped = ours((2, 1, 0))
    assert np.abs(probabilities(swapped) - probabilities(theirs)).max() > 0.05
