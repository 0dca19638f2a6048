"""Command: makes sure that CIFAR-10 is on this machine, fetching it where it is not.

python -m cifar_jax.fetch_data [--directory DIR]
"""

import argparse
import logging

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
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_user_error():
        dataset = load("auto", arguments.directory)
    counts = f"{len(dataset.train_labels):,} training"
    if dataset.test_labels is not None:
        counts += f" and {len(dataset.test_labels):,} test"
    print(f"{counts} images, content checked: {dataset.source}")


if __name__ == "__main__":
    main()
