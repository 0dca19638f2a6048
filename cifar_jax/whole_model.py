"""The whole model of a run whose head alone was trained: that head behind its frozen backbone."""

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from cifar_jax.checkpoint import FOLDER as CHECKPOINTS
from cifar_jax.checkpoint import (
    HEAD_FOLDER,
    Arrays,
    Checkpointer,
    Damaged,
    find_step,
    read_accuracy,
    read_checkpoint,
)
from cifar_jax.errors import RunError, UserError, tell
from cifar_jax.state import named_leaves, trained_arrays


def write_whole_model(
    workdir: pathlib.Path, backbone: Mapping[str, np.ndarray], template: Mapping[str, Any]
) -> None:
    """Puts the latest and the best head behind the backbone, as checkpoints of the whole model.

    Args:
      workdir: of the run.
      backbone: the arrays of the frozen part, by their names in it.
      template: shapes of the whole model's arrays, by part.

    Raises:
      Damaged: where the latest head is; a damaged best one is left out, aloud.
      RunError: where a file cannot be read or written.
    """
    steps = steps_of_heads(workdir)
    if all(is_written(workdir, step) for step in steps):
        return
    models = []
    for step in steps:
        try:
            models.append((step, *_whole_model(workdir, step, backbone, template)))
        except Damaged as error:
            if step == steps[-1]:
                raise
            tell(f"warning: {error.what}; the whole model is written without it")
    # All of it, because steps can only be added in order; the heads are kept.
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)
    checkpointer = Checkpointer(workdir, keep=len(models))
    for step, arrays, extra, accuracy in models:
        checkpointer.save(step, arrays, extra, accuracy=accuracy)
    checkpointer.wait()
    checkpointer.close()


def _whole_model(
    workdir: pathlib.Path,
    step: int,
    backbone: Mapping[str, np.ndarray],
    template: Mapping[str, Any],
) -> tuple[Arrays, dict[str, Any], float | None]:
    """Returns arrays, extra and accuracy of a step's whole model.

    Where its head is damaged, they are those of the model that was made of it before.
    """
    accuracy = read_accuracy(workdir / HEAD_FOLDER, step)
    try:
        arrays, extra = read_checkpoint(workdir / HEAD_FOLDER, step)
    except Damaged:
        if not (workdir / CHECKPOINTS / str(step)).is_dir():
            raise
        return *read_checkpoint(workdir, step), accuracy
    head = trained_arrays(arrays)
    names = named_leaves(template)
    whole = {n: head[n] if n in head else backbone[n.partition(".")[2]] for n in names}
    return whole, extra, accuracy


def steps_of_heads(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the best and the latest head, in order; none where there is no head."""
    steps = set()
    for which in ("best", "latest"):
        try:
            steps.add(find_step(workdir / HEAD_FOLDER, which))
        except RunError:
            raise
        except UserError:  # there is none, or a damaged file of accuracies costs the best
            continue
    return sorted(steps)


def is_whole(workdir: pathlib.Path, step: int) -> bool:
    """Tells whether a checkpoint is what was saved."""
    try:
        read_checkpoint(workdir, step)
    except Damaged:
        return False
    return True


def is_written(workdir: pathlib.Path, step: int) -> bool:
    """Tells whether the whole model of a step is there, with the head and accuracy of that step."""
    head = workdir / HEAD_FOLDER
    if not (workdir / CHECKPOINTS / str(step)).is_dir():
        return False
    try:
        whole, accuracy = read_checkpoint(workdir, step)[0], read_accuracy(workdir, step)
    except Damaged:
        return False
    try:
        arrays, _ = read_checkpoint(head, step)
    except Damaged:
        return True  # nothing to compare it with, or to make it of
    if accuracy not in (None, read_accuracy(head, step)):
        return False
    return all(np.array_equal(whole[name], x) for name, x in trained_arrays(arrays).items())
