"""Augmentation on the device, against Pillow and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cifar_jax.augment import Augment, augment, cutmix, mixup, pad_and_crop, random_flip
from cifar_jax.trivial_augment import OPERATIONS, trivial_augment


@pytest.fixture(scope="module")
def images(sample):
    return sample.train_images[:8]


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def enhance(kind):
    return lambda image, strength: kind(image).enhance(1 + 0.99 * strength)


def transform(matrix):
    """About the top left corner, as Pillow's matrix is."""
    return lambda image, s: image.transform((32, 32), Image.Transform.AFFINE, matrix(s))


def turn(strength):
    """About the centre."""
    cos, sin = (f(np.deg2rad(135 * strength)) for f in (np.cos, np.sin))
    return cos, -sin, 16 - 16 * cos + 16 * sin, sin, cos, 16 - 16 * sin - 16 * cos


PILLOW = {
    "identity": lambda image, strength: image,
    "shear_x": transform(lambda s: (1, -0.99 * s, 0, 0, 1, 0)),
    "shear_y": transform(lambda s: (1, 0, 0, -0.99 * s, 1, 0)),
    "translate_x": transform(lambda s: (1, 0, -int(32 * s), 0, 1, 0)),
    "translate_y": transform(lambda s: (1, 0, 0, 0, 1, -int(32 * s))),
    "rotate": transform(turn),
    "brightness": enhance(ImageEnhance.Brightness),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(6 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 255 * (1 - abs(s))),
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
}


