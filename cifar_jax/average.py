"""Average the weights of several checkpoints, or fit one to images of another size.

    python -m cifar_jax.average runs/a average.safetensors --checkpoint=all
    python -m cifar_jax.average runs/a runs/b soup.safetensors --checkpoint=best
    python -m cifar_jax.average runs/a larger.safetensors --upsampling=5

Checkpoints of one run (config.keep_checkpoints; Izmailov et al., "Averaging Weights Leads to Wider
Optima and Better Generalization", 2018) or of runs that started from the same weights, or one from
the other's (Wortsman et al., "Model soups", 2022); of several sizes, --upsampling chooses one.
Neither an average nor another size fits the statistics that were kept while training: they are
measured anew on training images, without augmentation (norms that were frozen keep theirs). What
comes of it on validation is printed, and the file is for predict and evaluate (--weights).
"""

import argparse
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from cifar_jax.config import check_version, flatten
from cifar_jax.errors import UserError, exit_on_user_error, set_up_logging, tell
from cifar_jax.memory import set_up_memory
from cifar_jax.phases import UPSAMPLINGS

if TYPE_CHECKING:  # they import JAX, for which `--help` does not wait
    from flax import nnx

    from cifar_jax.data.splits import Split
    from cifar_jax.phases import Phase
    from cifar_jax.plan import Plan
    from cifar_jax.pretrained.ours import Header

CHECKPOINTS = ("latest", "best", "all")
IMAGES = 5000
# The fields of config.model that make weights the function that they are.
_FUNCTION = (
    *("name", "variant", "preprocessing", "upsampling", "interpolation", "head"),
    *("batch_norm", "test_time_flip"),
)


