"""Figures of runs, drawn without a display."""

import io
import math
import os
from typing import TYPE_CHECKING

from cifar_jax.recording.files import write_atomically
from cifar_jax.recording.metrics_log import evaluation_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (("accuracy", "accuracy"), ("loss", "loss (cross-entropy)"))
TRAIN_COLOUR = "tab:blue"
VALIDATION_COLOUR = "tab:orange"
X_AXES = {"epochs": lambda row: row["epoch"], "minutes": lambda row: row["train_seconds"] / 60}
LINE_STYLES = ("-", "--", ":", "-.")


def draw_curves(rows: list[dict], path: str | os.PathLike, title: str) -> None:
    """Draws accuracy and loss by epoch, on the training and on the validation images.

    Args:
        rows: a run's metrics (`recording.metrics_log`); those of evaluations are drawn.
        path: the PNG to write.
        title: stands above the panels.

    Raises:
        RunError: the file cannot be written.
    """
    rows = evaluation_rows(rows)
    figure = _new_figure(title)
    for axes, (metric, _) in zip(figure.axes, PANELS, strict=True):
        _plot(axes, rows, f"train_{metric}", label="train", color=TRAIN_COLOUR)
        _plot(axes, rows, f"validation_{metric}", label="validation", color=VALIDATION_COLOUR)
    for axes in figure.axes:
        axes.legend()
    save(figure, path)


def draw_comparison(
    runs: dict[str, list[dict]], path: str | os.PathLike, *, by: str = "epochs"
) -> None:
    """Draws the validation curves of several runs over each other.

    Args:
        runs: name of each run and its metrics.
        path: the PNG to write.
        by: "epochs", or the "minutes" of training up to there.

    Raises:
        RunError: the file cannot be written.
    """
    figure = _new_figure("Validation, by run")
    for axes in figure.axes:
        axes.set_xlabel({"epochs": "epoch", "minutes": "minutes of training"}[by])
    for axes, (metric, _) in zip(figure.axes, PANELS, strict=True):
        for number, rows in enumerate(runs.values()):
            style = {"color": f"C{number % 10}", "linestyle": LINE_STYLES[number // 10 % 4]}
            _plot(axes, evaluation_rows(rows), f"validation_{metric}", by=by, **style)
    # One legend below the panels, a line for each run: names are long, and may be many.
    figure.set_figheight(figure.get_figheight() + 0.22 * len(runs))
    legend = figure.legend(figure.axes[0].lines, list(runs), loc="outside lower left")
    for text in legend.get_texts():
        text.set_parse_math(False)  # as for a title
    save(figure, path)


def _new_figure(title: str) -> "Figure":
    """A figure with one panel a metric over the epochs."""
    # Here, because it takes half a second that other commands need not pay; and without pyplot,
    # which would look for a display and keep every figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title, parse_math=False)  # names may hold a dollar sign
    for axes, (_, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    return figure


def _plot(axes, rows: list[dict], metric: str, *, by: str = "epochs", **style) -> None:
    place = X_AXES[by]
    points = [(place(row), row[metric]) for row in rows if math.isfinite(row.get(metric, math.nan))]
    # Markers show a single epoch; with many epochs they would hide the line.
    marker = "o" if len(points) <= 30 else None
    axes.plot(
        *zip(*points, strict=True) if points else ([], []), marker=marker, markersize=4, **style
    )


def save(figure: "Figure", path: str | os.PathLike) -> None:
    """Writes a figure as PNG, 120 dots an inch, whole or not at all."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())
