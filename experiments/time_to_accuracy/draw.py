"""Draws validation accuracy against minutes of training from the runs' metrics: minutes.png.

python -m experiments.time_to_accuracy.draw
"""

import csv
import json
from datetime import datetime
from pathlib import Path

from matplotlib.figure import Figure

from cifar_jax.recording.figures import save

FOLDER = Path(__file__).parent
NOTEBOOK = 0.9366  # its test accuracy
LABELS = {
    "three_epochs": "64, 96, then 128 px (configs/resnet50_cpu.py)",
    "one_cycle": "64, 96, then 128 px; batch norms frozen",
    "thaw": "as partial, at 96 px; later all but stem and stage 1, 128 px",
    "partial": "128 px; stem and stages 1 and 2 frozen",
    "full": "128 px; all but the norms trained",
    "cached": "128 px; a linear layer on cached features, by the clock",
    "first_cycle": "64, 96, then 128 px; batch norms trained",
}
BY_THE_CLOCK = {"cached"}  # its pass over all images precedes the first step and is in no metrics


def read_curve(run: Path) -> tuple[list[float], list[float]]:
    """Returns minutes and validation accuracies from a run's metrics.csv."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seconds = [float(row["train_seconds"]) for row in rows]
    before = _whole_seconds(run) - seconds[-1] if run.name in BY_THE_CLOCK else 0.0
    accuracies = [float(row["validation_accuracy"]) for row in rows]
    minutes = [(before + each) / 60 for each in seconds]
    # Such a head's evaluations are seconds apart: the last one stands for all.
    return (minutes[-1:], accuracies[-1:]) if run.name in BY_THE_CLOCK else (minutes, accuracies)


def _whole_seconds(run: Path) -> float:
    """Returns how long the command of a run took, from its run.json."""
    start = json.loads((run / "run.json").read_text())["starts"][0]  # a later one read the test
    began, ended = (datetime.fromisoformat(start[name]) for name in ("started", "ended"))
    return (ended - began).total_seconds()


def main() -> None:
    """Draws a line for each run, a point for each evaluation."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in LABELS.items():
        minutes, accuracies = read_curve(FOLDER / name)
        axes.plot(minutes, accuracies, "o-", markersize=4, label=f"{name}: {label}")
    axes.axhline(NOTEBOOK, color="black", linewidth=0.8, linestyle=":")
    text = f"{NOTEBOOK}, the notebook's test accuracy"
    axes.annotate(text, (0.5, NOTEBOOK), va="bottom", fontsize="small")
    axes.set(
        xlabel="minutes on two cores (of training, if not said otherwise)",
        ylabel="validation accuracy",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    save(figure, FOLDER / "minutes.png")


if __name__ == "__main__":
    main()
