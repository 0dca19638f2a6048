"""What the benchmarks count and how they sum it up; nothing is timed here."""

import json
import mmap
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode

from cifar_jax import parallel
from cifar_jax.errors import UserError
from cifar_jax.models.resnet50 import ResNet50
from experiments.benchmarks import limit, mlp_peers, peers, resnet, scaling
from experiments.benchmarks.hlo import Program
from experiments.benchmarks.job import LONG_TURN, Job
from experiments.benchmarks.plain import PlainBackbone
from experiments.gpu import throughput
from tests.references import weights

VARIANTS = ["keras", "torchvision"]
FC = 2048 * 1000  # of the ImageNet network, which ours has not


@pytest.mark.parametrize(("variant", "gmacs"), [("keras", 3.86), ("torchvision", 4.09)])
def test_multiply_adds_are_the_published_ones(variant, gmacs):
    macs = sum(each.macs for each in limit.convolutions(variant, 224).values()) + FC
    assert macs / 1e9 == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_shapes_are_those_of_our_model(variant):
    model = nnx.eval_shape(lambda: ResNet50(variant, num_classes=None, rngs=nnx.Rngs(0)))
    kernels = {
        name.removesuffix(".kernel"): tuple(x.shape)
        for name, x in weights.variables(model).items()
        if name.endswith(".kernel")
    }
    expected = {
        name: (x.kernel, x.kernel, x.features_in, x.features_out)[2 if x.kernel == 1 else 0 :]
        for name, x in limit.convolutions(variant, 256).items()
    }
    assert kernels == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("work", ["train", "infer", "features"])
