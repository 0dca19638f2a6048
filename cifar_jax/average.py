"""Average the weights of several checkpoints, or fit one to images of another size.

    python -m cifar_jax.average runs/a average.safetensors --checkpoint=all
    python -m cifar_jax.average runs/a runs/b soup.safetensors --checkpoint=best
    python -m cifar_jax.average runs/a larger.safetensors --upsampling=5

Checkpoints of one run (config.keep_checkpoints; Izmailov et al., "Averaging Weights Leads to Wider
Optima and Better Generalization", 2018) or of runs that started from the same weights (Wortsman et
al., "Model soups", 2022). Neither an average nor another size fits the statistics that were kept
while training: they are measured anew on training images, without augmentation. What comes of it on
validation is printed, and the file is for predict and evaluate (--weights).
"""

import argparse
import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cifar_jax.errors import UserError, exit_on_user_error
from cifar_jax.memory import keep_freed_memory

if TYPE_CHECKING:  # they import JAX, for which `--help` does not wait
    from flax import nnx

    from cifar_jax.phases import Phase
    from cifar_jax.pretrained.ours import Header
    from cifar_jax.run_weights import RunWeights

CHECKPOINTS = ("latest", "best", "all")
IMAGES = 5000


def average(
    workdirs: Sequence[str | os.PathLike],
    dest: str | os.PathLike,
    *,
    checkpoint: str = "latest",
    upsampling: int | None = None,
    images: int = IMAGES,
) -> dict[str, Any]:
    """Writes averaged weights with their own statistics, and tells how good they are.

    Args:
      workdirs: of runs of one model on the same images and splits.
      dest: a `.safetensors` file to write.
      checkpoint: of each run: "latest", "best" on validation, or "all" that it keeps.
      upsampling: of the images from now on; None: the runs' own.
      images: training images that the statistics are measured on; whole batches are taken.

    Returns:
      {"checkpoints": names, "loss": nats, "accuracy": 0..1, "count": validation images}.

    Raises:
      UserError: without such checkpoints, for runs that differ in more than their training, for a
        size that the head cannot read, or if the file cannot be written.
    """
    # JAX takes seconds to import: --help and bad flags do not wait for it.
    import jax
    import numpy as np

    from cifar_jax.data.pipeline import call_rows
    from cifar_jax.evaluate import measure
    from cifar_jax.plan import make_plan
    from cifar_jax.pretrained import ours, port
    from cifar_jax.setup import check_same_images, load_splits
    from cifar_jax.state import model_leaves, split_model
    from cifar_jax.statistics import with_statistics_of
    from cifar_jax.trained import Trained

    port.check_ending(dest, to=None)
    first, values, names = _mean_of([pathlib.Path(each) for each in workdirs], checkpoint)
    header = _header(first, names, upsampling)
    config = first.extra["config"]
    config = {**config, "model": {**config["model"], "upsampling": header.upsampling}}
    data, splits = load_splits(config)
    check_same_images(data, splits, first.extra, workdir=str(workdirs[0]))
    train = splits["train"]
    plan = make_plan(config, train_count=len(train))
    steps = min(plan.steps_per_epoch, max(1, images // plan.batch_size))
    rows = call_rows(train, 0, steps, batch_size=plan.batch_size, seed=plan.seed)
    with jax.default_matmul_precision(config["matmul_precision"]):
        model = with_statistics_of(
            _fill(config, plan.phases[-1], values), (train.images[each] for each in rows)
        )
    trained = Trained(model, first.extra, step=None)
    totals = measure(trained, splits["validation"], batch_size=plan.eval_batch_size)
    leaves = model_leaves(split_model(model)[1])
    ours.write(dest, {name: np.asarray(leaf) for name, leaf in leaves.items()}, header)
    return {"checkpoints": names, **totals.means(), "count": totals.count}


def _mean_of(
    workdirs: list[pathlib.Path], checkpoint: str
) -> tuple["RunWeights", dict[str, Any], list[str]]:
    """Returns the first checkpoint, the mean of all by the model's names, and their names."""
    import numpy as np

    from cifar_jax.checkpoint import find_steps
    from cifar_jax.recording.run_record import has_run_record, read_run_record
    from cifar_jax.run_weights import read_step

    first, sums, names = None, {}, []
    for workdir in workdirs:
        if has_run_record(workdir) and read_run_record(workdir).get("features"):
            raise UserError(
                f"{workdir} holds a head on frozen features, whose statistics are to stay as they "
                "are; expected a run of cifar_jax.main"
            )
        for step in find_steps(workdir, checkpoint):
            found = read_step(workdir, step)
            first = first or found
            _check_alike(first, found)
            for name, array in found.weights.values.items():
                sums[name] = sums.get(name, 0.0) + array.astype(np.float64)
            names.append(found.weights.header.source)
    means = {name: (total / len(names)).astype(np.float32) for name, total in sums.items()}
    return first, means, names


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


def _check_alike(first: "RunWeights", other: "RunWeights") -> None:
    """Refuses the mean of two models that are not the same function of their weights."""
    pairs = [
        (f"config.model.{key}", first.extra["config"]["model"][key], value)
        for key, value in other.extra["config"]["model"].items()
        if key not in ("pretrained", "dropout", "remat")
    ]
    pairs += [(key, first.extra[key], other.extra[key]) for key in ("splits_sha256", "data_sha256")]
    origins = [(each.weights.header.initial or {}).get("sha256") for each in (first, other)]
    for key, expected, found in [*pairs, ("the file it started from, by its SHA-256,", *origins)]:
        if found != expected:
            raise UserError(
                f"{other.weights.header.source}: {key} is {found!r}, in "
                f"{first.weights.header.source} it is {expected!r}; no mean of the two makes sense"
            )


def _header(first: "RunWeights", names: list[str], upsampling: int | None) -> "Header":
    """Returns the header of what is written, for the size that is asked for."""
    header = first.weights.header
    if upsampling not in (None, header.upsampling) and header.head != "pooled":
        raise UserError(
            f"--upsampling {upsampling}: {header.source} has a {header.head} head, which reads "
            f"images of upsampling {header.upsampling} alone; a pooled one reads any"
        )
    source = header.source if len(names) == 1 else f"mean of {'; '.join(names)}"
    upsampling = upsampling or header.upsampling
    return dataclasses.replace(header, source=source, upsampling=upsampling)


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
        "--upsampling", type=int, choices=range(1, 9), help="of images, where not the run's own"
    )
    parser.add_argument(
        "--images",
        type=_count,
        default=IMAGES,
        help="training images that the statistics are measured on (default: %(default)s)",
    )
    options = parser.parse_args()
    with exit_on_user_error():
        keep_freed_memory()
        print(json.dumps(average(**vars(options))))


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of images")
    return int(text)


if __name__ == "__main__":
    main()
