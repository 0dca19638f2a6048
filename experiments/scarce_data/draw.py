"""Draws accuracy against images a class from results/: scarce_data.png.

python -m experiments.scarce_data.draw
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cifar_jax.recording.figures import save
from experiments.seeds import read_sweep

FOLDER = Path(__file__).parent
LABELS = {
    "finetuned_frozen_norms": "ResNet-50, pretrained, all of it trained but the batch norms",
    "finetuned": "ResNet-50, pretrained, all of it trained",
    "frozen": "a linear layer on its frozen features",
    "random": "ResNet-50 from random weights",
    "mlp": "the MLP",
}


def main() -> None:
    """Draws a line through the means of the seeds, and a point for each seed."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, label) in enumerate(LABELS.items()):
        runs = read_sweep(FOLDER / "results" / name)
        by_images = {int(key.rpartition("_")[2]): of_key for key, of_key in runs.items()}
        images = sorted(by_images)
        accuracies = [[run["validation"] for run in by_images[count]] for count in images]
        axes.plot(images, list(map(np.mean, accuracies)), label=label, color=f"C{number}")
        for count, of_seeds in zip(images, accuracies, strict=True):
            axes.plot([count] * len(of_seeds), of_seeds, "o", markersize=4, color=f"C{number}")
    axes.set(xscale="log", xlabel="training images of each class", ylabel="validation accuracy")
    axes.set_xticks(images, labels=[f"{count:,}" for count in images], minor=False)
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    save(figure, FOLDER / "scarce_data.png")


if __name__ == "__main__":
    main()