def average(
    workdirs: Sequence[str | os.PathLike],
    dest: str | os.PathLike,
    *,
    checkpoint: str = "latest",
    upsampling: int | None = None,
    images: int = IMAGES,
    directory: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Writes averaged weights with their own statistics, and tells how good they are.

    Args:
      workdirs: of runs of one model on the same images and splits.
      dest: a `.safetensors` file to write.
      checkpoint: of each run: "latest", "best" on validation, or "all" that it keeps.
      upsampling: of the images from now on, 1 to 8; None: that of all runs.
      images: training images that the statistics are measured on; whole batches are taken.
      directory: of the images, where it is not the first run's own.

    Returns:
      {"checkpoints": names, "pretrained_sha256": or None, and on validation "loss": nats,
      "accuracy": 0..1, "count": images}.

    Raises:
      UserError: without such checkpoints, for runs that differ in more than their training, for a
        size that the head cannot read, or if the file cannot be written.
    """
    # JAX takes seconds to import: --help and bad flags do not wait for it.
    import jax
    import numpy as np

    from cifar_jax.plan import make_plan
    from cifar_jax.pretrained import ours
    from cifar_jax.setup import check_same_images, load_splits
    from cifar_jax.state import model_leaves, split_model
    from cifar_jax.trained import load_trained, measure

    dest = _check_dest(dest)
    checkpoints, values = _mean_of(_places(workdirs, checkpoint), upsampling)
    header = _header(checkpoints, upsampling, images)
    config = checkpoints[0].extra["config"]
    config = {**config, "model": {**config["model"], "upsampling": header.upsampling}}
    data, splits = load_splits(config, directory)
    for each in checkpoints:
        check_same_images(data, splits, each.extra, workdir=each.name)
    plan = make_plan(config, train_count=len(splits["train"]))
    with jax.default_matmul_precision(config["matmul_precision"]):
        mean = _fill(config, plan.phases[-1], values)
        model = _measured(mean, splits["train"], plan, images)
    if model is mean:
        tell("no batch norm moves its statistics: none are measured")
    else:
        header = dataclasses.replace(header, source=f"{header.source}, with statistics of its own")
    leaves = model_leaves(split_model(model)[1])
    ours.write(dest, {name: np.asarray(leaf) for name, leaf in leaves.items()}, header)
    trained = load_trained(weights=dest)
    totals = measure(trained, splits["validation"], batch_size=plan.eval_batch_size)
    names = [each.name for each in checkpoints]
    made_of = {"checkpoints": names, "pretrained_sha256": _origin(header)}
    return {**made_of, **totals.means(), "count": totals.count}


def _check_dest(dest: str | os.PathLike) -> pathlib.Path:
    """Refuses before anything is measured what could not be written."""
    from cifar_jax.pretrained import ours

    dest = pathlib.Path(dest).expanduser()
    ours.check_dest(dest, to=None)
    return dest


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """What is known of a checkpoint beside its values."""

    name: str
    extra: dict[str, Any]
    header: "Header"


def _places(
    workdirs: Sequence[str | os.PathLike], checkpoint: str
) -> Iterator[tuple[pathlib.Path, int]]:
    """Yields workdir and step of each checkpoint."""
    from cifar_jax.checkpoint import HEAD_FOLDER, find_steps

    folders = [pathlib.Path(each).expanduser().resolve() for each in workdirs]
    for workdir in folders:
        if folders.count(workdir) > 1:
            raise UserError(f"{workdir} is named {folders.count(workdir)} times")
        if (workdir / HEAD_FOLDER).is_dir():
            raise UserError(
                f"{workdir} holds a head on frozen features, whose statistics are to stay as they "
                "are; expected a run of cifar_jax.main"
            )
        yield from ((workdir, step) for step in find_steps(workdir, checkpoint))


def _mean_of(
    places: Iterable[tuple[pathlib.Path, int]], upsampling: int | None
) -> tuple[list[_Checkpoint], dict[str, Any]]:
    """Returns the checkpoints, and the mean of their values by the model's names."""
    import numpy as np

    from cifar_jax.run_weights import read_step

    found, sums = [], {}
    for workdir, step in places:
        read = read_step(workdir, step)
        found.append(_Checkpoint(f"{workdir}, step {step}", read.extra, read.weights.header))
        check_version(read.extra["config"], workdir=str(workdir))
        _check_alike(found[0], found[-1], upsampling)
        for name, array in read.weights.values.items():
            sums[name] = sums.get(name, 0.0) + array.astype(np.float64)
    return found, {name: (x / len(found)).astype(np.float32) for name, x in sums.items()}


def _fill(config: dict[str, Any], phase: "Phase", values: dict[str, Any]) -> "nnx.Module":
    """Returns the model of the last phase, in which what was frozen stays so, with these values."""
    from flax import nnx

    from cifar_jax.models.registry import create_model
    from cifar_jax.state import MODEL_PARTS, fill, split_model
    from cifar_jax.structures import make_structures

    def create(model):
        return create_model(model, seed=0)

    graphdef = make_structures(create, config, (phase,))[phase]
    template = split_model(nnx.eval_shape(lambda: create(config["model"])))[1]
    parts = fill(template, values)
    return nnx.merge(graphdef, *(parts[part] for part in MODEL_PARTS))


def _measured(model: "nnx.Module", train: "Split", plan: "Plan", count: int) -> "nnx.Module":
    """Returns `with_statistics_of` the model and `count` images, in an epoch's first batches."""
    from cifar_jax.data.pipeline import call_rows
    from cifar_jax.recording.progress import Counter
    from cifar_jax.statistics import with_statistics_of

    steps = min(plan.steps_per_epoch, max(1, count // plan.batch_size))
    rows = call_rows(train, 0, steps, batch_size=plan.batch_size, seed=plan.seed)

    def batches():
        with closing(Counter("statistics", total=rows.size, start=0)) as counter:
            for each in rows:
                yield train.images[each]
                counter.update(len(each))

    return with_statistics_of(model, batches())


def _check_alike(first: _Checkpoint, other: _Checkpoint, upsampling: int | None) -> None:
    """Refuses the mean of two models that are not one function, or have no common start."""
    ours, theirs = (dict(flatten(each.extra["config"])) for each in (first, other))
    keys = [f"model.{name}" for name in _FUNCTION] + ["freeze.layers", "freeze.batch_norm"]
    origins = [_origin(each.header) for each in (first, other)]
    if None in origins or first.header.head == "flatten":
        keys.append("seed")  # which drew what no file gave
    reads_any_size = first.header.head == "pooled"
    if upsampling is not None and reads_any_size:
        keys.remove("model.upsampling")  # what comes of them has the one that was asked for
    pairs = [(f"config.{key}", ours[key], theirs[key]) for key in keys]
    for key, expected, found in [("the file it started from", *origins), *pairs]:
        if found != expected:
            is_size = key == "config.model.upsampling" and reads_any_size
            way_out = (
                "choose one for their mean with --upsampling"
                if is_size
                else "two such models cannot be averaged"
            )
            raise UserError(
                f"{other.name}: {key} is {found!r}, of {first.name} {expected!r}; {way_out}"
            )


def _origin(header: "Header") -> str | None:
    """Returns the SHA-256 of the file that a chain of runs began with; None: of no file."""
    initial = header.initial or {}
    while initial.get("initial"):
        initial = initial["initial"]
    return initial.get("sha256")


def _header(checkpoints: list[_Checkpoint], upsampling: int | None, images: int) -> "Header":
    """Returns the header of what is written, for the size that is asked for."""
    header = checkpoints[0].header
    upsampling = upsampling or header.upsampling
    if upsampling != header.upsampling and header.head != "pooled":
        raise UserError(
            f"--upsampling {upsampling}: {checkpoints[0].name} has a {header.head} head, which "
            f"reads images of upsampling {header.upsampling} alone; a pooled one reads any"
        )
    sources = "; ".join(each.header.source for each in checkpoints)
    mean = "mean of " if len(checkpoints) > 1 else ""
    made_of = [*(each.header.sha256 for each in checkpoints), upsampling, images]
    return dataclasses.replace(
        header,
        source=f"{mean}{sources}",
        sha256=hashlib.sha256(json.dumps(made_of).encode()).hexdigest(),
        upsampling=upsampling,
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.average",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="folder of a run")
    parser.add_argument("dest", help="the .safetensors file to write")
    parser.add_argument(
        "--checkpoint",
        default="latest",
        choices=CHECKPOINTS,
        help="of each run (default: %(default)s); best is by validation, all are those it keeps",
    )
    parser.add_argument(
        "--upsampling", type=int, choices=UPSAMPLINGS, help="of images, where not the run's own"
    )
    parser.add_argument(
        "--images",
        type=_count,
        default=IMAGES,
        help="training images that the statistics are measured on (default: %(default)s)",
    )
    parser.add_argument(
        "--directory", metavar="DIR", help="of the images, where not the first run's own"
    )
    options = parser.parse_intermixed_args()
    with exit_on_user_error():
        set_up_logging()
        set_up_memory()
        print(json.dumps(average(**vars(options))))


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of images")
    return int(text)


if __name__ == "__main__":
    main()
