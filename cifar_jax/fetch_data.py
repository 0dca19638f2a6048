"""Command: makes sure that CIFAR-10 is on this machine, fetching it where it is not.

python -m cifar_jax.fetch_data [--directory DIR] [--or-sample]
"""

import argparse
import logging
import sys

from cifar_jax.data.fetch import NotToBeHad
from cifar_jax.data.sources import DEFAULT_DIRECTORY, load
from cifar_jax.errors import exit_on_user_error


def main() -> None:
    """Finds or fetches the data, checks it and says where it is."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.fetch_data", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--directory", default=DEFAULT_DIRECTORY, help="folder (default: %(default)s)"
    )
    parser.add_argument(
        "--or-sample",
        action="store_true",
        help="print the data.source to train from: auto, or sample where no CIFAR-10 is to be had",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_user_error():
        try:
            found = _find(arguments.directory)
        except NotToBeHad as error:
            if not arguments.or_sample:
                raise
            print(f"warning: {error}", file=sys.stderr)
            print("sample")
            return
        print(found, file=sys.stderr if arguments.or_sample else sys.stdout)
        if arguments.or_sample:
            print("auto")


def _find(directory: str) -> str:
    """Loads the data; returns what was found, for people."""
    dataset = load("auto", directory)
    counts = f"{len(dataset.train_labels):,} training"
    if dataset.test_labels is not None:
        counts += f" and {len(dataset.test_labels):,} test"
    return f"{counts} images, content checked: {dataset.source}"


if __name__ == "__main__":
    main()
