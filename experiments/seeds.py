"""Means over the seeds of a sweep whose runs are called NAME-SEED: a Markdown table.

    python -m experiments.seeds runs/finetuned

Reads what is there of each run: metrics.csv, and run.json, which has the accuracy on the test split
where the run has read it.
"""

import argparse
import csv
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cifar_jax.errors import UserError, exit_on_user_error
from cifar_jax.recording.run_record import field, record_so_far


def read_sweep(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Returns by name a dictionary for each seed, in their order.

    Each has "validation" and, where it was read, "test" (0..1), and "minutes" of training.

    Raises:
      UserError: where the seeds of a name have come to different steps: one is unfinished.
    """
    runs: dict[tuple[str, int], dict[str, float]] = {}
    for path in folder.glob("*-*/metrics.csv"):
        if not (parts := re.fullmatch(r"(.+)-(\d+)", path.parent.name)):
            continue
        name, seed = parts.groups()
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            continue
        runs[name, int(seed)] = {
            "step": int(rows[-1]["step"]),
            "validation": float(rows[-1]["validation_accuracy"]),
            "minutes": float(rows[-1]["train_seconds"]) / 60,
        }
        test = field(record_so_far(path.parent), "result.test_accuracy")
        if test is not None:
            runs[name, int(seed)]["test"] = test
    found: dict[str, list[dict[str, float]]] = {}
    for (name, _), run in sorted(runs.items()):
        found.setdefault(name, []).append(run)
    for name, of_name in found.items():
        steps = {int(run["step"]) for run in of_name}
        if len(steps) > 1:
            raise UserError(
                f"{folder}: the seeds of {name} end at steps {sorted(steps)}; "
                "expected one step: finish them all, or take the folder away"
            )
    return found


def mean_and_each(values: Iterable[float]) -> str:
    """Returns "0.8500 (0.8400, 0.8600)"."""
    values = list(values)
    return f"{np.mean(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})"


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    """Returns the Markdown table of a sweep, the best on validation first."""
    tested = bool(runs) and all("test" in run for of_name in runs.values() for run in of_name)
    keys = ("validation", "test") if tested else ("validation",)
    lines = [
        " | ".join(["| run", *(f"{key}, mean (each seed)" for key in keys), "minutes a run |"]),
        "| --- |" + " ---: |" * (len(keys) + 1),
    ]
    ranked = sorted(runs.items(), key=lambda item: -np.mean([run["validation"] for run in item[1]]))
    for name, of_name in ranked:
        cells = [mean_and_each(run[key] for run in of_name) for key in keys]
        cells.append(f"{np.mean([run['minutes'] for run in of_name]):.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table of the folder that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the sweep's workdir")
    folder = parser.parse_args().folder
    runs = read_sweep(folder)
    if not runs:
        parser.error(f"{folder}: no NAME-SEED/metrics.csv with an evaluation in it")
    print(table(runs))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
