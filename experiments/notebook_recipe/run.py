"""The first 30 steps of the notebook's transfer recipe: our command beside Keras's `fit`.

    python -m experiments.notebook_recipe.run [--weights=FILE] [--workdir=runs/notebook_recipe]

`configs/resnet50.py` without dropout, on both sides from the same weights and on the same batches.
Ours is the command itself, stopped half-way and gone on with. Writes results.json and results.md; a
second start goes on where the first one stopped. FILE: ImageNet weights of any form that
`python -m cifar_jax.port_weights` reads; CIFAR_JAX_WEIGHTS may name it instead.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_jax.errors import exit_on_user_error
from cifar_jax.recording.files import write_atomically
from cifar_jax.recording.metrics_log import read_rows
from experiments.benchmarks import interleaved
from experiments.benchmarks.peers import compile_keras

if TYPE_CHECKING:
    from cifar_jax.data.splits import Split

FOLDER = Path(__file__).parent
STEPS = 30
BATCH_SIZE = 32
LEARNING_RATE = 2e-5
PACKAGES = ("jax", "flax", "optax", "tensorflow-cpu", "keras", "numpy")


def write_keras_variant(source: Path, path: Path) -> None:
    """Writes the numbers of `source` as weights of Keras's form of ResNet-50, without the top.

    Where they are torchvision's, whose convolutions have no biases, these are zero, and the strides
    move: another function on ImageNet than the one they were trained for, and the same one for us
    and for Keras.
    """
    from cifar_jax.pretrained import names, ours, port

    weights = port.read(source)
    values = {
        name: weights.values.get(name, np.zeros(shape, np.float32))
        for name, shape in names.shapes(names.Structure("keras")).items()
    }
    missing = {name for name in values if name not in weights.values}
    assert not missing or all("conv" in name and name.endswith(".bias") for name in missing)
    header = {**vars(weights.header), "variant": "keras"}
    ours.write(path, values, ours.Header(**header))


def command(workdir: Path, weights: Path) -> list[str]:
    """Returns our command; everything but dropout and the log is the recipe's."""
    return [
        *(sys.executable, "-m", "cifar_jax.main"),
        *("--config=configs/resnet50.py", f"--workdir={workdir}"),
        *(f"--config.model.pretrained={weights}", "--config.model.dropout=0.0"),
        "--config.log_every=1 step",
    ]


def train_ours(workdir: Path, weights: Path) -> list[dict[str, Any]]:
    """Runs our command up to step 15, then on to step 30; returns one row a step."""
    for last in (STEPS // 2, STEPS):
        if len(read_rows(workdir)) >= last:
            continue
        process = subprocess.Popen(command(workdir, weights), cwd=FOLDER.parents[1])
        while len(read_rows(workdir)) < last:
            if process.poll() is not None:
                sys.exit(f"our command ended with {process.returncode}")
            time.sleep(1)
        process.send_signal(signal.SIGTERM)  # it saves and says how to go on
        process.wait()
    rows = read_rows(workdir)[:STEPS]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def train_keras(weights: Path, path: Path) -> None:
    """Runs `fit` and writes loss and accuracy of each step to `path`, as JSON."""
    import keras

    from cifar_jax.data.pipeline import train_batches, train_rows
    from tests.references import keras_transfer
    from tests.references.weights import to_keras

    config = recipe(weights)
    train, initial = start(config)
    rows = train_rows(train, [(0, STEPS)], batch_size=BATCH_SIZE, seed=config["seed"])
    batches = next(train_batches(train, rows))
    images = batches["image"].reshape(-1, 32, 32, 3).astype(np.float32)

    model = keras_transfer.create(upsampling=8, preprocessing="unit")
    to_keras(initial, model)
    compile_keras(model, learning_rate=LEARNING_RATE)
    rows = []

    class EveryStep(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.model.reset_metrics()  # `fit` would give the mean since the epoch began

        def on_train_batch_end(self, batch, logs=None):
            rows.append({"step": batch + 1, **logs})
            print(rows[-1], flush=True)

    model.fit(
        images,
        batches["label"].reshape(-1),
        batch_size=BATCH_SIZE,
        shuffle=False,
        verbose=0,
        callbacks=[EveryStep()],
    )
    write_atomically(path, json.dumps(rows).encode())


def start(config: dict[str, Any]) -> tuple["Split", dict[str, Any]]:
    """Returns the training images, and what our command starts from, by the model's names."""
    from cifar_jax.initial import start_state
    from cifar_jax.models.registry import create_model
    from cifar_jax.setup import set_up
    from cifar_jax.state import model_leaves

    setup = set_up(config, lambda model: create_model(model, seed=config["seed"]))
    state = start_state(setup.create, setup.pretrained().values)
    return setup.splits["train"], model_leaves(state.parts)


def recipe(weights: Path) -> dict[str, Any]:
    """Returns the configuration of `command`."""
    from cifar_jax.config import to_dict
    from configs.resnet50 import get_config

    config = to_dict(get_config())
    config["model"] |= {"pretrained": str(weights), "dropout": 0.0}
    assert config["optimizer"]["name"] == "rmsprop"
    assert (config["batch_size"], config["optimizer"]["learning_rate"]) == (
        BATCH_SIZE,
        LEARNING_RATE,
    )
    return config


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    rows = [
        [
            f"{ours['step']}",
            f"{ours['loss']:.6f}",
            f"{keras['loss']:.6f}",
            f"{ours['loss'] - keras['loss']:+.1e}",
            f"{ours['accuracy']:.4f}",
            f"{keras['accuracy']:.4f}",
        ]
        for ours, keras in zip(results["ours"], results["keras"], strict=True)
    ]
    header = [
        "step",
        "loss, ours",
        "loss, Keras",
        "difference",
        "accuracy, ours",
        "accuracy, Keras",
    ]
    return "\n".join(
        [
            "# The notebook's recipe, step by step: ours and Keras's `fit`",
            "",
            "Written by `python -m experiments.notebook_recipe.run`. Ours was stopped after step "
            f"{STEPS // 2} and gone on with.",
            "",
            interleaved.markdown_table(header, rows),
            "",
            interleaved.format_machine(results["machine"]),
        ]
    )


def main() -> None:
    """Runs what is missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = os.environ.get("CIFAR_JAX_WEIGHTS")
    parser.add_argument("--weights", type=Path, default=own, required=not own)
    parser.add_argument("--workdir", type=Path, default=Path("runs/notebook_recipe"))
    options = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow"}
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    workdir = options.workdir.absolute()
    weights, keras_rows = workdir / "keras_variant.safetensors", workdir / "keras.json"
    if not weights.exists():
        write_keras_variant(options.weights, weights)
    ours = train_ours(workdir / "ours", weights)
    if not keras_rows.exists():  # in a process of its own, which gives its memory back
        process = multiprocessing.get_context("spawn").Process(
            target=train_keras, args=(weights, keras_rows)
        )
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"Keras ended with {process.exitcode}")
    results = {
        "machine": interleaved.describe_machine(PACKAGES),
        "ours": [{key: row[key] for key in ("step", "loss", "accuracy")} for row in ours],
        "keras": json.loads(keras_rows.read_text()),
    }
    interleaved.write_results(FOLDER / "results", results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
