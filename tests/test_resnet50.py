"""Our ResNet-50 against Keras's (v1) and one in PyTorch (v1.5), in double precision.

Double precision is the proof: what differs there by more than rounding is a different function.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cifar_jax.models import resnet50
from cifar_jax.models.blocks import VARIANTS
from cifar_jax.models.resnet50 import ResNet50
from tests.references import runs, weights

REFERENCES = {"keras": runs.run_keras, "torchvision": runs.run_torch}
BATCH = 4
SMALL = (64, 48)
SIZES = [SMALL] + [
    pytest.param(s, marks=pytest.mark.slow) for s in ((97, 129), (224,) * 2, (256,) * 2)
]

FORWARD = 1e-12  # shares of a layer's largest value; rounding alone makes 1e-15 a layer
TRAINING = 1e-9  # batch statistics and the way back amplify rounding
SEEN = 1e-6  # what a wrong model must at least differ by


def create(variant: str, dtype=jnp.float64, **options) -> nnx.Module:
    options = dict(dtype=dtype, param_dtype=dtype) | options
    return weights.random_model(lambda: ResNet50(variant, rngs=nnx.Rngs(0), **options))


def images(size: tuple[int, int]) -> np.ndarray:
    return weights.natural_images(BATCH, *size).astype(np.float64) / 50 - 2


def cotangent() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(BATCH, 1000))


@functools.cache
def reference(variant: str, size: tuple[int, int], *, train: bool) -> runs.Run:
    with runs.float64():
        flat = weights.variables(create(variant))
        return REFERENCES[variant](
            flat, images(size), train=train, cotangent=cotangent() if train else None
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_equals_the_reference(variant, size):
    with runs.float64():
        ours = runs.run_ours(create(variant), images(size), train=False)
    found = weights.errors(ours.outputs, reference(variant, size, train=False).outputs)
    assert set(found) == {"stem", "stage1", "stage2", "stage3", "stage4", "pooled", "logits"}
    assert max(found.values()) < FORWARD, found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "variant",
    # Keras's training is compared by default in test_transfer.py, on the whole model.
    ["torchvision", pytest.param("keras", marks=pytest.mark.slow)],
)
def test_training_equals_the_reference(variant, size):
    with runs.float64():
        model = create(variant)
        before = weights.variables(model, nnx.BatchStat)
        ours = runs.run_ours(model, images(size), train=True, cotangent=cotangent())
    expected = reference(variant, size, train=True)
    assert weights.worst(ours.outputs, expected.outputs) < TRAINING
    assert weights.worst(ours.statistics, expected.statistics) < TRAINING
    assert weights.worst(ours.statistics, before) > SEEN
    found = runs.gradient_errors(ours.gradients, expected.gradients)
    assert max(found.values()) < TRAINING, found


@pytest.mark.parametrize("train", [False, True])
def test_numbers_that_are_none_are_seen(train):
    """NaN in all but the first output: `max` of Python passes over it."""
    expected = {"stem": np.ones(2), "stage1": np.ones(2)}
    broken = expected | {"stage1": np.full(2, np.nan)}
    compare = runs.gradient_errors if train else weights.errors
    assert max(compare(expected, expected).values()) == 0
    with pytest.raises(AssertionError):
        compare(broken, expected)


def exchange(flat: weights.Flat, first: str, second: str) -> weights.Flat:
    """The values of two variables, or of all below two layers or blocks, in each other's place."""
    other = {"": "", first: second, second: first}

    def place(path):
        found = next(p for p in (first, second, "") if path == p or path.startswith(p and f"{p}."))
        return other[found] + path.removeprefix(found)

    return {place(path): value for path, value in flat.items()}


def same_padding(model: ResNet50) -> None:
    model.stem_conv.padding = ((2, 3), (2, 3))  # of an even image


