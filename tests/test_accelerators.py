"""TPUs and GPUs without having one: exported programs, their own compilers, bfloat16.

None of this runs on such a device. It shows that the whole step is accepted for one, what the
compiled program holds and sends, and what computing in bfloat16 changes.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from cifar_jax.errors import UserError
from cifar_jax.models import resnet50
from cifar_jax.models.transfer import TransferClassifier
from cifar_jax.parallel import JitExecution, scan_train_steps
from cifar_jax.state import TrainState, create_state, to_arrays
from experiments import ahead
from experiments.ahead import MEMORY, Case
from experiments.gpu.run import compile_apart, format_row, h100_case
from experiments.tpu import roofline
from experiments.tpu import run as tpu
from tests.references import weights

# --- Exported ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [Case("mlp", "jit", "here:8", 32), Case("resnet50", "jit", "here:8", 32)],
    ids=lambda case: case.model,
)
def test_the_step_is_exported_for_tpu_and_cuda(case):
    """The sharded call of `parallel.py`, lowered for machines that are not here, and back."""
    config, execution = ahead.run_config(case), JitExecution()
    leaves, tree = jax.tree.flatten(ahead.abstract_state(config))
    leaves = ahead.with_sharding(leaves, execution.replicated)
    batches = ahead.abstract_batches(config["steps_per_call"], config["batch_size"])
    batches = ahead.with_sharding(batches, execution.stack_sharding)

    @jax.jit
    def step(leaves, batches):  # lists of arrays: a stored program knows no optax
        return jax.tree.leaves(execution.compiled_train(tree.unflatten(leaves), batches))

    exported = jax.export.export(step, platforms=["tpu", "cuda"])(leaves, batches)
    again = jax.export.deserialize(exported.serialize())
    assert (again.platforms, again.nr_devices) == (("tpu", "cuda"), 8)
    assert again.in_avals == exported.in_avals
    after = [(x.shape, x.dtype) for x in again.out_avals]
    assert after[: len(leaves)] == [(x.shape, x.dtype) for x in leaves]
    assert len(after) == len(leaves) + 3  # and the metrics


# --- TPU's compiler ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reduced"),
    [
        # All kernels' gradients together, and metrics.
        (Case("mlp", "jit", "v5e:2x4", 32), 3),
        (Case("mlp", "pmap", "v5e:2x4", 32), 4),
        # Those, and sums of the batch norms: 103 in the middle of the step, the rest together.
        (Case("resnet50", "jit", "v5e:2x4", 32, upsampling=2), 106),
        # On another generation, and on a slice of 256 chips.
        (Case("resnet50", "pmap", "v6e:4x4", 32, upsampling=2), 106),
        (Case("mlp", "jit", "v5e:16x16", 32), 3),
    ],
    ids=lambda case: (
        f"{case.model}-{case.execution}-{case.topology}" if isinstance(case, Case) else ""
    ),
)
def test_the_compiler_of_tpus_takes_the_step(case, reduced):
    pytest.importorskip("libtpu", reason="TPU's compiler: pip install -r requirements-tpu.txt")
    program = ahead.measure(case, ahead.lower(case))
    state = ahead.abstract_state(ahead.run_config(case))
    # Donation: every array of the state is updated where it lies.
    assert program["aliased_leaves"] == len(jax.tree.leaves(state))
    assert program["aliased"] >= ahead.nbytes(state)
    assert ahead.total_memory(program) < MEMORY[case.chip]
    reduces = program["collectives"]
    assert {each["name"] for each in reduces} == {"all-reduce"}
    assert len(reduces) == reduced
    # One of them carries nearly all of the bytes: float32 under pmap, bfloat16 under jit.
    largest = max(each["bytes"] for each in reduces)
    assert largest > 0.98 * sum(each["bytes"] for each in reduces)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert 0.99 * parameters < largest / (4 if case.execution == "pmap" else 2) < 1.01 * parameters


# --- GPU's compiler ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "reduced"),
    [
        (h100_case("mlp", "float32", 32), 0),
        (h100_case("mlp", "float32", 32, gpus=8, execution="pmap"), 3),
        (h100_case("resnet50", "tf32", 32), 0),
        # XLA aborts where it fuses the ReLU and the stride of the shortcut into its product.
        (h100_case("resnet50", "bfloat16", 32, variant="torchvision"), 0),
        # It refuses `jax.image.resize`. With all augmentations, averages, images on the device.
        (h100_case("resnet50_best", "bfloat16", 32), 0),
    ],
    ids=lambda case: (
        f"{case.model}-{case.execution}-{case.dtype}-{case.variant}"
        if isinstance(case, Case)
        else ""
    ),
)
def test_the_compiler_of_gpus_takes_the_step(case, reduced):
    why = "GPU's compiler: make test-gpu brings it"
    pytest.importorskip("jax_plugins.xla_cuda12", reason=why)
    program = compile_apart(case)
    assert "refused" not in program, program
    state = ahead.abstract_state(ahead.run_config(case))
    assert program["aliased_leaves"] == len(jax.tree.leaves(state))
    assert program["aliased"] >= ahead.nbytes(state)
    assert ahead.total_memory(program) < MEMORY[case.chip]
    assert [each["name"] for each in program["collectives"]] == ["all-reduce"] * reduced


def test_a_row_of_gpus_counts_all_reduces():
    reduces = [
        {"name": "all-reduce", "dtypes": ["f32"], "arrays": 1, "bytes": 3_000_000},
        {"name": "all-reduce", "dtypes": ["bf16"], "arrays": 2, "bytes": 1_000_000},
        {"name": "collective-permute", "dtypes": ["f32"], "arrays": 1, "bytes": 9_000_000},
    ]
    program = dict(arguments=4e9, outputs=3e9, aliased=3e9, temporaries=2e9, code=0)
    program |= dict(aliased_leaves=2, state_leaves=3, collectives=reduces)
    row = format_row(h100_case("resnet50", "tf32", 32, gpus=8), program)
    assert row[:7] == ["resnet50", "keras", "256", "jit", "8", "tf32", "32"]
    assert row[7:] == ["4.00", "2.00", "6.00", "7.1%", "2 of 3", "2", "4.00", "3.00 MB, f32"]
    died = format_row(h100_case("mlp", "float32", 32), {"refused": "why"})
    assert died[1:3] == ["", "32"]
    assert died[7:] == ["why"] + [""] * 7


def test_a_row_of_tpus_adds_up_its_memory():
    reduces = [{"name": "all-reduce", "dtypes": ["f32"], "arrays": 3, "bytes": 2_000_000}] * 2
    mib = dict(arguments=1024, padding=1, outputs=512, aliased=512, temporaries=3000, code=72)
    program = {name: size * 2**20 for name, size in mib.items()}
    others = [{"name": "collective-permute", "dtypes": ["f32"], "arrays": 1, "bytes": 9_000_000}]
    program |= dict(steps_per_call=5, flop=7e9, bytes_accessed=8e9, collectives=reduces + others)
    result = dict(case=vars(Case("resnet50", "jit", "v5e:2x4", 1024)), date="today")
    row = dict(zip(tpu.HEADER, tpu.format_row(result | {"program": program}), strict=True))
    assert [row[name] for name in ("arguments", "all", "of the chip's")] == [
        *("1,024.0", "4,096.0", "25.00%"),
    ]
    assert (row["all-reduces"], row["MB"], row["largest"]) == ("2", "4.00", "2.00 MB, 3 f32")
    refused = tpu.format_row(result | {"program": {"refused": "why"}})
    assert (refused[4], len(refused)) == ("refused: why", len(tpu.HEADER))


def test_the_roofline_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["roofline"])
    with pytest.raises(UserError, match=r"programs.json is not there; .*tpu.run writes it"):
        roofline.main()
    (tmp_path / "programs.json").write_text('{"programs": []}')
    with pytest.raises(UserError, match=r"programs.json has no Case.*tpu.run compiles it"):
        roofline.main()
    program = dict(case=vars(roofline.PROGRAM), program=dict(flop=128e12, bytes_accessed=128e9))
    (tmp_path / "programs.json").write_text(json.dumps({"programs": [program]}))
    with pytest.raises(UserError, match=r"feed.json is not there; .*tpu.feed writes it"):
        roofline.main()
    (tmp_path / "feed.json").write_text('{"calls": [{"batch_size": 256, "median": 788}]}')
    roofline.main()
    v5e, *_ = json.loads((tmp_path / "roofline.json").read_text())["estimates"]
    # 1 TFLOP an image at 197 TFLOP/s, 1 GB at 819 GB/s.
    assert v5e["computing_only"] == pytest.approx(197)
    assert v5e["with_traffic"] == pytest.approx(197)
    assert "25.0%" in (tmp_path / "roofline.md").read_text()


def test_collectives_are_read_from_a_program():
    text = """
      %a.1 = (f32[64]{0:T(128)S(1)}, bf16[3,2]{1,0}) all-reduce(%x, %y), channel_id=1
      %b = s32[]{:T(128)} all-reduce-start(%c), channel_id=2
      %d = s32[] all-reduce-done(%b)
      %e = f32[64]{0} get-tuple-element(%all-reduce.1), index=0
    """
    assert ahead.collectives(text) == [
        {"name": "all-reduce", "dtypes": ["bf16", "f32"], "arrays": 2, "bytes": 64 * 4 + 6 * 2},
        {"name": "all-reduce", "dtypes": ["s32"], "arrays": 1, "bytes": 4},
    ]


# --- bfloat16 ------------------------------------------------------------------------------------

GRADIENT = optax.sgd(1.0)  # an update that is the gradient
TRAIN = jax.jit(scan_train_steps)


def create(dtype: jnp.dtype) -> TrainState:
    model = weights.random_model(
        lambda: TransferClassifier(upsampling=2, dropout=0, dtype=dtype, rngs=nnx.Rngs(0))
    )
    return create_state(model, GRADIENT, seed=0)


def train(dtype: jnp.dtype, images: np.ndarray, labels: np.ndarray):
    """Returns loss, gradient [parameters] and arrays after a step computed in `dtype`."""
    state = create(dtype)
    after, metrics = TRAIN(state, {"image": images[None], "label": labels[None]})
    moved = jax.tree.map(lambda old, new: np.ravel(old - new), state.params, after.params)
    gradient = np.concatenate(jax.tree.leaves(moved))
    return float(metrics.loss[0]) / len(labels), gradient, to_arrays(after)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.slow
def test_bfloat16_trains_like_float32(monkeypatch):
    """Eight bits of mantissa through a dozen layers and back, on 16 images.

    Measured: logits 0.11 of the largest apart, losses 0.015 nats, gradients at a cosine of 0.92
    with lengths 9 % apart, statistics 0.001. Labels that are not the images' show the scale.
    """
    monkeypatch.setattr(resnet50, "STAGE_BLOCKS", (1, 1, 1, 1))
    monkeypatch.setattr(resnet50, "STAGE_WIDTHS", (8, 16, 32, 64))
    images, labels = weights.natural_images(16, 32, 32), np.arange(16, dtype=np.int32) % 10
    loss, gradient, narrow = train(jnp.bfloat16, images, labels)
    wide_loss, wide_gradient, wide = train(jnp.float32, images, labels)
    _, other_gradient, _ = train(jnp.float32, images, labels[::-1].copy())

    assert abs(loss - wide_loss) < 0.05
    assert np.isfinite(gradient).all()
    assert cosine(gradient, wide_gradient) > 0.85 > 0.5 > cosine(other_gradient, wide_gradient)
    assert 0.8 < np.linalg.norm(gradient) / np.linalg.norm(wide_gradient) < 1.2
    assert {x.dtype for n, x in narrow.items() if "." in n} == {np.dtype(np.float32)}
    statistics = [name for name in wide if name.startswith("batch_stats")]
    assert max(weights.error(narrow[n], wide[n]) for n in statistics) < 0.005

    def logits(state):
        return nnx.merge(state.graphdef, state.params, state.batch_stats)(images, train=False)

    ours, reference = (jax.jit(logits)(create(dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    assert ours.dtype == np.float32
    assert 1e-4 < weights.error(ours, reference) < 0.2  # and it did compute in bfloat16
