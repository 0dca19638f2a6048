"""Evaluate a checkpoint on one split, every image counted once; or a file of weights.

    python -m cifar_jax.evaluate --workdir=runs/mlp --split=validation --checkpoint=best
    python -m cifar_jax.evaluate --weights=mine.safetensors

Choose on validation: every reading of the test split is noted in the run's run.json. A file does
not say which images trained it, so it is evaluated on the official test images alone, in
~/.cache/cifar_jax unless --directory names another folder.
"""

import argparse
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from cifar_jax.errors import UserError, exit_on_user_error, set_up_logging, tell
from cifar_jax.memory import set_up_memory

if TYPE_CHECKING:  # they import JAX, for which `--help` does not wait
    from cifar_jax.data.splits import Split
    from cifar_jax.trained import Trained

FILE_BATCH_SIZE = 128  # images; of a run, its own


def evaluate(
    workdir: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    checkpoint: str = "latest",
    weights: str | os.PathLike | None = None,
    directory: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Returns step (of a run), loss, accuracy and count on a split.

    Args:
      workdir: of the run.
      split: "train", "validation" or "test"; None: validation of a run, the test split of a file.
      checkpoint: "latest", or "best" on validation.
      weights: in place of a workdir, a file from `port_weights` or `average`; `split` can only be
        "test" then, and means the official 10,000 images.
      directory: of the images, where it is not the run's own, or the default one for a file.

    Raises:
      UserError: without such a checkpoint or file, or if the images or splits cannot be had.
    """
    from cifar_jax.trained import load_trained, measure

    if weights is not None and split not in (None, "test"):
        raise UserError(
            f"{weights} does not say which images trained it, and only the official test images "
            "are sure to be new to it: --split=test"
        )
    trained = load_trained(workdir, checkpoint, weights=weights)
    if weights is None:
        workdir, split = pathlib.Path(workdir).expanduser(), split or "validation"
        images = _split_of_run(workdir, trained, split, checkpoint, directory)
        batch_size = trained.extra["config"]["eval_batch_size"]
    else:
        images, batch_size = _official_test(directory), FILE_BATCH_SIZE
    totals = measure(trained, images, batch_size=batch_size)
    step = {} if trained.step is None else {"step": trained.step}
    return {**step, **totals.means(), "count": totals.count}


def _split_of_run(
    workdir: pathlib.Path,
    trained: "Trained",
    split: str,
    checkpoint: str,
    directory: str | os.PathLike | None,
) -> "Split":
    """Returns the images of a run's own split; a reading of the test split is noted."""
    from cifar_jax.recording.run_record import count_test_read
    from cifar_jax.setup import check_same_images, load_splits

    data, splits = load_splits(trained.extra["config"], directory)
    check_same_images(data, splits, trained.extra, workdir=str(workdir))
    if split == "test":
        before = count_test_read(workdir, {"step": trained.step, "checkpoint": checkpoint})
        if before:
            tell(f"note: the test split of {workdir} has been read before, {before} time(s)")
    return splits[split]


def _official_test(directory: str | os.PathLike | None) -> "Split":
    from cifar_jax.data.sources import DEFAULT_DIRECTORY, load
    from cifar_jax.data.splits import make_splits

    data = load("auto", directory or DEFAULT_DIRECTORY)
    return make_splits(data, protocol="standard", seed=0)["test"]  # unshuffled


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="folder of the run")
    model.add_argument(
        "--weights", help="or a file that cifar_jax.port_weights or average has written"
    )
    parser.add_argument(
        "--split",
        choices=("train", "validation", "test"),
        help="(default: validation; of a file of weights, test)",
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        choices=("latest", "best"),
        help="which one of the run (default: %(default)s); best is by validation",
    )
    parser.add_argument("--directory", metavar="DIR", help="of the images, where not the run's own")
    options = parser.parse_args()
    with exit_on_user_error():
        set_up_logging()
        set_up_memory()
        print(json.dumps(evaluate(**vars(options))))


if __name__ == "__main__":
    main()