@pytest.mark.parametrize("variant", ["keras", pytest.param("torchvision", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        dict(spec=lambda spec: dict(stride_in_3x3=not spec.stride_in_3x3)),
        dict(spec=lambda spec: dict(epsilon=1e-3)),
        dict(pixels=lambda x: x[..., ::-1]),
        dict(model=same_padding),
        dict(values=("stage1.block2.conv1.kernel", "stage1.block3.conv1.kernel")),
        dict(values=("stage4.block3.norm1.scale", "stage4.block3.norm1.bias")),
        dict(values=("stage3.block2", "stage3.block5")),
    ],
    ids=["stride moved", "epsilon", "BGR", "SAME padding", "layers", "gamma and beta", "blocks"],
)
def test_a_wrong_model_is_seen(variant, changes, monkeypatch):
    """Each mistake that a port can make shows up in the comparison that proves it right."""
    spec = VARIANTS[variant]
    x = images(SMALL)
    with runs.float64():
        if "spec" in changes:
            wrong = dataclasses.replace(spec, **changes["spec"](spec))
            monkeypatch.setitem(VARIANTS, variant, wrong)
        model = create(variant)
        if "model" in changes:
            changes["model"](model)
        if "values" in changes:
            weights.load(model, exchange(weights.variables(model), *changes["values"]))
        if "pixels" in changes:
            x = changes["pixels"](x)
        ours = runs.run_ours(model, x, train=False)
    expected = reference(variant, SMALL, train=False).outputs
    assert weights.error(ours.outputs["logits"], expected["logits"]) > SEEN


@pytest.mark.parametrize("variant", ["keras", pytest.param("torchvision", marks=pytest.mark.slow)])
def test_float32_is_close(variant):
    """Float32 against the reference's float64: 50 layers of 6e-8 roundings."""
    model, x = create(variant, jnp.float32), images(SMALL).astype(np.float32)
    ours = runs.run_ours(model, x, train=False)
    assert ours.outputs["logits"].dtype == np.float32
    # The float64 draw rounded to float32 is the float32 draw.
    assert weights.worst(ours.outputs, reference(variant, SMALL, train=False).outputs) < 2e-5


def count(create_model, kind=nnx.Variable) -> int:
    abstract = nnx.eval_shape(lambda: nnx.state(create_model(), kind))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


@pytest.mark.parametrize(
    ("variant", "options", "kind", "expected"),
    [
        ("keras", {}, nnx.Variable, 25_636_712),  # model.count_params() of Keras, with top
        ("keras", dict(num_classes=None), nnx.Variable, 23_587_712),  # and without
        ("keras", dict(num_classes=None), nnx.BatchStat, 53_120),
        ("torchvision", {}, nnx.Param, 25_557_032),  # torchvision's documentation
    ],
)
def test_parameter_counts(variant, options, kind, expected):
    assert count(lambda: ResNet50(variant, rngs=nnx.Rngs(0), **options), kind) == expected


@pytest.fixture
def small(monkeypatch):
    """One narrow block a stage: everything that repeats, once."""
    monkeypatch.setattr(resnet50, "STAGE_BLOCKS", (1, 1, 1, 1))
    monkeypatch.setattr(resnet50, "STAGE_WIDTHS", (16, 16, 16, 16))


def test_initial_values(small):
    model = ResNet50("keras", num_classes=None, zero_gamma=True, rngs=nnx.Rngs(0))
    flat = weights.variables(model)
    for path, value in flat.items():
        value, name = np.asarray(value), path.rsplit(".")[-1]
        if name == "kernel":
            fan_out = value.size // value.shape[-2]
            # A sample of n has the deviation within 1 / sqrt(2 n); four of these.
            near = pytest.approx(np.sqrt(2 / fan_out), rel=4 / np.sqrt(2 * value.size))
            assert value.std() == near, path
        else:
            residual_scale = path.endswith("norm3.scale")
            ones = name in ("scale", "var") and not residual_scale
            np.testing.assert_array_equal(value, float(ones), err_msg=path)


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(small):
    with jax.enable_x64(True):
        x = images((32, 32))
        plain, remat = (
            runs.run_ours(create("torchvision", remat=used), x, train=True, cotangent=cotangent())
            for used in (False, True)
        )
    assert weights.worst(remat.outputs, plain.outputs) < FORWARD
    assert weights.worst(remat.statistics, plain.statistics) < FORWARD
    assert weights.worst(remat.gradients, plain.gradients) < TRAINING


def test_remat_keeps_less(small):
    """What the way back needs of the way there, parameters aside."""

    def kept(remat: bool) -> int:
        abstract = nnx.eval_shape(lambda: ResNet50("keras", remat=remat, rngs=nnx.Rngs(0)))
        graph, params, statistics = runs.split(abstract)

        def backward(params, statistics, x):
            def forward(params):
                return nnx.merge(graph, params, statistics)(x, train=True)

            return jax.vjp(forward, params)[1]

        x = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
        residuals = jax.eval_shape(backward, params, statistics, x)
        return sum(r.size for r in jax.tree.leaves(residuals)) - count(lambda: abstract)

    assert kept(True) < kept(False) / 2


def test_bfloat16_is_near_float32(small):
    x = images((32, 32))
    narrow = create("keras", jnp.bfloat16, param_dtype=jnp.float32)
    narrow, wide = (
        runs.run_ours(model, x, train=False).outputs
        for model in (narrow, create("keras", jnp.float32))
    )
    assert {n for n, y in narrow.items() if y.dtype == jnp.bfloat16} == set(narrow) - {"logits"}
    assert narrow["logits"].dtype == np.float32
    assert weights.worst(narrow, wide) < 0.05  # 8 bits of mantissa, a dozen layers
