"""The weights of a run as a file of ours holds them: how what was trained here leaves."""

import dataclasses
import pathlib
from typing import Any

from cifar_jax.checkpoint import digest, find_step, read_checkpoint
from cifar_jax.errors import UserError
from cifar_jax.parallel import check_devices
from cifar_jax.pretrained import ours, port
from cifar_jax.pretrained.names import printable
from cifar_jax.recording.run_record import record_so_far
from cifar_jax.state import trained_arrays, without_ema


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """The weights of one checkpoint, and what it says of its run."""

    weights: port.Weights
    extra: dict[str, Any]  # "config", hashes, history


def read_run(workdir: pathlib.Path, checkpoint: str) -> RunWeights:
    """Reads a fine-tuned ResNet-50 with its origin.

    Args:
      workdir: of the run.
      checkpoint: "latest", or "best" on validation.

    Raises:
      UserError: without such a checkpoint, if it is damaged, or of another model.
    """
    return read_step(workdir, find_step(workdir, checkpoint))


def read_step(workdir: pathlib.Path, step: int) -> RunWeights:
    """Reads the checkpoint of a step, as `read_run`."""
    check_devices()  # or orbax would call an intact checkpoint unreadable
    workdir = workdir.absolute()  # orbax insists
    arrays, extra = read_checkpoint(workdir, step)
    model = extra["config"]["model"]
    if model["name"] != "resnet50":
        raise UserError(
            f'{workdir}: its config.model.name is "{model["name"]}"; only the weights of a '
            "resnet50 have a form outside"
        )
    trained = trained_arrays(arrays)
    values = {name.partition(".")[2]: x for name, x in trained.items()}
    port.check(values, model["variant"], workdir)
    record = record_so_far(workdir)
    initial = record.get("weights") or {}
    header = ours.Header(
        source=printable(f"{workdir.name}, step {step}"),
        sha256=digest(arrays, extra),
        md5="none",
        naming="a run of cifar_jax",
        variant=model["variant"],
        preprocessing=model["preprocessing"],
        license=printable(initial.get("license", "unknown")),
        head=model["head"],
        upsampling=model["upsampling"],
        interpolation=model["interpolation"],
        test_time_flip=model.get("test_time_flip", False),
        initial=initial or None,
    )
    weights = port.Weights(
        values,
        header,
        ported=False,
        read=len(arrays),
        ignored=tuple(
            name for name, x in arrays.items() if x is not trained.get(without_ema(name))
        ),
    )
    return RunWeights(weights, extra)
