"""What a step does beside model and optimizer, each against an independent computation."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from cifar_jax.augment import Augment, augment
from cifar_jax.config import to_dict
from cifar_jax.errors import UserError
from cifar_jax.losses import cross_entropy
from cifar_jax.models import resnet50 as network
from cifar_jax.models.mlp import MLP
from cifar_jax.models.registry import create_model
from cifar_jax.models.transfer import TransferClassifier
from cifar_jax.optim import OptimizerConfig, make_optimizer, make_schedule
from cifar_jax.parallel import JitExecution, PmapExecution
from cifar_jax.phases import Phase
from cifar_jax.recipe import Recipe, is_frozen
from cifar_jax.setup import set_up
from cifar_jax.state import create_state, named_leaves
from cifar_jax.steps import eval_step, example_keys, train_step
from cifar_jax.structures import make_structures
from tests.test_optim import BASE

SGD = dataclasses.replace(BASE, name="sgd", learning_rate=0.1)
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("rmsprop", "sgd")]
BACKBONE = "stem stage1 stage2 stage3 stage4".split()


def optimizer_of(config: OptimizerConfig):
    return make_optimizer(config, optax.constant_schedule(config.learning_rate))


def mlp_state(recipe=Recipe(), config=SGD, schedule=None):  # noqa: B008
    model = MLP(hidden_sizes=(8,), rngs=nnx.Rngs(0))
    optimizer = make_optimizer(config, schedule) if schedule else optimizer_of(config)
    return create_state(model, optimizer, seed=0, recipe=recipe)


@pytest.fixture
def small_network(monkeypatch):
    """One block a stage, so that it compiles in seconds."""
    monkeypatch.setattr(network, "STAGE_BLOCKS", (1, 1, 1, 1))


def create_small(config):
    return TransferClassifier(
        "torchvision",
        head="pooled",
        dropout=0.0,
        upsampling=config["upsampling"],
        rngs=nnx.Rngs(0),
    )


def transfer_state(frozen=(), batch_norm="frozen", config=SGD, recipe=Recipe()):  # noqa: B008
    phase = Phase(0, 1, tuple(frozen))
    model = {"upsampling": 1, "batch_norm": "train"}
    settings = {"model": model, "freeze": {"batch_norm": batch_norm}}
    structure = make_structures(create_small, settings, (phase,))[phase]
    state = create_state(create_small({"upsampling": 1}), optimizer_of(config), seed=0)
    return state.replace(
        graphdef=structure, recipe=dataclasses.replace(recipe, frozen=phase.frozen)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_pytorchs(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 10)).astype("f"), rng.integers(0, 10, 6)
    mixed = rng.dirichlet(np.ones(10), 6).astype("f")
    theirs = torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none")
    for targets in (labels, mixed):
        ours = cross_entropy(jnp.asarray(logits), jnp.asarray(targets), smoothing=smoothing)
        expected = theirs(torch.tensor(logits), torch.tensor(targets))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("resized_at", [0, 3])
def test_averages_follow_weights_and_statistics(batch, small_network, resized_at):
    """Five steps, against the sums written out; what is evaluated is the average.

    Those of statistics begin anew where images take another size.
    """
    state = transfer_state(recipe=Recipe(ema_decay=0.3))
    state = state.start_from(state.parts)
    expected = {name: np.array(x) for name, x in named_leaves(state.parts).items()}
    step = jax.jit(train_step)
    for number in range(1, 6):
        state, _ = step(state, batch(0, 8))
        if number == resized_at:
            resized = Phase(number, 1, state.recipe.frozen, resized_at=number)
            state = state.replace(recipe=state.recipe.in_phase(resized))
        for name, new in named_leaves(state.parts).items():
            count = number
            if name.startswith("batch_stats") and number > resized_at:
                count -= resized_at
            decay = min(0.3, (1 + count) / (10 + count))
            expected[name] = decay * expected[name] + (1 - decay) * np.asarray(new)
    for name, found in named_leaves(state.ema).items():
        np.testing.assert_allclose(found, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    images = batch(8, 8) | {"mask": np.ones(8, bool)}
    evaluate = jax.jit(eval_step)
    of_average = evaluate(state.replace(**state.ema, ema={}), images)
    assert evaluate(state, images).loss == of_average.loss
    assert evaluate(state.replace(ema={}), images).loss != of_average.loss


CLIPPED = dict(clip_norm=0.05, weight_decay=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "changes", [{}, CLIPPED, {**CLIPPED, "name": "rmsprop"}, {**CLIPPED, "name": "adamw"}], ids=str
)
def test_accumulated_steps_are_one_of_the_big_batch(batch, changes):
    """The MLP has no batch statistics: the mean of the gradients of parts is that of the whole.

    It is what is clipped and scaled, and decay comes once.
    """
    config = dataclasses.replace(SGD, **changes)
    whole, _ = train_step(mlp_state(config=config), batch(0, 24))
    parts = mlp_state(config=dataclasses.replace(config, accumulate=3))
    start = parts.params
    for number in range(3):
        assert number == 0 or jax.tree.all(jax.tree.map(np.array_equal, parts.params, start))
        parts, _ = train_step(parts, batch(8 * number, 8))
    # Adam and RMSprop divide a gradient by its own size: the smallest ones' rounding grows.
    atol = 1e-7 if config.name == "sgd" else 1e-4
    for found, expected in zip(*map(jax.tree.leaves, (parts.params, whole.params)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol)


def test_accumulated_steps_share_momentum_and_schedule_with_the_big_batch(batch):
    """Warm-up, cosine and momentum count updates, not the steps that make one."""
    schedule = make_schedule(0.1, name="cosine", warmup=2, steps=5, final_fraction=0.0)
    config = dataclasses.replace(SGD, momentum=0.9, nesterov=True)
    whole = mlp_state(config=config, schedule=schedule)
    start = whole.params
    parts = mlp_state(config=dataclasses.replace(config, accumulate=3), schedule=schedule)
    for number in range(4):
        whole, _ = train_step(whole, batch(24 * number, 24))
        for part in range(3):
            parts, _ = train_step(parts, batch(24 * number + 8 * part, 8))
    leaves = map(jax.tree.leaves, (parts.params, whole.params, start))
    for found, expected, before in zip(*leaves, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(expected - before).max() > 1e-3


def test_averages_of_accumulated_steps_are_those_of_the_big_batch(batch):
    """An average moves with an update, and its first, smaller decays count updates."""
    recipe = Recipe(ema_decay=0.25)  # the first decay is below it
    whole = mlp_state(recipe)
    config = dataclasses.replace(SGD, accumulate=3)
    parts = mlp_state(dataclasses.replace(recipe, accumulate=3), config)
    for number in range(6):
        before = parts.ema
        parts, _ = train_step(parts, batch(8 * number, 8))
        if number % 3 < 2:
            assert jax.tree.all(jax.tree.map(np.array_equal, parts.ema, before))
        else:
            whole, _ = train_step(whole, batch(8 * (number - 2), 24))
    for found, expected in zip(*map(jax.tree.leaves, (parts.ema, whole.ema)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_augmented_and_mixed_images_are_what_is_trained_on(batch):
    """The update is the gradient of the smoothed loss on what `augment` gives, by hand."""
    config = Augment(cutmix=1.0, flip=True)
    state, real = mlp_state(Recipe(augment=config, label_smoothing=0.1)), batch(0, 8)
    found, metrics = train_step(state, real)
    keys = example_keys(state, 8, None)
    images, targets = augment(real["image"], real["label"], keys, config)

    def loss(params):
        model = nnx.merge(state.graphdef, params, state.batch_stats)
        smoothed = 0.9 * targets + 0.1 / 10
        log_probabilities = jax.nn.log_softmax(model(images, train=True))
        return -jnp.mean(jnp.sum(smoothed * log_probabilities, axis=-1))

    value, gradients = jax.value_and_grad(loss)(state.params)
    assert float(metrics.loss) / 8 == pytest.approx(float(value), rel=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.params, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_configuration_reaches_the_step(small_config):
    small_config.label_smoothing, small_config.ema_decay = 0.1, 0.9
    small_config.augment.flip, small_config.augment.mixup = True, 0.2
    small_config.optimizer.accumulate, small_config.schedule.warmup = 3, "10 steps"
    plain = to_dict(small_config)
    setup = set_up(plain, lambda model: create_model(model, seed=0))
    recipe = setup.template.recipe
    assert recipe.augment == Augment(flip=True, mixup=0.2)
    assert (recipe.label_smoothing, recipe.ema_decay, recipe.accumulate) == (0.1, 0.9, 3)
    # 4 updates of warm-up, each after 3 steps.
    rates = [float(setup.schedule(step)) for step in (0, 2, 3, 11, 12, 13)]
    assert rates == pytest.approx([0, 0, 0.25e-3, 0.75e-3, 1e-3, 1e-3])


def test_the_configured_schedule_is_the_optimizers(small_config):
    """Every third step is an update, by minus the rate where the gradient is 1."""
    small_config.train_for, small_config.optimizer.accumulate = "90 steps", 3
    small_config.schedule.name, small_config.schedule.final_fraction = "cosine", 0.1
    small_config.optimizer.name = "sgd"
    setup = set_up(to_dict(small_config), lambda model: create_model(model, seed=0))
    optimizer, ones = setup.template.optimizer, {"kernel": jnp.ones(1)}
    update = jax.jit(optimizer.update)
    state, moves = optimizer.init(ones), []
    for _ in range(90):
        moved, state = update(ones, state, ones)
        moves.append(float(moved["kernel"][0]))
    rate = small_config.optimizer.learning_rate
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * k / 30)) / 2 for k in range(31)]
    assert moves == pytest.approx([-rate * cosine[k // 3] * (k % 3 == 2) for k in range(90)])
    logged = [float(setup.schedule(step)) for step in range(91)]
    assert logged == pytest.approx([rate * cosine[step // 3] for step in range(91)])


def test_a_run_of_epochs_ends_with_an_update(small_config):
    for accumulate, total in ((4, 88), (50, 50)):  # of 90 steps, and never more
        small_config.optimizer.accumulate = accumulate
        setup = set_up(to_dict(small_config), lambda model: create_model(model, seed=0))
        assert setup.plan.total == total
    small_config.schedule.warmup = "2 epochs"  # as long as the run, which is no longer than itself
    plan = set_up(to_dict(small_config), lambda model: create_model(model, seed=0)).plan
    assert plan.warmup == plan.total == 50
    small_config.optimizer.accumulate = 200
    with pytest.raises(UserError, match="less than one update of 200 steps"):
        set_up(to_dict(small_config), lambda model: create_model(model, seed=0))


@pytest.mark.parametrize(
    ("accumulate", "freeze", "step"),
    [
        (4, "", "90, the steps up to an end in config.train_for"),
        (3, "dense1 until 4 steps, dense2 until 6 steps", "4, the steps up to an end in config.fr"),
    ],
)
def test_what_ends_between_two_updates_is_refused(small_config, accumulate, freeze, step):
    """Of 90 steps the run, or the first of two phases."""
    small_config.optimizer.accumulate, small_config.freeze.layers = accumulate, freeze
    small_config.optimizer.name, small_config.train_for = "sgd", "90 steps"
    with pytest.raises(UserError, match=f"expected a divisor of {step}"):
        set_up(to_dict(small_config), lambda model: create_model(model, seed=0))


@pytest.mark.parametrize("optimizer", ["adamw", *MORE])
def test_groups_learn_at_their_rates(small_network, batch, optimizer):
    """The first update of a group, over that without groups, is its share of the rate."""
    config = dataclasses.replace(SGD, name=optimizer, learning_rate=1e-3, weight_decay=0.1)
    groups = dataclasses.replace(config, head_rate=3.0, layer_decay=0.5)
    moves = []
    for each in (config, groups):
        before = transfer_state(config=each)
        after, _ = jax.jit(train_step)(before, batch(0, 8))
        leaves = zip(
            named_leaves(before.params).items(), named_leaves(after.params).values(), strict=True
        )
        moves.append({name: np.asarray(new) - np.asarray(old) for (name, old), new in leaves})
    shares = dict(zip(["head", "stage4", "stage3", "stage2", "stage1", "stem"],
                      [3.0, 0.5, 0.25, 0.125, 0.0625, 0.03125], strict=True))  # fmt: skip
    for name, plain in moves[0].items():
        share = next(value for group, value in shares.items() if group in name)
        # Differences of float32 numbers of size 1: 1e-7 of those.
        np.testing.assert_allclose(moves[1][name], share * plain, rtol=1e-3, atol=3e-7)


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize("optimizer", ["adamw", *MORE])
def test_frozen_layers_do_not_move_by_a_bit(small_network, batch, batch_norm, optimizer):
    """Nor do their statistics, unless asked to; momentum and weight decay included."""
    config = dataclasses.replace(SGD, name=optimizer, momentum=0.9, weight_decay=0.1)
    before = transfer_state(("stem", "stage1", "stage3.block1.norm2"), batch_norm, config)
    after = before
    for _ in range(2):
        after, _ = jax.jit(train_step)(after, batch(0, 8))

    def moved(part):
        pair = (named_leaves(getattr(state, part)).items() for state in (before, after))
        return {
            name
            for (name, old), (_, new) in zip(*pair, strict=True)
            if not np.array_equal(old, new)
        }

    def is_frozen(name):
        return any(each in name for each in ("stem", "stage1", "stage3.block1.norm2"))

    params = set(named_leaves(before.params))
    assert moved("params") == {name for name in params if not is_frozen(name)}
    statistics = set(named_leaves(before.batch_stats))
    still = {name for name in statistics if is_frozen(name)} if batch_norm == "frozen" else set()
    assert still or batch_norm == "train"
    assert moved("batch_stats") == statistics - still
    # Nothing piles up for the moment when they thaw.
    moments = named_leaves(after.opt_state)
    assert {name for name, x in moments.items() if x.ndim and is_frozen(name) and x.any()} == set()
    assert any(x.ndim and x.any() for x in moments.values())


def test_what_is_frozen_costs_no_gradient(small_network, batch):
    """Work of the compiled step falls as more from the front is frozen, to about a third."""
    # Momentum, clipping and accumulation would use what is computed; bare SGD may drop it.
    config = dataclasses.replace(SGD, momentum=0.9, clip_norm=1.0, accumulate=2)
    flop = []
    for count in (0, 2, 4, 5):
        state = transfer_state(BACKBONE[:count], config=config)
        compiled = jax.jit(train_step).lower(state, batch(0, 8)).compile()
        flop.append(compiled.cost_analysis()["flops"])
    assert all(less < 0.85 * more for more, less in itertools.pairwise(flop))
    assert flop[-1] < 0.4 * flop[0]


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("stage1", True),
        ("stage?.block2.conv*", True),
        ("block2", True),
        ("kern", True),
        ("conv1.kernel", True),
        ("age1", False),  # within a part
        ("a", False),
        ("stage1.conv1", False),
    ],
)
def test_patterns_begin_where_a_part_of_the_name_begins(pattern, matches):
    assert is_frozen("backbone.stage1.block2.conv1.kernel", [pattern]) == matches


def test_a_linear_schedule_falls_in_a_line():
    rate = make_schedule(0.4, name="linear", warmup=10, steps=110, final_fraction=0.1)
    found = [float(rate(k)) for k in (0, 5, 10, 60, 110, 200)]
    assert found == pytest.approx([0.0, 0.2, 0.4, 0.22, 0.04, 0.04])


@nnx.jit(static_argnames="train")
def answer(model, images, train=False):
    return model(images, train=train)


def test_test_time_flip_averages_over_image_and_mirror(small_network, batch):
    images = batch(0, 4)["image"]
    plain = create_small({"upsampling": 1})
    flipping = create_small({"upsampling": 1})
    flipping.test_time_flip = True
    expected = (answer(plain, images) + answer(plain, images[:, :, ::-1])) / 2
    np.testing.assert_allclose(answer(flipping, images), expected, rtol=1e-5)
    train = functools.partial(answer, train=True)
    np.testing.assert_array_equal(train(flipping, images), train(plain, images))


@pytest.mark.parametrize("upsampling", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_odd_nearest_upsampling_repeats_pixels(small_network, batch, upsampling):
    images = batch(0, 2)["image"]
    model = create_small({"upsampling": upsampling})
    large = np.kron(images, np.ones((1, upsampling, upsampling, 1)))
    one = create_small({"upsampling": 1})
    np.testing.assert_allclose(answer(model, images), answer(one, large), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("execution", [JitExecution, PmapExecution])
def test_eight_devices_do_what_one_does(batch, execution):
    """Everything at once: frozen layers, averages, mixed and augmented images, accumulation.

    Float32 sums in another order, over four steps of small numbers.
    """
    recipe = Recipe(
        label_smoothing=0.1,
        ema_decay=0.9,
        accumulate=2,
        augment=Augment(flip=True, crop_padding=2, policy="trivial", mixup=0.2, cutmix=1.0),
        frozen=("dense1",),
    )
    config = dataclasses.replace(SGD, accumulate=2, momentum=0.9, learning_rate=0.01)
    images = [{k: x[None] for k, x in batch(16 * i, 16).items()} for i in range(4)]
    ends = []
    for run in (JitExecution(jax.devices()[:1]), execution()):
        state = run.place(jax.device_get(mlp_state(recipe, config)))
        for each in images:
            state, _ = run.train(state, each)
        ends.append(named_leaves(jax.device_get(run.to_host_tree(state))))
    for name, expected in ends[0].items():
        np.testing.assert_allclose(ends[1][name], expected, rtol=2e-4, atol=1e-6, err_msg=name)
    start = named_leaves(mlp_state(recipe, config))
    moved = {name for name, x in ends[0].items() if not np.array_equal(x, start[name])}
    assert "params.dense1.kernel" not in moved and "ema.params.dense2.kernel" in moved
