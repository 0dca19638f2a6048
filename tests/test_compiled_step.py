"""Counts over the compiled training step: what a change must not make worse without notice.

Nothing is timed. Counts belong to XLA's CPU backend of the pinned version, on one device: where
one improves, or a new version moves it, put the new number into `BOUNDS`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cifar_jax import config as configuration
from cifar_jax import models
from cifar_jax.loop import Loop
from cifar_jax.models import resnet50 as network
from cifar_jax.models.layers import matmul
from cifar_jax.models.registry import create_model
from cifar_jax.optim import OptimizerConfig, make_optimizer
from cifar_jax.parallel import JitExecution
from cifar_jax.state import create_state, named_leaves
from cifar_jax.train import train_and_evaluate
from configs import mlp, resnet50, resnet50_cpu
from experiments import ahead
from experiments.benchmarks.hlo import Program
from experiments.benchmarks.twins import TWINS, Twin
from tests.references import weights

BATCH, UPSAMPLING = 2, 2
LARGE = 2**16  # elements: the larger kernels, and maps of both images


@dataclasses.dataclass(frozen=True)
class Bounds:
    """At most so many of each in the optimised program."""

    convolutions: int  # forward, both gradients
    dots: int
    bare: int  # convolutions that XLA has not fused for its fast library, ten times slower
    large_copies: int
    large_transposes: int
    gflop: float
    gigabytes: float


# By the blocks of the stages; the default suite compiles one block of each kind.
SHALLOW, WHOLE = (2, 1, 1, 1), (3, 4, 6, 3)
BOUNDS = {
    SHALLOW: Bounds(14, 58, 0, large_copies=19, large_transposes=7, gflop=1.40, gigabytes=0.567),
    WHOLE: Bounds(41, 130, 0, large_copies=73, large_transposes=31, gflop=3.70, gigabytes=1.455),
}


def compile_step(blocks: tuple[int, ...]):
    """The notebook's step as a user's run compiles it on one device, and its state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "STAGE_BLOCKS", blocks)
        return compile_calls(notebook_config(), steps=1, batch_size=BATCH)


def notebook_config():
    config = resnet50.get_config()
    config.model.upsampling, config.model.pretrained = UPSAMPLING, "none"
    return config


def compile_calls(config, *, steps: int, batch_size: int):
    """What a run compiles for calls of so many steps on one device, and its state."""
    state = ahead.abstract_state(configuration.to_dict(config))
    batches = ahead.abstract_batches(steps, batch_size)
    return one_device().compiled_train.lower(state, batches).compile(), state


def compile_evaluation(config, *, batch_size: int):
    """What a run compiles to evaluate a batch on one device."""
    state = ahead.abstract_state(configuration.to_dict(config))
    batch = ahead.abstract_batches(batch_size) | {"mask": jax.ShapeDtypeStruct((batch_size,), bool)}
    return one_device().compiled_eval.lower(state, batch).compile()


def one_device() -> JitExecution:
    return JitExecution(jax.devices()[:1])


def count(program) -> Bounds:
    text = Program.parse(program.as_text())
    counts, large, costs = text.counts(), text.counts(at_least=LARGE), program.cost_analysis()
    return Bounds(
        convolutions=counts["convolution"],
        dots=counts["dot"],
        bare=sum(each.opcode == "convolution" for each in text.computations[text.entry]),
        large_copies=large["copy"],
        large_transposes=large["transpose"],
        gflop=costs["flops"] / 1e9,
        gigabytes=costs["bytes accessed"] / 1e9,
    )


def worse(found: Bounds, bounds: Bounds) -> dict[str, tuple[float, float]]:
    """What was found and its bound, where that is exceeded."""
    return {
        name: (number, getattr(bounds, name))
        for name, number in vars(found).items()
        if number > getattr(bounds, name)
    }


