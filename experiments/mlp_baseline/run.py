"""Trains the notebook's MLP with our command and with Keras's `fit`, twelve seeds each.

    python -m experiments.mlp_baseline.run

Same splits, batch size, initialisers, optimizer and epochs. Writes results.json, results.md, every
run's metrics by epoch to metrics/, and curves.png of our seed 0.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cifar_jax.data.sources import load
from cifar_jax.data.splits import Split, fingerprint, make_splits
from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks import interleaved
from experiments.benchmarks.mlp import PACKAGES
from experiments.benchmarks.mlp_peers import BATCH_SIZE, SPLIT_SEED, create_keras_model

FOLDER = Path(__file__).parent
METRICS = FOLDER / "metrics"
SEEDS = tuple(range(12))
EPOCHS = 10
SPLITS = ("train", "validation", "test")
FREEDOM = 2 * (len(SEEDS) - 1)
T_975 = 2.074  # Student's t of 22 degrees of freedom: 95 % lie within, two-sided
Accuracies = dict[str, float]  # 0..1, by split


def train_ours(seed: int) -> Accuracies:
    """Runs the command and keeps its metrics, and seed 0's figure."""
    with tempfile.TemporaryDirectory() as workdir:
        flags = ["--config=configs/mlp.py", f"--workdir={workdir}", f"--config.seed={seed}"]
        command = [sys.executable, "-m", "cifar_jax.main", *flags]
        subprocess.run(command, check=True, cwd=FOLDER.parents[1])
        record = json.loads((Path(workdir) / "run.json").read_text())
        shutil.copy(Path(workdir) / "metrics.csv", METRICS / f"ours_{seed}.csv")
        if seed == SEEDS[0]:
            shutil.copy(Path(workdir) / "curves.png", FOLDER / "curves.png")
    with open(METRICS / f"ours_{seed}.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {
        "train": float(last["train_accuracy"]),
        "validation": float(last["validation_accuracy"]),
        "test": record["result"]["test_accuracy"],
    }


def train_keras(seed: int, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Accuracies:
    """Runs Keras's `fit` and keeps its history."""
    import tensorflow as tf

    # Not `fit(images, labels)`: after `set_random_seed` that repeats one order in every epoch.
    dataset = tf.data.Dataset.from_tensor_slices(arrays["train"])
    dataset = dataset.shuffle(len(arrays["train"][0]), seed=seed).batch(BATCH_SIZE).prefetch(2)
    model = create_keras_model(seed=seed)
    history = model.fit(
        dataset,
        epochs=EPOCHS,
        shuffle=False,
        validation_data=arrays["validation"],
        verbose=2,
    ).history
    with open(METRICS / f"keras_{seed}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["epoch", *history])
        writer.writerows(zip(range(1, EPOCHS + 1), *history.values(), strict=True))
    return {
        "train": history["accuracy"][-1],
        "validation": history["val_accuracy"][-1],
        "test": model.evaluate(*arrays["test"], verbose=0)[1],
    }


def as_arrays(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 images [N, 32, 32, 3] in 0..1 and int32 labels."""
    return split.images[split.indices].astype(np.float32) / 255, split.labels[split.indices]


def compare(ours: list[Accuracies], keras: list[Accuracies]) -> dict[str, dict[str, float]]:
    """Returns, by split, means, standard deviations, their difference and its standard error."""
    comparison = {}
    for split in SPLITS:
        a, b = (np.array([run[split] for run in runs]) for runs in (ours, keras))
        error = float(np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(SEEDS)))
        difference = float(a.mean() - b.mean())
        comparison[split] = {
            "ours_mean": float(a.mean()),
            "ours_std": float(a.std(ddof=1)),
            "keras_mean": float(b.mean()),
            "keras_std": float(b.std(ddof=1)),
            "difference": difference,
            "standard_error": error,
            "t": difference / error,
        }
    return comparison


def format_results(results: dict) -> str:
    """Returns the Markdown page."""
    runs = [
        [f"{name}, seed {seed}", *(f"{run[split]:.4f}" for split in SPLITS)]
        for name in ("ours", "keras")
        for seed, run in zip(SEEDS, results[name], strict=True)
    ]
    means = [
        [
            split,
            *(f"{c[f'{who}_mean']:.4f} ± {c[f'{who}_std']:.4f}" for who in ("ours", "keras")),
            f"{c['difference']:+.4f} ± {c['standard_error']:.4f}",
            f"{c['t']:+.2f}",
        ]
        for split, c in results["comparison"].items()
    ]
    return "\n".join(
        [
            "# The notebook's MLP: ours and Keras's `fit`",
            "",
            "Written by `python -m experiments.mlp_baseline.run`. Accuracy of the last epoch;",
            "training accuracy is the running one of that epoch, as `fit` reports it.",
            "",
            interleaved.markdown_table(["run", *SPLITS], runs),
            "",
            f"Mean ± standard deviation over {len(SEEDS)} seeds; difference ± its standard error;",
            f"t on {FREEDOM} degrees of freedom (beyond ±{T_975}: different at 95 %):",
            "",
            interleaved.markdown_table(["split", "ours", "Keras", "difference", "t"], means),
            "",
            interleaved.format_machine(results["machine"]),
        ]
    )


def main() -> None:
    """Runs everything and writes the results."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow"}
    METRICS.mkdir(exist_ok=True)
    splits = make_splits(load(), protocol="notebook", seed=SPLIT_SEED)
    arrays = {name: as_arrays(split) for name, split in splits.items()}
    results = {
        "splits_sha256": fingerprint(splits),
        "seeds": SEEDS,
        "ours": [train_ours(seed) for seed in SEEDS],
        "keras": [train_keras(seed, arrays) for seed in SEEDS],
    }
    results["comparison"] = compare(results["ours"], results["keras"])
    results["machine"] = interleaved.describe_machine(PACKAGES)
    interleaved.write_results(FOLDER / "results", results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
