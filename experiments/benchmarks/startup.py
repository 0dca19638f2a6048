"""Times what a user waits for before and beside the training, with warm file caches.

    python -m experiments.benchmarks.startup [--rounds=5]

Each measurement runs in a fresh process; the first of each does not count. README.md says what is
measured.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cifar_jax.data import sources
from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks import interleaved
from experiments.benchmarks.command import make_parser, written_by

RESULTS = Path(__file__).parent / "results" / "startup"
PACKAGES = ("jax", "flax", "orbax-checkpoint", "tensorflow-cpu", "numpy")
DATA_MB = 60_000 * 32 * 32 * 3 / 1e6
STEPS_PER_EPOCH = 1125  # of the MLP's run
LOAD = """
import json, time
from cifar_jax.data.sources import load
from experiments.benchmarks.interleaved import peak_mb
before, start = peak_mb(), time.perf_counter()
data = load()
print(json.dumps({"seconds": time.perf_counter() - start, "mb": peak_mb() - before}))
"""
FEED = """
import json
import tensorflow
from cifar_jax.data.pipeline import train_batches, train_rows
from cifar_jax.data.sources import load
from cifar_jax.data.splits import make_splits
from experiments.benchmarks.interleaved import peak_mb
calls = [(start, 125) for start in range(0, 1125, 125)]
small = make_splits(load("sample"), protocol="notebook", seed=0)["train"]
rows = train_rows(small, [(0, 1)], batch_size=32, seed=0)
for _ in train_batches(small, rows): pass  # TensorFlow's own start
before = peak_mb()
split = make_splits(load(), protocol="notebook", seed=42)["train"]
for _ in train_batches(split, train_rows(split, calls, batch_size=32, seed=0)): pass
print(json.dumps({"mb": peak_mb() - before}))
"""


def run_code(code: str) -> dict[str, float]:
    """Runs Python code that prints JSON, in a process of its own."""
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output)


def seconds_of(*module_and_arguments: str) -> float:
    """Returns the seconds from the start to the end of a command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *module_and_arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def resumed_first_step(finished: Path) -> float:
    """Returns the seconds from the command to the first new row of a copy of `finished`.

    The row is written after the first call of 225 steps.
    """
    with tempfile.TemporaryDirectory() as parent:
        workdir = shutil.copytree(finished, Path(parent) / "run")
        log = workdir / "metrics.jsonl"
        command = ["cifar_jax.main", "--config=configs/mlp.py", f"--workdir={workdir}"]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.DEVNULL)
        try:
            while json.loads(log.read_text().splitlines()[-1])["step"] == STEPS_PER_EPOCH:
                if process.poll() is not None:
                    raise RuntimeError(f"the resumed run ended with {process.returncode}")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()


def measurements(folder: Path) -> dict[str, tuple[float, str, Callable[[], float]]]:
    """Returns {what: (target, unit, measurement)}, after training one epoch in `folder`."""
    from PIL import Image

    workdir, picture = folder / "run", folder / "picture.png"
    seconds_of(
        "cifar_jax.main",
        "--config=configs/mlp.py",
        f"--workdir={workdir}",
        "--config.train_for=1 epoch",
    )
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    Image.fromarray(noise).save(picture)
    predict = ("cifar_jax.predict", f"--workdir={workdir}", str(picture))
    return {
        "data ready from local files": (1.5, "s", lambda: run_code(LOAD)["seconds"]),
        "memory for data, loading": (1.5 * DATA_MB, "MB", lambda: run_code(LOAD)["mb"]),
        "memory for data, feeding an epoch": (1.5 * DATA_MB, "MB", lambda: run_code(FEED)["mb"]),
        "`cifar_jax.main --help`": (1.0, "s", lambda: seconds_of("cifar_jax.main", "--help")),
        "first step of a resumed run": (12.0, "s", lambda: resumed_first_step(workdir)),
        "a prediction": (4.0, "s", lambda: seconds_of(*predict)),
    }


def format_results(results: dict) -> str:
    """Returns the Markdown page."""
    runs = len(next(iter(results["measurements"].values()))["values"])
    rows = [
        [
            what,
            *(f"{value:.2f} {m['unit']}" for value in (np.median(m["values"]), *_range(m))),
            f"{m['target']:.1f} {m['unit']}",
        ]
        for what, m in results["measurements"].items()
    ]
    return "\n".join(
        [
            "# What a user waits for",
            "",
            f"{written_by()}; {runs} runs of each.",
            "",
            interleaved.markdown_table(["", "median", "min", "max", "target: below"], rows),
            "",
            interleaved.format_machine(results["machine"]),
        ]
    )


def _range(measurement: dict) -> tuple[float, float]:
    return min(measurement["values"]), max(measurement["values"])


def main() -> None:
    """Runs the measurements and writes their results."""
    options = make_parser(__doc__, rounds=5).parse_args()
    machine = interleaved.describe_machine(PACKAGES)
    sources.load()  # missing images are told, or fetched, before anything is timed
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for what, (target, unit, measure) in measurements(Path(folder)).items():
            values = [measure() for _ in range(options.rounds + 1)][1:]
            results[what] = {"target": target, "unit": unit, "values": values}
            print(what, [round(value, 2) for value in values], unit)
    results = {"machine": machine, "measurements": results}
    interleaved.write_results(options.results or RESULTS, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
