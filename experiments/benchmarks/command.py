"""The command line that the benchmarks share."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from cifar_jax.phases import UPSAMPLINGS
from experiments.benchmarks.job import SAMPLE, SHORT_TURN, Job


def make_parser(doc: str, *, rounds: int = 7) -> argparse.ArgumentParser:
    """Returns a parser with --rounds and --results; `doc` is the module's."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument(
        "--rounds", type=positive, default=rounds, help="that count (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=new_path, help="path without suffix (default: in results/ here)"
    )
    return parser


def add_size(parser: argparse.ArgumentParser, *, upsampling: int, batch_size: int) -> None:
    """Adds --upsampling and --batch-size with these defaults."""
    add = parser.add_argument
    add_upsampling(parser, default=upsampling)
    add("--batch-size", type=positive, default=batch_size, help="(default: %(default)s)")


def add_upsampling(parser: argparse.ArgumentParser, *, default: int) -> None:
    """Adds --upsampling."""
    parser.add_argument(
        "--upsampling",
        type=int,
        choices=UPSAMPLINGS,
        default=default,
        help="of 32 px (default: %(default)s)",
    )


def read_job(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *,
    work: str = "train",
    variant: str = "keras",
    pixels_a_turn: int = SHORT_TURN,
) -> Job:
    """Returns the job of `add_size`'s options; ends the process if it has more images than lie."""
    job = Job(work, options.upsampling, options.batch_size, variant, pixels_a_turn)
    if job.images_a_turn > SAMPLE:
        parser.error(
            f"--batch-size={job.batch_size}: a turn needs {job.images_a_turn:,} images; "
            f"expected at most {SAMPLE:,}, those that are shipped"
        )
    return job


def positive(text: str) -> int:
    """Reads a positive integer."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a positive integer")
    return int(text)


def new_path(text: str) -> Path:
    """Reads a path where files can be written: the time to find out is before an hour's work."""
    path = Path(text).expanduser()
    if not path.name:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected the path of a file")
    for suffix in (".json", ".md"):
        if path.with_name(path.name + suffix).is_dir():
            raise argparse.ArgumentTypeError(f"{text}{suffix} is a folder")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{folder} is not a folder that can be written to")
    return path


def written_by() -> str:
    """Returns how this process was started, for a page."""
    return f"Written by `{shlex.join(['python', *sys.orig_argv[1:]])}`"
