"""What a workdir may hold before a run starts in it: that run, or nothing under its names."""

import pathlib
from collections.abc import Mapping
from typing import Any

from cifar_jax import config as configuration
from cifar_jax.checkpoint import FOLDER, has_checkpoints
from cifar_jax.errors import UserError
from cifar_jax.recording.metrics_log import CSV_NAME, JSONL_NAME, TENSORBOARD_NAME, read_rows
from cifar_jax.recording.recorder import CURVES
from cifar_jax.recording.run_record import RECORD_NAME, record_so_far

FILES = (RECORD_NAME, JSONL_NAME, CSV_NAME, CURVES)
FOLDERS = (FOLDER, TENSORBOARD_NAME)


def check_workdir(
    workdir: pathlib.Path,
    config: Mapping[str, Any],
    *,
    features: Mapping[str, Any] | None,
    checkpoints: str,
) -> dict[str, Any]:
    """Refuses a workdir that this run may not write to; nothing is written.

    What the checkpoints hold is for their reader to check; here, what there is without any.

    Args:
      workdir: of the run.
      config: of the run, as `config.to_dict` gives it.
      features: what the cached features depend on that it reads; None: it reads images.
      checkpoints: where in the workdir its checkpoints are.

    Returns:
      The run's record so far; empty for a new run.

    Raises:
      UserError: the workdir is of another run, of a finished one whose checkpoints are gone, or
        holds something else under the names that a run writes; or a file of it is damaged.
    """
    record = record_so_far(workdir)
    _check_kinds(workdir, checkpoints)
    read_rows(workdir)  # a damaged line is told before anything is written
    if "config" in record:
        _check_features(workdir, features, record.get("features"))
    if not has_checkpoints(workdir / checkpoints):
        _check_without_checkpoints(workdir, record, config)
    return record


def _check_kinds(workdir: pathlib.Path, checkpoints: str) -> None:
    wrong = [(name, "a folder", "file") for name in FILES if (workdir / name).is_dir()]
    for name in (*FOLDERS, checkpoints):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            wrong.append((name, "no folder", "folder"))
    for name, found, expected in wrong:
        raise UserError(
            f"{workdir / name} is {found}; a run writes a {expected} of that name: "
            "use another --workdir"
        )


def _check_without_checkpoints(
    workdir: pathlib.Path, record: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    if record.get("result"):
        raise UserError(
            f"{workdir} holds a finished run whose checkpoints are gone; "
            "use another --workdir, or delete it"
        )
    if record.get("config"):  # killed before its first checkpoint
        configuration.check_same_run(config, record["config"], workdir=str(workdir))
        return
    # A run's record is written before all else, but for its folder of checkpoints, still empty.
    foreign = [name for name in FILES if (workdir / name).exists()]
    foreign += [n for n in FOLDERS if (workdir / n).is_dir() and any((workdir / n).iterdir())]
    if foreign:
        raise UserError(
            f"{workdir} holds {', '.join(foreign)}, but not the {RECORD_NAME} of a run; "
            "use another --workdir"
        )


def _check_features(
    workdir: pathlib.Path, ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None
) -> None:
    if (ours is None) != (theirs is None):
        made_by = "cifar_jax.features, of a head alone" if theirs else "cifar_jax.main"
        raise UserError(f"{workdir} holds a run of {made_by}; use another --workdir")
    ours = dict(configuration.flatten(ours or {}))
    theirs = dict(configuration.flatten(theirs or {}))
    differing = [
        f"{name} was {theirs.get(name)} and is {ours.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise UserError(
            f"{workdir} holds a head on other features: {'; '.join(differing)}; "
            "use another --workdir"
        )