def test_flop_is_what_pytorch_counts(variant, work):
    """Exactly, but for the image's own gradient, which the formula counts and nobody computes."""
    job = Job(work, upsampling=2, batch_size=3, variant=variant)
    with torch.device("meta"):
        model = peers.create_torch(job)
        images = torch.empty(job.batch_size, 32, 32, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        result = model(images)
        if work == "train":
            result.sum().backward()
    never = 2 * limit.convolutions(variant, 64)["stem_conv"].macs if work == "train" else 0
    assert counter.get_total_flops() == job.batch_size * (job.flop - never)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flop_is_what_xla_counts_for_a_plain_network(variant):
    """Of a large image: XLA leaves out products with padding, and counts additions elsewhere."""
    size = 1024
    graph, state = nnx.split(nnx.eval_shape(lambda: PlainBackbone(variant, rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x, train=False))
    counted = forward.lower(state, images).cost_analysis()["flops"]
    formula = limit.image_flop("features", variant=variant, upsampling=size // 32)
    assert counted == pytest.approx(formula, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_the_plain_network_is_ours(variant, dtype, bound):
    """Value for value: else it would not show what the fast paths buy."""
    create = {
        "ours": lambda: ResNet50(variant, num_classes=None, dtype=dtype, rngs=nnx.Rngs(0)),
        "plain": lambda: PlainBackbone(variant, dtype=dtype, rngs=nnx.Rngs(0)),
    }
    flat = weights.variables(weights.random_model(create["ours"]))
    graph, state = nnx.split(nnx.eval_shape(create["plain"]))
    shapes = weights.flatten(nnx.to_pure_dict(state))
    values = {
        name: flat[name.replace("_block", ".block")].reshape(leaf.shape)
        for name, leaf in shapes.items()
    }
    plain = nnx.merge(graph, weights.unflatten(values))
    ours = weights.random_model(create["ours"])
    images = weights.natural_images(2, 32, 32) / np.float32(255)

    @jax.jit
    def difference(ours, plain, images):
        theirs = plain(images, train=False, repeats=2)
        return jnp.max(jnp.abs(ours(images, train=False, repeats=2) - theirs)) / jnp.max(theirs)

    assert difference(ours, plain, images) < bound
    plain.stage4_block3.conv2.kernel.set_value(jnp.flip(plain.stage4_block3.conv2.kernel[...], 0))
    assert difference(ours, plain, images) > 3 * bound


@pytest.mark.slow
@pytest.mark.parametrize("work", ["train", "infer"])
def test_the_plain_network_takes_turns_with_ours(work):
    """In processes of their own, as the command lets them."""
    results = resnet.run(Job(work, 1, 16, "keras"), ["plain-jax"], rounds=1)
    assert [*results["summary"]] == ["ours", "plain-jax"]
    assert results["summary"]["plain-jax"]["gflops"] > 0


def test_keras_is_left_out_of_the_variant_it_has_not():
    assert resnet.offered(Job("train", 8, 8, "keras")) == [*resnet.CONTENDERS]
    others = resnet.offered(Job("train", 8, 8, "torchvision"))
    assert set(resnet.CONTENDERS) - set(others) == {"keras-tf", "keras-tf-xla", "keras-jax"}


def test_a_turn_is_long_enough():
    assert (Job("train", 8, 32, "keras").calls, Job("train", 8, 1, "keras").calls) == (1, 4)
    assert Job("train", 1, 8, "keras").images_a_turn == 256
    assert Job("train", 2, 32, "keras", LONG_TURN).calls == 8


@pytest.mark.slow
def test_keras_takes_the_fastest_of_its_ways(monkeypatch):
    """Here one execution of both batches; every way is tried and trains."""
    job, tried = Job("train", 1, 4, "keras", pixels_a_turn=8 * 32**2), []

    def fastest(candidates):
        ((name, way),) = candidates.items()
        assert np.isfinite(way())
        tried.append(name)
        return {name: 1.0 if name.endswith("=2") else 2.0}

    monkeypatch.setattr(peers, "fastest", fastest)
    reports = [{}, {}]
    peers.keras(job, iter(reports), backend="tensorflow", jit_compile=False)
    assert tried == ["fit", "train_on_batch", "fit, steps_per_execution=2"]
    assert all(report["settings"].endswith(tried[-1]) for report in reports)
    assert np.isfinite(reports[-1]["loss"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # within torch.compile
def test_pytorchs_ways_through_an_epoch_of_the_mlp_agree():
    """Compiled or not: losses of the second epoch, which depend on the updates of the first."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((64, 3072), np.float32))
    labels = torch.from_numpy(rng.integers(0, 10, 64))
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        step = mlp_peers._create_torch_step(True, compiled)
        epochs = [mlp_peers._torch_epoch(images, labels, *step, threads=1) for _ in range(2)]
        losses.append(epochs)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][1], rel=1e-3)


def test_the_work_of_an_mlp_is_what_pytorch_counts():
    classify, *_ = mlp_peers._create_torch_step(False, False)
    with FlopCounterMode(display=False) as counter:
        loss, _ = classify(torch.zeros(5, 3072), torch.zeros(5, dtype=torch.long))
        loss.backward()
    assert counter.get_total_flops() == 5 * limit.mlp_flop()


@pytest.fixture
def results():
    """Three rounds of a contender that is twice as slow as ours, on a machine that slows down."""
    job = Job("infer", 8, 4, "keras")
    reports = {
        name: [
            {"seconds": slowness * x, "peak_mb": 100.0, "loss": None, "settings": "plain"}
            for x in (1.0, 2.0, 4.0)
        ]
        for name, slowness in (("ours", 1), ("other", 2))
    }
    rates = [{"gflops": {"slow": 10.0 / x, "fast": 100.0 / x}} for x in (1, 2, 4)]
    return {
        "job": {**vars(job), "size": job.size, "images_a_turn": job.images_a_turn},
        "gflop_per_image": job.flop / 1e9,
        "machine": {"date": "2026-01-01", "cpu": "cpu", "cpu_count": 2}
        | {"platform": "", "load_average": (0, 0, 0), "python": "3"},
        "limit": limit.summarize_rates(rates),
        "summary": resnet.summarize(job, reports, rates),
        "reports": reports,
    }


def test_the_share_of_the_machines_rate_is_paired_by_round(results):
    summary, limits = results["summary"], results["limit"]
    assert (limits["fastest"], limits["gflops"]) == ("fast", 50)
    share = 4 * results["gflop_per_image"] / 100  # the same in every round
    assert summary["ours"]["share"] == pytest.approx(share)
    assert summary["other"]["share"] == pytest.approx(share / 2)
    assert summary["other"]["ratio"] == summary["other"]["ratio_low"] == 2
    assert summary["ours"]["image_ms"] == [500, 250, 1000]


def test_the_page_has_a_row_for_everybody(results):
    page = resnet.format_results(results)
    cells = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("|")]
    header, rule, ours, other = [[cell.strip() for cell in row] for row in cells]
    assert len(header) == len(rule) == len(ours) == len(other)
    assert (ours[0], other[0], other[header.index("ratio to ours")]) == ("ours", "other", "2.00")
    share = 4 * results["gflop_per_image"] / 100
    assert f"slow 5 (ours {10 * share:.0%}); fast 50 (ours {share:.0%})." in page


TEXT = """HloModule jit_f

%inner (a: f32[4,4], b: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %b = f32[4,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%moves (c: f32[4,4]) -> f32[4,4] {
  %c = f32[4,4]{1,0} parameter(0)
  ROOT %t = f32[4,4]{0,1} transpose(%c), dimensions={1,0}
}

ENTRY %main (x: f32[4,4], y: f32[4]) -> (f32[4,4], f32[4]) {
  %x = f32[4,4]{1,0} parameter(0)
  %y = f32[4]{0} parameter(1)
  %copy.2 = f32[4]{0} copy(%y)
  %f = f32[4,4]{1,0} fusion(%x, %x), kind=kCustom, calls=%inner
  %g = f32[4,4]{1,0} fusion(%f), kind=kLoop, calls=%moves
  %h = f32[4]{0} add(%copy.2, %copy.2)
  ROOT %out = (f32[4,4]{1,0}, f32[4]{0}) tuple(%g, %h)
}
"""


def test_instructions_are_of_the_kind_of_what_they_run():
    program = Program.parse(TEXT)
    kinds = program.kinds()
    assert (program.entry, kinds["f"], kinds["g"], kinds["h"]) == (
        *("main", "dot"),
        *("movement", "elementwise"),
    )
    assert (program.counts()["copy"], program.counts(at_least=16)["copy"]) == (1, 0)
    assert program.counts(at_least=16)["transpose"] == 1


def test_a_compiled_program_is_read_whole():
    def f(x, kernel):
        y = jax.lax.conv(x, kernel, (1, 1), "SAME")
        return jnp.sum(jax.nn.relu(y), axis=(2, 3)) @ jnp.ones((8, 8))

    x = jnp.ones((2, 8, 16, 16))
    text = jax.jit(f).lower(x, jnp.ones((8, 8, 3, 3))).compile().as_text()
    program = Program.parse(text)
    counts = program.counts()
    assert (counts["convolution"], counts["dot"]) == (1, 1)
    assert {"convolution", "dot"} <= set(program.kinds().values())
    assert sum(counts.values()) == text.count(" = ") - text.count("metadata_only = ")


def test_of_each_kind_one_setting_varies():
    for kind in scaling.VALUES:
        for setting in scaling.settings_of(kind):
            others = {key for key in scaling.USUAL if setting[key] != scaling.USUAL[key]} - {kind}
            assert others <= ({"batch"} if setting["size"] >= scaling.LARGE else set())


def test_the_memory_held_is_seen_to_grow():
    before = scaling.resident_mb()
    with mmap.mmap(-1, 64_000_000) as block:  # not from what malloc may have kept of other tests
        for start in range(0, len(block), mmap.PAGESIZE):
            block[start] = 1
        assert 60 < scaling.resident_mb() - before < 70


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_benchmark_in_which_nobody_could_train_writes_nothing(
    tmp_path, monkeypatch, capsys, device
):
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(throughput, "CONTENDERS", {"ours": greedy})
    monkeypatch.setattr(parallel, "check_devices", no_cuda if device == "cuda" else lambda: None)
    options = "--batch-sizes 2 --precisions tf32 --steps 1 --rounds 1 --contenders ours".split()
    path = tmp_path / "throughput"
    with pytest.raises(UserError) as error:
        throughput.main([*options, f"--device={device}", f"--results={path}"])
    told = {
        "cpu": "no contender could train; nothing was written; ours: no memory",
        "cuda": "no device; --device=cpu tries the command itself",
    }
    assert str(error.value) == told[device]
    assert not list(tmp_path.iterdir())


def greedy(*setting):
    raise RuntimeError("no memory\nmore")


def no_cuda():
    raise UserError("no device")


@pytest.mark.slow
def test_the_gpu_benchmark_runs_where_there_is_none(tmp_path, monkeypatch):
    """Without PyTorch's compiler, which takes minutes."""
    for name in ("JAX_PLATFORMS", "XLA_PYTHON_CLIENT_PREALLOCATE"):  # which it sets for its workers
        monkeypatch.setenv(name, os.environ.get(name, ""))
    path = tmp_path / "throughput"
    options = "--batch-sizes 2 --upsampling 1 --steps 1 --rounds 1 --contenders ours pytorch"
    throughput.main([*options.split(), "--device=cpu", f"--results={path}"])
    cases = json.loads(path.with_suffix(".json").read_text())["cases"]
    assert [case["precision"] for case in cases] == list(throughput.PRECISIONS)
    for case in cases:
        assert set(case["summary"]) == {"ours", "pytorch"}
        assert all(np.isfinite(row["loss"]) for row in case["summary"].values())
    # The same draw of the network: precision moves its loss, but hardly.
    losses = [case["summary"]["ours"]["loss"] for case in cases]
    assert losses[0] == losses[1] != losses[2]


def test_a_contender_without_memory_keeps_its_row():
    turns = ({} for _ in range(2))
    reports = []
    throughput.failing_aloud(greedy, ("a",), (reports.append(x) or x for x in turns))
    assert reports == [{"failed": "no memory"}] * 2
