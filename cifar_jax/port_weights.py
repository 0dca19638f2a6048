"""Ports ResNet-50 weights, published ones or a run's, and certifies what was done.

python -m cifar_jax.port_weights resnet50-0676ba61.pth resnet50.safetensors
python -m cifar_jax.port_weights keras resnet50.safetensors
python -m cifar_jax.port_weights resnet50.safetensors resnet50.weights.h5 --to keras
python -m cifar_jax.port_weights runs/resnet50 mine.safetensors --checkpoint best

What Keras fine-tuned, predict and evaluate can use. What its images went through a .keras file says
itself; of weights alone it is stated:

python -m cifar_jax.port_weights cifar.keras cifar.safetensors
python -m cifar_jax.port_weights cifar.weights.h5 cifar.safetensors --preprocessing unit \\
    --interpolation nearest
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_jax.errors import UserError, exit_on_user_error, set_up_logging
from cifar_jax.models.transfer import INTERPOLATIONS, PREPROCESSINGS, UPSAMPLINGS
from cifar_jax.predict import CHECKPOINTS
from cifar_jax.pretrained import certificate, fetch, ours, port
from cifar_jax.pretrained.names import VARIANTS
from cifar_jax.run_weights import read_run

STATED = {  # what a file may leave open of the model that it was fine-tuned in
    "preprocessing": tuple(PREPROCESSINGS),
    "upsampling": UPSAMPLINGS,
    "interpolation": INTERPOLATIONS,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; `arguments` as on the command line, without the program's name."""
    flags = _parse(arguments)
    stated = {name: vars(flags)[name] for name in STATED if vars(flags)[name] is not None}
    with exit_on_user_error():
        set_up_logging()
        _check_request(flags, stated)
        folder = Path(flags.source).expanduser()
        is_run = flags.source not in fetch.NAMES and folder.is_dir()
        source = folder if is_run else fetch.resolve(flags.source)
        _refuse_overwriting(source, flags.dest, flags.certificate)
        weights = _complete(_read(source, flags.variant, flags.checkpoint), stated)
        _write(weights, flags.dest, flags.to, is_completed=bool(stated))
        certified = certificate.certify(weights, flags.dest)
        print(certificate.as_text(certified))
        if flags.certificate:
            content = json.dumps(certified, indent=2) + "\n"
            ours.write_atomically(flags.certificate, lambda part: part.write_text(content))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.port_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help="a file of Keras (.h5, .weights.h5, .keras), PyTorch (.pth), timm or Hugging Face "
        "(.safetensors), or ours; keras or torchvision, to use the published file; or the workdir "
        "of a run",
    )
    parser.add_argument("dest", type=_path, help="the file to write")
    parser.add_argument(
        "--variant", choices=VARIANTS, help="insist on this form of ResNet-50 (default: detected)"
    )
    parser.add_argument(
        "--to",
        choices=VARIANTS,
        help="write Keras's .weights.h5 or torchvision's names in .safetensors instead of ours",
    )
    parser.add_argument("--certificate", type=_path, help="write the certificate here too, as JSON")
    parser.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        default="latest",
        help="which one of a run (default: %(default)s); best is by validation",
    )
    group = parser.add_argument_group("what the images went through, where the file cannot tell")
    for name, choices in STATED.items():
        group.add_argument(f"--{name}", choices=choices, type=type(choices[0]))
    return parser.parse_args(arguments)


def _path(text: str) -> Path:
    return Path(text).expanduser()  # the shell does not where it stands behind "="


def _read(source: Path, variant: str | None, checkpoint: str) -> port.Weights:
    if source.is_dir():
        weights = read_run(source, checkpoint).weights
        port.insist(variant, weights.header.variant, source)
        return weights
    if checkpoint != "latest":
        raise UserError(f"{source} is a file; --checkpoint chooses among those of a workdir")
    return port.read(source, variant)


def _complete(weights: port.Weights, stated: dict[str, Any]) -> port.Weights:
    """Adds what is stated to the header; what it says already is not to be contradicted."""
    header = weights.header
    for name, value in stated.items():
        if weights.structure.tuned_head is None:
            raise UserError(f"--{name}: {header.source} has no head that was trained on CIFAR-10")
        known = getattr(header, name)
        if known not in (None, "unknown", value):
            raise UserError(f"--{name} {value}: {header.source} says that it is {known}")
    return dataclasses.replace(weights, header=dataclasses.replace(header, **stated))


def _check_request(flags: argparse.Namespace, stated: dict[str, Any]) -> None:
    """Refuses what no source could make right."""
    ours.check_dest(flags.dest, flags.to)
    if flags.certificate:
        ours.check_is_no_folder(flags.certificate)
    if flags.to and stated:
        raise UserError(f"--{next(iter(stated))}: a file made with --to has no place for it")
    for variant in (flags.variant, flags.source):
        if flags.to and variant in VARIANTS:
            _check_variant(flags.to, variant)


def _check_variant(to: str, variant: str) -> None:
    if to != variant:
        raise UserError(
            f"--to {to}: these weights are of variant {variant}, whose network is another one "
            f"(strides, biases); only --to {variant} is possible"
        )


def _write(weights: port.Weights, dest: Path, to: str | None, *, is_completed: bool) -> None:
    variant = weights.header.variant
    if to is None:
        if weights.ported and not is_completed:
            raise UserError(f"the source is ported already; to write it back, add --to {variant}")
        ours.write(dest, weights.values, weights.header)
    else:
        _check_variant(to, variant)
        port.write_published(weights, dest)


def _refuse_overwriting(source: Path, dest: Path, certificate: Path | None) -> None:
    for path in filter(None, (dest, certificate)):
        if path.exists() and path.samefile(source):
            raise UserError(f"{path}: is the source itself")
    if certificate and certificate.absolute() == dest.absolute():
        raise UserError(f"{certificate}: the certificate needs a file of its own")


if __name__ == "__main__":
    main()
