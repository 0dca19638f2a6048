"""Ports published ResNet-50 weights to our format, or ours back, and certifies what was done.

python -m cifar_jax.port_weights resnet50-0676ba61.pth resnet50.safetensors
python -m cifar_jax.port_weights keras resnet50.safetensors
python -m cifar_jax.port_weights resnet50.safetensors resnet50.weights.h5 --to keras
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cifar_jax.errors import UserError, exit_on_user_error
from cifar_jax.pretrained import certificate, fetch, ours, port
from cifar_jax.pretrained.names import VARIANTS


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; `arguments` as on the command line, without the program's name."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.port_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        help="a file of Keras (.h5, .weights.h5, .keras), PyTorch (.pth), timm or Hugging Face "
        "(.safetensors), or ours; or keras or torchvision, to use the published file",
    )
    parser.add_argument("dest", type=Path, help="the file to write")
    parser.add_argument(
        "--variant", choices=VARIANTS, help="insist on this form of ResNet-50 (default: detected)"
    )
    parser.add_argument(
        "--to",
        choices=VARIANTS,
        help="write Keras's .weights.h5 or torchvision's names in .safetensors instead of ours",
    )
    parser.add_argument("--certificate", type=Path, help="write the certificate here too, as JSON")
    flags = parser.parse_args(arguments)
    with exit_on_user_error():
        source = fetch.resolve(flags.source)
        _refuse_overwriting(source, flags.dest, flags.certificate)
        weights = port.read(source, flags.variant)
        _write(weights, flags.dest, flags.to)
        certified = certificate.certify(weights, flags.dest)
        print(certificate.as_text(certified))
        if flags.certificate:
            content = json.dumps(certified, indent=2) + "\n"
            ours.write_atomically(flags.certificate, lambda part: part.write_text(content))


def _write(weights: port.Weights, dest: Path, to: str | None) -> None:
    variant = weights.header.variant
    if to is None:
        if weights.ported:
            raise UserError(f"the source is ported already; to write it back, add --to {variant}")
        if dest.suffix != ".safetensors":
            raise UserError(f"{dest}: expected a name that ends in .safetensors")
        ours.write(dest, weights.values, weights.header)
    elif to != variant:
        raise UserError(
            f"--to {to}: these weights are of variant {variant}, whose network is another one "
            f"(strides, biases); only --to {variant} is possible"
        )
    else:
        port.write_published(weights, dest)


def _refuse_overwriting(source: Path, dest: Path, certificate: Path | None) -> None:
    for path in filter(None, (dest, certificate)):
        if path.exists() and path.samefile(source):
            raise UserError(f"{path}: is the source itself")
    if certificate and certificate.absolute() == dest.absolute():
        raise UserError(f"{certificate}: the certificate needs a file of its own")


if __name__ == "__main__":
    main()
