"""Draws validation accuracy against minutes of training from the runs' metrics: minutes.png.

python -m experiments.time_to_accuracy.draw
"""

import csv
import io
from pathlib import Path

from matplotlib.figure import Figure

from cifar_jax.recording.files import write_atomically

FOLDER = Path(__file__).parent
NOTEBOOK = 0.9366  # its test accuracy
LABELS = {
    "three_epochs": "64, 96, then 128 px (configs/resnet50_cpu.py)",
    "one_cycle": "64, 96, then 128 px; batch norms frozen",
    "thaw": "first 7 of 16 blocks frozen, 96 px; later all but stem and stage 1, 128 px",
    "partial": "128 px; stem and stages 1 and 2 frozen",
    "full": "128 px; everything trained",
    "cached": "128 px; a linear layer on cached features (whole command)",
    "first_cycle": "64, 96, then 128 px; batch norms trained",
}
# By the clock: the pass over all images precedes the first step and is in no metrics (README.md).
MINUTES_BEFORE = {"cached": 8.2}


def read_curve(path: Path, *, minutes_before: float) -> tuple[list[float], list[float]]:
    """Returns minutes and validation accuracies from a run's metrics.csv."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    minutes = [minutes_before + float(row["train_seconds"]) / 60 for row in rows]
    return minutes, [float(row["validation_accuracy"]) for row in rows]


def main() -> None:
    """Draws a line for each run, a point for each evaluation."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label in LABELS.items():
        path = FOLDER / name / "metrics.csv"
        minutes, accuracies = read_curve(path, minutes_before=MINUTES_BEFORE.get(name, 0.0))
        axes.plot(minutes, accuracies, "o-", markersize=4, label=label)
    axes.axhline(NOTEBOOK, color="black", linewidth=0.8, linestyle=":")
    axes.annotate("the notebook's test", (0.5, NOTEBOOK), va="bottom", fontsize="small")
    axes.set(
        xlabel="minutes on two cores (of training, if not said otherwise)",
        ylabel="validation accuracy",
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(FOLDER / "minutes.png", image.getvalue())


if __name__ == "__main__":
    main()
