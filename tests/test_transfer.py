"""The whole transfer model against Keras's, and what its options promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cifar_jax import steps
from cifar_jax.models import resnet50
from cifar_jax.models.stem import repeat_pixels
from cifar_jax.models.transfer import (
    PREPROCESSINGS,
    UPSAMPLINGS,
    FlattenHead,
    PooledHead,
    TransferClassifier,
    preprocess,
)
from cifar_jax.optim import make_optimizer
from cifar_jax.state import create_state, model_leaves
from tests.references import keras_transfer, runs, torch_transfer, weights
from tests.test_optim import BASE

SLOW = pytest.mark.slow
BATCH = 4
STEPS = 3
LEARNING_RATE = 2e-5  # the notebook's; on these few images the loss falls to a third
LABELS = np.array([3, 0, 9, 1, 6, 3, 2, 8])
OPTIMIZER = optax.rmsprop(LEARNING_RATE, decay=0.9, eps=1e-7, eps_in_sqrt=True)


def create(*, dtype=jnp.float64, param_dtype=None, **options) -> TransferClassifier:
    options = dict(dropout=0, dtype=dtype, param_dtype=param_dtype or dtype) | options
    return weights.random_model(lambda: TransferClassifier(rngs=nnx.Rngs(0), **options))


def images(batch: int = BATCH) -> np.ndarray:
    return weights.natural_images(batch, 32, 32)


@pytest.fixture
def small(monkeypatch):
    """One narrow block a stage: everything that repeats, once."""
    monkeypatch.setattr(resnet50, "STAGE_BLOCKS", (1, 1, 1, 1))
    monkeypatch.setattr(resnet50, "STAGE_WIDTHS", (8, 16, 32, 64))


# --- Against Keras -------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def train_step(graph, params, statistics, optimizer_state, pixels, labels):
    """One step in the plainest form: loss, gradients, and what comes after."""

    def loss(params):
        model = nnx.merge(graph, params, statistics)
        logits = model(pixels, train=True)
        moved = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

    (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
    return value, gradients, optax.apply_updates(params, updates), statistics, optimizer_state


def train_ours(model: TransferClassifier, pixels: np.ndarray, *, steps: int = STEPS):
    """What `keras_transfer.train` returns, from our model."""
    graph, params, statistics = runs.split(model)
    state, losses, first = OPTIMIZER.init(params), [], None
    for _ in range(steps):
        loss, gradients, params, statistics, state = train_step(
            graph, params, statistics, state, pixels, LABELS[: len(pixels)]
        )
        losses.append(float(loss))
        first = first or gradients
    first, params, statistics = map(weights.flatten, jax.device_get((first, params, statistics)))
    return losses, first, params | statistics


@pytest.mark.parametrize(
    ("upsampling", "preprocessing", "batch"),
    [
        (2, "keras", 4),
        pytest.param(8, "unit", 8, marks=SLOW),
        pytest.param(8, "keras", 4, marks=SLOW),
        pytest.param(4, "torchvision", 8, marks=SLOW),
    ],
)
def test_three_rmsprop_steps_equal_keras(upsampling, preprocessing, batch):
    """Losses, gradients of every parameter, and all variables afterwards, in float64.

    1e-9 of each tensor's largest value, and 1e-5 of its largest movement, which is 1e-4 of that.
    The head normalises over the batch alone. Of four examples with little contrast ("unit")
    rounding grows past 1e-9 within three steps; of eight it does not.
    """
    with runs.float64():
        options = dict(upsampling=upsampling, preprocessing=preprocessing)
        model = create(**options)
        before = weights.variables(model)
        pixels, labels = images(batch), LABELS[:batch]
        losses, gradients, after = train_ours(model, pixels)
        expected = keras_transfer.train(
            before, pixels, labels, steps=STEPS, learning_rate=LEARNING_RATE, **options
        )
        # Control: the same with the channels the wrong way round.
        swapped_losses, swapped_gradients, _ = train_ours(model, pixels[..., ::-1], steps=1)
    np.testing.assert_allclose(losses, expected[0], rtol=1e-9)
    assert max(runs.gradient_errors(gradients, expected[1]).values()) < 1e-9
    assert weights.worst(after, expected[2]) < 1e-9
    assert abs(swapped_losses[0] - losses[0]) > 1e-3
    assert min(weights.errors(swapped_gradients, gradients).values()) > 1e-3
    moved = {p for p, v in weights.errors(after, before).items() if v > 1e-6}
    # A convolution's bias is taken out again by its batch norm: no gradient.
    assert moved == {p for p in before if not ("conv" in p and p.endswith("bias"))}
    movement, should = (
        {p: np.asarray(x[p]) - np.asarray(before[p]) for p in moved} for x in (after, expected[2])
    )
    assert weights.worst(movement, should) < 1e-5


@pytest.mark.parametrize(
    ("upsampling", "batch"), [pytest.param(2, 4, marks=SLOW), pytest.param(8, 8, marks=SLOW)]
)
def test_three_whole_steps_of_v1_5_equal_pytorch(upsampling, batch):
    """`steps.train_step` with our optimizer: losses and all variables afterwards, in float64.

    1e-9 of each tensor's largest value, and 1e-5 of its largest movement, which is 1e-4 of that.
    """
    pixels, labels = images(batch), LABELS[:batch]
    with jax.enable_x64(True):
        options = dict(upsampling=upsampling, preprocessing="torchvision")
        model = create(variant="torchvision", **options)
        before = {name: np.asarray(x) for name, x in weights.variables(model).items()}
        optimizer = dataclasses.replace(BASE, learning_rate=LEARNING_RATE)
        update = make_optimizer(optimizer, optax.constant_schedule(LEARNING_RATE))
        state, step, losses = create_state(model, update, seed=0), jax.jit(steps.train_step), []
        for _ in range(STEPS):
            state, metrics = step(state, {"image": pixels, "label": labels.astype(np.int32)})
            losses.append(float(metrics.loss) / batch)
        after = {name: np.asarray(x) for name, x in model_leaves(state.parts).items()}
    expected_losses, expected = torch_transfer.train(
        before, pixels, labels, steps=STEPS, learning_rate=LEARNING_RATE, upsampling=upsampling
    )
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    assert weights.worst(after, expected) < 1e-9
    moved, should = ({p: x[p] - before[p] for p in before} for x in (after, expected))
    assert weights.worst(moved, should) < 1e-5
    assert losses[-1] < 0.9 * losses[0]


def test_parameter_count_is_keras_s():
    abstract = nnx.eval_shape(lambda: nnx.state(TransferClassifier(rngs=nnx.Rngs(0))))
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    theirs = keras_transfer.create(upsampling=8, preprocessing="unit").count_params()
    assert ours == theirs == 40_899_018


# --- Preprocessing and upsampling ----------------------------------------------------------------


@pytest.mark.parametrize("kind", PREPROCESSINGS)
def test_preprocessing_equals_keras(kind):
    import keras

    with runs.float64():
        pixels = images()
        ours = preprocess(jnp.asarray(pixels), kind, dtype=jnp.float64)
        mode = keras_transfer.PREPROCESSING_MODES.get(kind)
        real = pixels.astype(np.float64)
        expected = (
            keras.applications.imagenet_utils.preprocess_input(real, mode=mode)
            if mode
            else real / 255
        )
        assert weights.error(ours, expected) < 1e-12
        assert weights.error(ours[..., ::-1], expected) > 1e-2
    assert preprocess(jnp.asarray(pixels), kind, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def backbone_input(
    model: TransferClassifier, monkeypatch, pixels: np.ndarray
) -> tuple[jax.Array, int]:
    """What the transfer model hands to its backbone."""
    seen = []

    def record(self, x, *, repeats, **_):
        seen.append((x, repeats))
        return {"stage4": x}

    monkeypatch.setattr(resnet50.ResNet50, "features", record)
    model.backbone_maps(jnp.asarray(pixels), train=False)
    return seen[0]


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_upsampling_equals_keras(upsampling, interpolation, small, monkeypatch):
    import keras

    with runs.float64():
        model = create(upsampling=upsampling, interpolation=interpolation)
        x, repeats = backbone_input(model, monkeypatch, images())
        x = repeat_pixels(x, repeats)
        layer = keras.layers.UpSampling2D(upsampling, interpolation=interpolation)
        expected = layer(images() / 255)
        assert weights.error(x, expected) < (1e-12 if interpolation == "nearest" else 1e-6)


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
@pytest.mark.parametrize("upsampling", [2, 4, 8])
def test_backbone_sees_the_upsampled_preprocessed_image(upsampling, preprocessing, small):
    """Zero padding is added after the preprocessing, around the upsampled image."""
    with jax.enable_x64(True):
        model = create(upsampling=upsampling, preprocessing=preprocessing)
        pixels = jnp.asarray(images())
        small = preprocess(pixels, preprocessing, dtype=jnp.float64)
        whole = preprocess(repeat_pixels(pixels, upsampling), preprocessing, dtype=jnp.float64)
        stem = jax.jit(lambda x, repeats: model.backbone.stem(x, repeats), static_argnums=1)
        expected = stem(whole, 1)
        assert weights.error(stem(small, upsampling), expected) < 1e-12
        # Control: padding with black pixels before the preprocessing is another function.
        pad = ((0, 0), (1, 1), (1, 1), (0, 0))
        black = preprocess(jnp.pad(pixels, pad), preprocessing, dtype=jnp.float64)
        cut = upsampling // 2
        other = stem(black, upsampling)[:, cut:-cut, cut:-cut]
        assert (weights.error(other, expected) > 1e-3) == (preprocessing != "unit")


def test_real_pixels_are_taken_as_they_are(small, monkeypatch):
    model = create(dtype=jnp.float32)
    as_integers, _ = backbone_input(model, monkeypatch, images())
    as_reals, _ = backbone_input(model, monkeypatch, images().astype(np.float32))
    np.testing.assert_array_equal(as_integers, as_reals)


# --- Modes, dropout, precision, devices ----------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", pytest.param("eval", marks=SLOW), "frozen"])
def test_what_a_step_moves(mode, small):
    """Asserted on the variables after a step, bit by bit, not on flags."""
    model = create(dtype=jnp.float32, upsampling=1, head="flatten", batch_norm=mode)
    before = weights.variables(model)
    _, _, after = train_ours(model, images(), steps=1)
    still = {p for p in before if np.array_equal(before[p], after[p])}
    statistics = {p for p in before if p.startswith("backbone.") and p.endswith((".mean", ".var"))}
    norms = {p for p in before if p.startswith("backbone.") and "norm" in p}
    expected = {"train": set(), "eval": statistics, "frozen": norms}[mode]
    if mode == "train":  # only rounding moves a bias in front of a batch norm
        still = {p for p in still if "conv" not in p}
    assert still == expected


@pytest.mark.parametrize("head", [FlattenHead, PooledHead])
def test_dropout_acts_in_training_only(head):
    maps = jnp.asarray(np.random.default_rng(0).uniform(size=(BATCH, 2, 2, 16)), jnp.float32)
    features = maps[0].size if head is FlattenHead else 16

    def logits(*, dropout: float, train: bool, seed: int | None = None) -> np.ndarray:
        shared = dict(dropout=dropout, dtype=jnp.float32, param_dtype=jnp.float32)
        model = weights.random_model(lambda: head(features, 10, rngs=nnx.Rngs(0), **shared))
        keys = None if seed is None else jax.random.split(jax.random.key(seed), BATCH)
        return np.asarray(model(maps, train=train, keys=keys, axis_name=None))

    dropped = logits(dropout=0.5, train=True, seed=0)
    np.testing.assert_array_equal(dropped, logits(dropout=0.5, train=True, seed=0))
    assert not np.allclose(dropped, logits(dropout=0.5, train=True, seed=1))
    assert not np.allclose(dropped, logits(dropout=0, train=True))
    evaluated = logits(dropout=0.5, train=False, seed=0)
    np.testing.assert_array_equal(evaluated, logits(dropout=0, train=False))
    with pytest.raises(ValueError, match="needs keys"):
        logits(dropout=0.5, train=True)


@pytest.mark.parametrize("train", [True, False])
def test_bfloat16_logits_and_variables_are_float32(train):
    def run():
        model = TransferClassifier(dtype=jnp.bfloat16, dropout=0, rngs=nnx.Rngs(0))
        pixels = jnp.asarray(images())
        maps = model.backbone_maps(pixels, train=train)
        return maps, model(pixels, train=train), nnx.state(model)

    maps, logits, variables = nnx.eval_shape(run)
    assert maps.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables))} == {np.dtype(np.float32)}


@pytest.mark.parametrize("head", ["flatten", pytest.param("pooled", marks=SLOW)])
def test_pmap_with_axis_name_equals_one_device(head, small):
    """Every batch norm of the model reduces over the devices, dropout on."""
    with jax.enable_x64(True):
        model = create(upsampling=1, head=head, dropout=0.5)
        graph, params, statistics = runs.split(model)

        def forward(pixels, keys, axis_name=None):
            model = nnx.merge(graph, params, statistics)
            logits = model(pixels, train=True, keys=keys, axis_name=axis_name)
            return logits, weights.flatten(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

        pixels, keys = images(16), jax.random.split(jax.random.key(0), 16)
        logits, moved = jax.jit(forward)(pixels, keys)
        spread, moved_apart = jax.pmap(functools.partial(forward, axis_name="data"), "data")(
            pixels.reshape(8, 2, 32, 32, 3), keys.reshape(8, 2)
        )
    assert weights.error(spread.reshape(16, 10), logits) < 1e-10
    for device in (0, 7):
        assert weights.worst({p: v[device] for p, v in moved_apart.items()}, moved) < 1e-10


@pytest.mark.parametrize(
    ("create", "name", "value"),
    [
        (resnet50.ResNet50, "variant", "v3"),
        (resnet50.ResNet50, "batch_norm", "on"),
        (TransferClassifier, "variant", "v3"),
        (TransferClassifier, "preprocessing", "caffe"),
        (TransferClassifier, "upsampling", 9),
        (TransferClassifier, "interpolation", "cubic"),
        (TransferClassifier, "head", "linear"),
        (TransferClassifier, "batch_norm", "on"),
    ],
)
def test_unknown_names_are_one_clear_line(create, name, value):
    with pytest.raises(ValueError) as told:
        nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0), **{name: value}))
    message = str(told.value)
    assert name in message and repr(value) in message and "expected one of" in message
    assert "\n" not in message


def test_unknown_preprocessing_is_one_clear_line():
    with pytest.raises(ValueError, match="'caffe'; expected one of keras, torchvision, unit"):
        preprocess(np.zeros((1, 2, 2, 3)), "caffe")
