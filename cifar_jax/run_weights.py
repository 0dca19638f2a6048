"""The weights of a run as a file of ours holds them: how what was trained here leaves."""

import pathlib

from cifar_jax.checkpoint import digest, find_step, read_checkpoint
from cifar_jax.errors import UserError
from cifar_jax.pretrained import ours, port
from cifar_jax.pretrained.names import printable
from cifar_jax.recording.run_record import has_run_record, read_run_record
from cifar_jax.state import trained_arrays, without_ema


def read_run(workdir: pathlib.Path, checkpoint: str) -> port.Weights:
    """Reads a fine-tuned ResNet-50 with its origin.

    Args:
      workdir: of the run.
      checkpoint: "latest", or "best" on validation.

    Raises:
      UserError: without such a checkpoint, if it is damaged, or of another model.
    """
    workdir = workdir.absolute()  # orbax insists
    step = find_step(workdir, checkpoint)
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
    record = read_run_record(workdir) if has_run_record(workdir) else {}
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
        initial=initial or None,
    )
    return port.Weights(
        values,
        header,
        ported=False,
        read=len(arrays),
        ignored=tuple(
            name for name, x in arrays.items() if x is not trained.get(without_ema(name))
        ),
    )
