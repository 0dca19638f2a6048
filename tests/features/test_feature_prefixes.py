"""Other heads, precisions and prefixes, against runs on images."""

import subprocess
import sys
import time

import numpy as np
import pytest

from cifar_jax import probe
from cifar_jax.checkpoint import read_checkpoint
from cifar_jax.evaluate import evaluate
from cifar_jax.parts import part_names
from cifar_jax.train import train_and_evaluate
from tests.features.helpers import COUNT, cached, changed, flags_of
from tests.runs import ROOT, assert_same_run


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"head": "flatten", "upsampling": 2, "interpolation": "nearest", "dropout": 0.5},
        {"compute_dtype": "bfloat16"},
    ],
    ids=["flatten", "bfloat16"],
)
def test_other_heads_and_precisions_answer_as_the_whole_model(
    changes, module_config, small_data, tmp_path
):
    config = changed(module_config, **{f"model__{key}": x for key, x in changes.items()})
    config.data.directory = str(tmp_path / "data")
    result = probe.train_head(config, tmp_path / "run")
    side = changes.get("upsampling", 1)
    assert cached(config).shape == (COUNT, side, side, 2048)
    found = evaluate(tmp_path / "run", split="test")
    loose = changes.get("compute_dtype") == "bfloat16"  # 8 bits; compiled twice, fused otherwise
    assert found["loss"] == pytest.approx(
        result.record["result"]["test_loss"], rel=1e-2 if loose else 1e-5
    )


@pytest.mark.slow
def test_killed_while_features_are_computed(module_config, tmp_path):
    """The real command on the whole sample, killed in the middle of its images."""

    def start(directory, workdir):
        config = changed(module_config, data__directory=str(directory), eval_batch_size=64)
        command = [sys.executable, "-m", "cifar_jax.features", *flags_of(config, workdir)]
        return subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "a", tmp_path / "run_a")
    output = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, output
    killed = start(tmp_path / "b", tmp_path / "run_b")
    while not any(x.stat().st_size > 4e6 for x in tmp_path.glob("b/features/*/train.partial")):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    again = start(tmp_path / "b", tmp_path / "run_b")
    output = again.communicate(timeout=600)[0]
    assert again.returncode == 0, output
    (ours,), (theirs,) = (list(tmp_path.glob(f"{x}/features/*/train.npy")) for x in "ba")
    assert ours.read_bytes() == theirs.read_bytes()
    assert_same_run(tmp_path / "run_b", tmp_path / "run_a")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "batch_norm"), [("stem", "frozen"), ("stage2.block3", "train"), ("stage3", "train")]
)
def test_a_cached_prefix_trains_what_follows(module_config, small_data, tmp_path, part, batch_norm):
    """Step for step what the same run does on images, with that prefix frozen by name."""
    own = {"freeze__features": part, "data__directory": str(tmp_path / "data")}
    own |= {"train_for": "2 steps", "evaluate_every": "2 steps", "model__batch_norm": batch_norm}
    cached = changed(module_config, **own)
    parts = part_names()
    prefix = " ".join(parts[: parts.index(part) + 1])
    own |= {"freeze__features": "stage4", "freeze__layers": prefix}
    direct = changed(module_config, **own)
    results = [
        probe.train_head(cached, tmp_path / "cached"),
        train_and_evaluate(direct, tmp_path / "direct"),
    ]
    ends = [read_checkpoint(tmp_path / name, 2)[0] for name in ("cached", "direct")]
    own_parts = ("params.", "batch_stats.")
    of_model = {name: x for name, x in ends[1].items() if name.startswith(own_parts)}
    assert ends[0].keys() >= of_model.keys()
    for name, expected in of_model.items():
        np.testing.assert_allclose(ends[0][name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    accuracies = [result.record["result"]["test_accuracy"] for result in results]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.051)  # one of 20 images