def test_every_operation_is_compared():
    assert PILLOW.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("strength", [-29 / 30, 0.2, 0.3, 29 / 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_pillows(images, name, strength):
    """Up to Pillow's rounding to whole values, twice where it first rounds what it blends with.

    What has whole values has Pillow's.

    A pixel that an affine map takes from the border of two may be the other one.
    """
    ours = jax.jit(jax.vmap(OPERATIONS[name], in_axes=(0, None)))(
        images.astype(np.float32), jnp.float32(strength)
    )
    theirs = [np.asarray(PILLOW[name](Image.fromarray(x), strength)) for x in images]
    difference = np.abs(np.asarray(ours) - np.stack(theirs))
    geometric = name.startswith(("shear", "translate", "rotate"))
    if geometric:
        assert np.mean(difference > 0) < 0.005
    elif name in ("identity", "posterize", "solarize", "equalize"):
        assert difference.max() == 0
    else:
        assert difference.max() <= 2


def test_strength_changes_what_it_should(images):
    """Else the comparison above would hold for operations that do nothing."""
    still = {"identity", "autocontrast", "equalize"}
    for name, operation in OPERATIONS.items():
        image = jnp.asarray(images[0], jnp.float32)
        weak, strong = (np.asarray(operation(image, jnp.float32(s))) for s in (0.1, 1.0))
        assert (name in still) == np.array_equal(weak, strong), name


def test_every_operation_and_strength_is_drawn_alike(monkeypatch):
    """7,000 draws: 500 of each operation, by their standard deviation of 22; 61 strengths."""

    def number(n):
        return lambda image, strength: jnp.full_like(image, n).at[0, 0, 0].set(strength)

    for n, name in enumerate(list(OPERATIONS)):
        monkeypatch.setitem(OPERATIONS, name, number(n))
    image = jnp.zeros((2, 2, 3))
    drawn = np.asarray(jax.jit(jax.vmap(trivial_augment, (0, None)))(keys(7000), image))
    counts = np.bincount(drawn[:, 1, 1, 0].astype(int), minlength=len(OPERATIONS))
    assert (abs(counts - 500) < 5 * 22).all()
    strengths, times = np.unique(np.round(30 * drawn[:, 0, 0, 0]), return_counts=True)
    np.testing.assert_array_equal(strengths, np.arange(-30, 31))
    assert (np.delete(times, 30) > 60).all()  # of 113; 0 comes twice as often


def test_crop_moves_and_fills_with_zeros(images):
    cropped = jax.vmap(pad_and_crop, (0, 0, None))(keys(8), images, 4)
    places = set()
    for image, found in zip(images, np.asarray(cropped), strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        fits = [
            (i, j) for i, j in np.ndindex(9, 9) if (padded[i : i + 32, j : j + 32] == found).all()
        ]
        assert len(fits) == 1
        places.add(fits[0])
    assert len(places) > 4


def test_flip_mirrors_every_second_image(images):
    image = images[0]
    flipped = np.asarray(jax.vmap(random_flip, (0, None))(keys(1000), image))
    mirrored = (flipped == image[:, ::-1]).all((1, 2, 3))
    assert ((flipped == image).all((1, 2, 3)) ^ mirrored).all()
    assert 0.45 < mirrored.mean() < 0.55


def examples(images):
    return images.astype(np.float32), np.eye(10, dtype=np.float32)[np.arange(8)]


def test_mixup_blends_pixels_and_labels_alike(images):
    pixels, labels = examples(images)
    for key in keys(5):
        image, target = mixup(key, (pixels[0], labels[0]), (pixels[1], labels[1]), 0.5)
        share = float(target[0])
        assert 0 <= share <= 1 and float(target[1]) == pytest.approx(1 - share)
        np.testing.assert_allclose(image, share * pixels[0] + (1 - share) * pixels[1], atol=1e-3)


def test_cutmix_replaces_one_rectangle_and_counts_it(images):
    pixels, labels = examples(images)
    for key in keys(20):
        image, target = cutmix(key, (pixels[0], labels[0]), (pixels[1], labels[1]), 1.0)
        image = np.asarray(image)
        other, own = ((image == pixels[i]).all(-1) for i in (1, 0))
        assert (other | own).all()
        replaced = ~own
        rows, columns = replaced.any(1), replaced.any(0)
        # Equal pixels of both images aside, the replaced ones fill their rectangle.
        assert (other[np.ix_(rows, columns)]).all()
        assert float(target[1]) == pytest.approx(np.outer(rows, columns).mean(), abs=0.02)


def test_shares_are_those_of_beta(images):
    """Mean and variance of 4,000 mixup shares: 1/2 and 1 / (4 (2 alpha + 1))."""
    pixel, own, other = np.zeros((1, 1, 3), np.float32), *np.eye(2, dtype=np.float32)
    mixed = jax.vmap(lambda key: mixup(key, (pixel, own), (pixel, other), 0.2)[1][0])(keys(4000))
    assert float(mixed.mean()) == pytest.approx(0.5, abs=0.03)
    assert float(mixed.var()) == pytest.approx(1 / (4 * 1.4), rel=0.1)


def test_with_both_asked_for_one_is_drawn_at_even_odds(images):
    """Of a black and a white image CutMix leaves only those two, and mixup one grey."""
    pair = np.stack([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)] * 200)
    config = Augment(mixup=1.0, cutmix=1.0)
    mixed, targets = augment(pair, np.arange(400, dtype=np.int32) % 2, keys(400), config)
    mixed, targets = np.asarray(mixed), np.asarray(targets)
    lowest, highest = mixed.min((1, 2, 3)), mixed.max((1, 2, 3))
    is_mixup = highest - lowest < 1e-3
    assert np.isin(mixed[~is_mixup], (0, 255)).all()
    assert 0.4 < is_mixup.mean() < 0.6  # a rectangle that is empty or all looks like mixup too
    # The share of white pixels is the share of label 1, by mixup and by CutMix.
    np.testing.assert_allclose(mixed.mean((1, 2, 3)) / 255, targets[:, 1], atol=0.02)


def one_alone(images, **field):
    """Each image under a field of its own, sixteen keys for each of the eight; labels 0 to 7."""
    labels = np.arange(8, dtype=np.int32)
    config = Augment(**field)
    compiled = jax.jit(lambda key: augment(images, labels, keys(8, key), config))
    return [tuple(map(np.asarray, compiled(key))) for key in range(16)]


def test_flip_alone_mirrors(images):
    kinds = set()
    for found, _ in one_alone(images, flip=True):
        for image, each in zip(images, found, strict=True):
            kinds.add((np.array_equal(each, image), np.array_equal(each, image[:, ::-1])))
    assert kinds == {(True, False), (False, True)}


@pytest.mark.parametrize("padding", [2, 4])
def test_crop_alone_moves_as_far_as_it_says(images, padding):
    """To each of the (2 padding + 1)^2 places alike; nearly all are seen in 128."""
    places = set()
    for found, _ in one_alone(images, crop_padding=padding):
        for image, each in zip(images, found, strict=True):
            padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
            shifts = np.ndindex(2 * padding + 1, 2 * padding + 1)
            fits = [(i, j) for i, j in shifts if (padded[i : i + 32, j : j + 32] == each).all()]
            assert len(fits) == 1
            places.add(fits[0])
    assert {i for i, _ in places} == {j for _, j in places} == set(range(2 * padding + 1))


@pytest.mark.parametrize(("field", "alpha"), [("mixup", 0.2), ("mixup", 5.0), ("cutmix", 1.0)])
def test_mixing_alone_takes_the_next_image_by_its_alpha(images, field, alpha):
    shares = []
    for found, targets in one_alone(images, **{field: alpha}):
        for i, (image, target) in enumerate(zip(found, targets, strict=True)):
            own, other = images[i].astype(np.float32), images[(i + 1) % 8].astype(np.float32)
            share = target[i]
            assert target.sum() == pytest.approx(1)
            assert target[(i + 1) % 8] == pytest.approx(1 - share, abs=1e-6)
            if field == "mixup":
                np.testing.assert_allclose(image, share * own + (1 - share) * other, atol=1e-3)
            else:
                assert ((image == own).all(-1) | (image == other).all(-1)).all()
            shares.append(share)
    if field == "mixup":  # the variance of Beta(alpha, alpha), from 128 draws
        assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.35)


def test_draws_are_not_those_of_dropout():
    """Which splits the same keys: a step's flips must not go with its masks."""
    pictures = np.zeros((1000, 1, 2, 3), np.uint8)
    pictures[:, :, 0] = 1
    found, _ = augment(pictures, np.zeros(1000, np.int32), keys(1000), Augment(flip=True))
    split = jax.vmap(lambda key: jax.random.split(key, 4))(keys(1000))
    for each in (split[:, i] for i in range(4)):
        same = np.asarray(found == jax.vmap(random_flip)(each, pictures)).all((1, 2, 3))
        assert 0.4 < same.mean() < 0.6


def test_cutmix_cuts_by_the_root_of_the_share_anywhere():
    """Sides of E[sqrt(1 - Beta)] before the border cuts them, centres drawn evenly, on 64 px."""
    size = 64
    own, other = np.zeros((size, size, 1), np.float32), np.ones((size, size, 1), np.float32)
    label = np.eye(2, dtype=np.float32)
    compiled = jax.jit(
        jax.vmap(lambda key: cutmix(key, (own, label[0]), (other, label[1]), 5.0)[0])
    )
    inside = np.asarray(compiled(keys(2000)))[..., 0] > 0
    rng = np.random.default_rng(0)
    half = np.sqrt(1 - rng.beta(5, 5, 200_000)) / 2
    centres = rng.uniform(size=(2, 200_000))
    low, high = np.clip(centres - half, 0, 1), np.clip(centres + half, 0, 1)
    assert inside.mean() == pytest.approx(np.prod(high - low, axis=0).mean(), rel=0.03)
    rows, columns = inside.any(2).sum(1) / size, inside.any(1).sum(1) / size
    assert np.std(rows) == pytest.approx(np.std(high - low), rel=0.1)
    # Drawn apart: one centre for both would make them equal.
    expected = np.corrcoef(*(high - low))[0, 1]
    assert np.corrcoef(rows, columns)[0, 1] == pytest.approx(expected, abs=0.08)


ALL = Augment(flip=True, crop_padding=4, policy="trivial", mixup=0.2, cutmix=1.0)


def test_nothing_asked_for_is_nothing_done(images):
    labels = np.arange(8, dtype=np.int32)
    assert augment(images, labels, keys(8), Augment()) == (images, labels)


def test_an_example_depends_on_its_own_key(images):
    """Another batch around it changes nothing, mixing aside."""
    config = Augment(flip=True, crop_padding=4, policy="trivial")
    labels = np.arange(8, dtype=np.int32)
    compiled = jax.jit(lambda *batch: augment(*batch, config)[0])
    whole, other = (compiled(images, labels, keys(8, seed)) for seed in (0, 1))
    part = compiled(images[3:5], labels[3:5], keys(8)[3:5])
    np.testing.assert_array_equal(whole[3:5], part)
    assert not np.array_equal(whole, other)


@pytest.mark.parametrize(
    "config",
    [pytest.param(ALL, marks=pytest.mark.slow), Augment(mixup=0.2), Augment(cutmix=1.0)],
    ids=str,
)
def test_devices_change_no_pixel(images, config):
    """Under pmap the partner of a device's last example lies on the next one."""
    labels = np.arange(8, dtype=np.int32)
    whole = augment(images, labels, keys(8), config)

    def share(x):
        return x.reshape(4, 2, *x.shape[1:])

    mapped = jax.pmap(
        lambda x, y, k: augment(x, y, k, config, axis_name="data"),
        axis_name="data",
        devices=jax.devices()[:4],
    )(share(images), share(labels), share(keys(8)))
    for found, expected in zip(mapped, whole, strict=True):
        np.testing.assert_allclose(
            np.reshape(found, expected.shape), expected, rtol=1e-5, atol=1e-3
        )
        assert expected.dtype == jnp.float32
