"""How many images a second one core of a host feeds.

    python -m experiments.tpu.feed

Draws whole epochs from the training pipeline, over random images in CIFAR-10's shape and on one
core, and trains nothing. Written to results/feed.md and .json.
"""

import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.data.pipeline import train_batches, train_rows
from cifar_jax.data.splits import Split
from cifar_jax.errors import exit_on_user_error
from experiments.benchmarks.command import make_parser, written_by
from experiments.benchmarks.interleaved import (
    describe_machine,
    format_machine,
    markdown_table,
    write_results,
)

IMAGES = 50_000
CALLS = ((32, 1), (32, 225), (256, 1), (1024, 1))  # images a step, steps a call
RATES = ("median", "min", "max")
RESULTS = Path(__file__).parent / "results" / "feed"


def epoch_rate(split: Split, batch_size: int, steps: int) -> float:
    """Returns images a second over one epoch, the start of the pipeline aside."""
    starts = range(0, len(split) // batch_size - steps + 1, steps)
    rows = train_rows(split, [(s, steps) for s in starts], batch_size=batch_size, seed=0)
    batches = train_batches(split, rows)
    next(batches)
    start = time.perf_counter()
    drawn = sum(batch["label"].size for batch in batches)
    return drawn / (time.perf_counter() - start)


def format_results(results: dict[str, Any]) -> str:
    """Returns the Markdown page."""
    rows = [
        [f"{each['batch_size']} x {each['steps']}", *(f"{each[k]:,.0f}" for k in RATES)]
        for each in results["calls"]
    ]
    return "\n".join(
        [
            "# What one core feeds",
            "",
            f"{written_by()}; {results['rounds']} epochs of {IMAGES:,} images.",
            "",
            markdown_table(["images x steps a call", "images/s, median", "least", "most"], rows),
            "",
            format_machine(results["machine"]),
        ]
    )


def main() -> None:
    """Measures and writes."""
    options = make_parser(__doc__).parse_args()
    machine = describe_machine(("tensorflow-cpu", "numpy"))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before TensorFlow counts its threads
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    split = Split("train", images, np.zeros(IMAGES, np.int32), np.arange(IMAGES))
    rates = {call: [] for call in CALLS}
    for _ in range(options.rounds):
        for call, taken in rates.items():
            taken.append(epoch_rate(split, *call))
    calls = [
        {
            "batch_size": batch_size,
            "steps": steps,
            "rates": taken,
            "median": statistics.median(taken),
            "min": min(taken),
            "max": max(taken),
        }
        for (batch_size, steps), taken in rates.items()
    ]
    results = {"machine": machine, "rounds": options.rounds, "calls": calls}
    write_results(options.results or RESULTS, results, text=format_results(results))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
