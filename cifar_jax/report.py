"""Compares runs: `python -m cifar_jax.report RUN... [--figure=PNG] [--by=minutes]`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from cifar_jax.errors import UserError, exit_on_user_error, tell
from cifar_jax.recording.figures import X_AXES, draw_comparison
from cifar_jax.recording.metrics_log import evaluation_rows, read_rows
from cifar_jax.recording.run_record import RECORD_NAME, field, read_run_record

SPLITS = ("train", "validation", "test")
# Accuracies that the original notebook prints; what it does not state is missing.
NOTEBOOK = {
    "mlp": {"train": 0.3748, "validation": 0.3550},
    "resnet50": {"validation": 0.9405, "test": 0.9366},
}
# What the table needs of a `run.json`, whoever wrote it.
FIELDS = {
    "config.model.name": str,
    "data.source": str,
    "data.is_sample": bool,
    "parameters": int,
    "total_steps": int,
}
COLUMNS = ("run", "model", "data", "epochs", *SPLITS, "seconds", "parameters")


def accuracies(record: dict, rows: list[dict]) -> dict[str, float]:
    """The accuracies of a run: of the step that was tested, or of its last evaluation.

    Args:
        record: its `run.json`.
        rows: its metrics.

    Returns:
        Accuracy (0..1) by split; a split that was not evaluated is missing.
    """
    row = _reported_row(record, rows)
    found = {
        "train": row.get("train_accuracy"),
        "validation": row.get("validation_accuracy"),
        "test": field(record, "result.test_accuracy"),
    }
    return {split: accuracy for split, accuracy in found.items() if accuracy is not None}


def notebook_table(record: dict, rows: list[dict]) -> str:
    """Sets a run's accuracies beside the notebook's.

    Args:
        record: the run's `run.json`.
        rows: its metrics.

    Returns:
        Plain text of several lines, for a terminal.
    """
    model = record["config"]["model"]["name"]
    sizes = record["splits"]["sizes"]
    table = [
        ["accuracy", *SPLITS],
        ["images", *(f"{sizes[split]:,}" if sizes.get(split) else "none" for split in SPLITS)],
        ["this run", *_cells(accuracies(record, rows), missing="not read")],
    ]
    if model in NOTEBOOK:
        table.append(["notebook", *_cells(NOTEBOOK[model], missing="not stated")])
    lines = [f"{first:<10}" + "".join(f"{cell:>12}" for cell in cells) for first, *cells in table]
    lines.append(f"model {model}, data: {record['data']['source']}")
    if record["data"]["is_sample"]:
        lines.append("The data is a small SAMPLE: these figures say nothing about CIFAR-10.")
    return "\n".join(lines)


def markdown_table(runs: dict[str, tuple[dict, list[dict]]]) -> str:
    """One line for each run.

    Args:
        runs: by name, each run's `run.json` and metrics.

    Returns:
        A Markdown table.
    """
    numeric = COLUMNS.index("epochs")
    lines = [COLUMNS, ["---" if i < numeric else "---:" for i in range(len(COLUMNS))]]
    lines += [_run_cells(name, record, rows) for name, (record, rows) in runs.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _run_cells(name: str, record: dict, rows: list[dict]) -> list[str]:
    data = record["data"]
    row = _reported_row(record, rows)
    epoch, seconds = row.get("epoch"), row.get("train_seconds")
    is_finished = seconds is not None and rows[-1]["step"] >= record["total_steps"]
    cells = [
        name,
        record["config"]["model"]["name"],
        data["source"] + (" (SAMPLE)" if data["is_sample"] else ""),
        "-" if epoch is None else f"{epoch:g}",
        *_cells(accuracies(record, rows), missing="-"),
        f"{seconds:.1f}" if is_finished else "unfinished",
        f"{record['parameters']:,}",
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def _reported_row(record: dict, rows: list[dict]) -> dict:
    evaluations = evaluation_rows(rows)
    step = field(record, "result.step")
    if step is not None:  # a damaged file may have lost the row: another's would not belong to it
        evaluations = [row for row in evaluations if row["step"] == step]
    return evaluations[-1] if evaluations else {}


def _cells(values: dict[str, float], *, missing: str) -> list[str]:
    return [f"{values[split]:.4f}" if split in values else missing for split in SPLITS]


def _names(workdirs: Sequence[str]) -> list[str]:
    """The folders' names, or the paths as they were given where two have the same name."""
    # Unlike Path.resolve, it takes a loop of links as it is: reading the run tells of that.
    folders = [Path(os.path.realpath(Path(workdir).expanduser())) for workdir in workdirs]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise UserError(f"{workdirs[number]}: given twice; name each run once")
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else list(workdirs)


def _without_others(paths: Sequence[str]) -> list[str]:
    """Leaves out, and tells, what of `runs/*` is no run, such as a sweep's own table."""
    if len(paths) == 1:
        return list(paths)
    workdirs = []
    for each in paths:
        path = Path(each).expanduser()
        if path.is_file():
            tell(f"note: {each} is a file, not the --workdir of a run; left out")
        elif path.is_dir() and not (path / RECORD_NAME).exists():
            tell(f"note: {each} has no {RECORD_NAME}, which every run has; left out")
        else:
            workdirs.append(each)
    return workdirs


def _read_run(workdir: str) -> tuple[dict, list[dict]]:
    workdir = Path(workdir).expanduser()
    record = read_run_record(workdir)
    bad = [name for name, kind in FIELDS.items() if not isinstance(field(record, name), kind)]
    if bad:
        raise UserError(
            f"{workdir / RECORD_NAME}: has no valid {', '.join(bad)}; "
            "did the run end before its first step?"
        )
    return record, read_rows(workdir)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.report", description="Prints a Markdown table of runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --workdir of a run")
    parser.add_argument("--figure", metavar="PNG", help="draw the validation curves there")
    parser.add_argument("--by", choices=tuple(X_AXES), default="epochs", help="of the figure")
    options = parser.parse_args(arguments)
    with exit_on_user_error():
        figure = options.figure and Path(options.figure).expanduser()
        if figure and figure.suffix.lower() != ".png":
            raise UserError(f"--figure={options.figure}: expected a name that ends in .png")
        if figure and not figure.parent.is_dir():
            raise UserError(f"--figure={options.figure}: there is no folder {figure.parent}")
        if figure and figure.is_dir():
            raise UserError(f"--figure={options.figure}: is a folder; name a file to write")
        workdirs = _without_others(options.runs)
        runs = {
            name: _read_run(workdir)
            for name, workdir in zip(_names(workdirs), workdirs, strict=True)
        }
        if not runs:
            raise UserError("no run is left; give the --workdir of one")
        for name, (_, rows) in runs.items():
            if figure and not evaluation_rows(rows):
                raise UserError(f"{name}: no evaluation in its metrics; leave it out of --figure")
            timed = all("train_seconds" in row for row in evaluation_rows(rows))
            if figure and options.by == "minutes" and not timed:
                raise UserError(f"{name}: its metrics have no train_seconds; use --by=epochs")
        print(markdown_table(runs))
        if figure:
            curves = {name: rows for name, (_, rows) in runs.items()}
            draw_comparison(curves, figure, by=options.by)


if __name__ == "__main__":
    main()