@pytest.fixture(
    scope="module", params=[SHALLOW, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=str
)
def compiled(request):
    return *compile_step(request.param), BOUNDS[request.param]


def test_the_step_is_no_more_work_than_it_was(compiled):
    program, _, bounds = compiled
    found = count(program)
    assert not worse(found, bounds), found


@pytest.mark.slow
def test_the_step_of_two_cores_is_no_more_work_than_it_was(monkeypatch):
    """That of `configs/resnet50_cpu.py`: the torchvision variant, norms in "eval", bilinear."""
    monkeypatch.setattr(network, "STAGE_BLOCKS", SHALLOW)
    config = resnet50_cpu.get_config()
    config.model.upsampling, config.model.pretrained = UPSAMPLING, "none"
    program, _ = compile_calls(config, steps=1, batch_size=BATCH)
    # The bare ones, input gradients of strided 3x3 convolutions, are no slower than others.
    bounds = Bounds(14, 48, 2, large_copies=19, large_transposes=8, gflop=1.65, gigabytes=0.485)
    assert not worse(count(program), bounds), count(program)


def test_evaluation_is_no_more_work_than_it_was(monkeypatch):
    monkeypatch.setattr(network, "STAGE_BLOCKS", SHALLOW)
    found = count(compile_evaluation(notebook_config(), batch_size=BATCH))
    bounds = Bounds(5, 20, 0, large_copies=0, large_transposes=0, gflop=0.44, gigabytes=0.052)
    assert not worse(found, bounds), found


def test_an_mlp_is_no_more_work_than_it_was():
    step, _ = compile_calls(mlp.get_config(), steps=5, batch_size=32)  # a loop's body counts once
    bounds = Bounds(0, 8, 0, large_copies=1, large_transposes=1, gflop=0.0282, gigabytes=0.0094)
    assert not worse(count(step), bounds), count(step)
    evaluation = count(compile_evaluation(mlp.get_config(), batch_size=32))
    bounds = Bounds(0, 3, 0, large_copies=0, large_transposes=0, gflop=0.0131, gigabytes=0.0018)
    assert not worse(evaluation, bounds), evaluation


# What grows without it. "moments from plain sums" lowers none of them, only the time (ablate.py).
SEEN = {
    "folded stem": "gflop",
    "sliced max pooling": "gigabytes",
    "weight gradient of 1x1 convolutions": "large_transposes",
    "products of patches for tiny maps": "convolutions",
    "batch norm's gradient written out": "gigabytes",
    "gradient from plain sums": "gigabytes",
    "a loop of one is no loop": "bare",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", SEEN)
def test_a_fast_path_that_is_lost_is_seen(monkeypatch, path):
    twin = TWINS[path]
    monkeypatch.setattr(twin.module, twin.name, twin.plain)
    program, _ = compile_step(SHALLOW)
    assert SEEN[path] in worse(count(program), BOUNDS[SHALLOW])


def gradients_of(*seeds: int) -> list[dict[str, np.ndarray]]:
    """What an update by the gradient adds to the shallow network's arrays, by seeds of images."""
    config = notebook_config()
    config.optimizer.name, config.model.dropout = "sgd", 0.0
    config = configuration.to_dict(config)
    optimizer = make_optimizer(OptimizerConfig(**config["optimizer"]), optax.constant_schedule(1.0))
    jax.clear_caches()  # a function that was replaced must be traced again
    execution, found = one_device(), []
    for seed in seeds:
        state = create_state(create_model(config["model"], seed=0), optimizer, seed=0)
        before = jax.device_get(named_leaves(state.parts))
        images = weights.natural_images(BATCH, 32, 32, seed=seed)[None]
        labels = np.arange(BATCH, dtype=np.int32)[None]
        after, _ = execution.train(execution.place(state), {"image": images, "label": labels})
        after = named_leaves(jax.device_get(after.parts))
        found.append({name: after[name] - before[name] for name in before})
    return found


@pytest.fixture(scope="module")
def gradients():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "STAGE_BLOCKS", SHALLOW)
        return gradients_of(0, 1)


ACCELERATORS = Twin(jax.lax, "platform_dependent", lambda *x, default, **others: default(*x))


@pytest.mark.slow
@pytest.mark.parametrize("path", [*TWINS, "what other platforms compute"])
def test_a_plain_twin_computes_the_same(monkeypatch, gradients, path):
    """Gradients and moved statistics, in float32; another batch shows the scale."""
    twin = TWINS.get(path, ACCELERATORS)
    monkeypatch.setattr(network, "STAGE_BLOCKS", SHALLOW)
    monkeypatch.setattr(twin.module, twin.name, twin.plain)
    (plain,) = gradients_of(0)
    for part in ("kernel", "scale", "mean", "var"):  # of a bias before a norm there is only noise
        ours, other, expected = (
            np.concatenate([np.ravel(x) for name, x in each.items() if name.endswith(part)])
            for each in (*gradients, plain)
        )
        scale = np.linalg.norm(expected)
        bound = 1e-4 if part in ("mean", "var") else 0.01  # a rounding turns a ReLU on or off
        assert np.linalg.norm(ours - expected) < bound * scale, part
        assert np.linalg.norm(other - expected) > 0.3 * scale, part


@pytest.mark.parametrize(("product", "folded"), [(matmul, False), (jnp.matmul, True)])
def test_no_transpose_is_folded_into_the_products_of_an_mlp(monkeypatch, product, folded):
    """XLA has no fast product of that form for a CPU."""
    monkeypatch.setattr(models.mlp, "matmul", product)
    text = compile_calls(mlp.get_config(), steps=5, batch_size=32)[0].as_text()
    assert ("lhs_contracting_dims={0}" in text) == folded


def test_the_state_is_updated_in_place(compiled):
    program, state, _ = compiled
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= 0.99 * size


@pytest.mark.parametrize(
    ("execution", "expected"),
    [
        ("jit", {"jit(scan_train_steps)": 2, "jit(eval_step)": 1}),  # validation and test alike
        ("pmap", {"jit(_fun)": 3}),  # as JAX calls whatever `pmap` maps
    ],
)
def test_a_run_compiles_once_for_each_length_of_a_call(
    small_config, tmp_path, compiled_names, execution, expected
):
    small_config.execution = execution
    small_config.steps_per_call, small_config.log_every = 20, "1 epoch"  # 20, 20, 5, twice
    train_and_evaluate(small_config, tmp_path)
    assert {name: compiled_names.count(name) for name in expected} == expected, compiled_names


@pytest.fixture
def guarded_run(small_config, tmp_path, monkeypatch):
    """A short run whose calls may send nothing to the device unless they say so.

    The learning rates of the log are computed on it, thousands at once, from Python numbers.
    """
    train, learning_rate = Loop.train, Loop.learning_rate

    def guarded(loop, *options):
        with jax.transfer_guard_host_to_device("disallow"):
            train(loop, *options)

    def unguarded(loop, step):
        with jax.transfer_guard_host_to_device("allow"):
            return learning_rate(loop, step)

    monkeypatch.setattr(Loop, "train", guarded)
    monkeypatch.setattr(Loop, "learning_rate", unguarded)
    return lambda: train_and_evaluate(small_config, tmp_path)


@pytest.mark.parametrize("execution", ["jit", "pmap"])
def test_training_sends_nothing_to_the_device_unasked(small_config, guarded_run, execution):
    small_config.execution = execution
    assert guarded_run().step == 90


def test_the_guard_sees_a_batch_that_was_not_put(guarded_run, monkeypatch):
    monkeypatch.setattr(JitExecution, "_put", lambda self, batch, sharding: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        guarded_run()
