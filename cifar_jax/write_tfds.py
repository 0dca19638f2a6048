"""Command: writes CIFAR-10 as a folder that `tfds.load("cifar10", data_dir=DEST)` reads.

python -m cifar_jax.write_tfds DEST [--source auto|sample] [--directory DIR]
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cifar_jax.data.sources import DEFAULT_DIRECTORY, SOURCES, Dataset, load
from cifar_jax.errors import RunError, UserError, exit_on_user_error, kind_of_failed_write
from cifar_jax.labels import CLASS_NAMES

TFDS_VERSION = "3.0.2"  # that of tfds's own cifar10, which tfds.load looks for


def write_tfds(dataset: Dataset, destination: Path) -> None:
    """Writes `dataset` with the features, split names and ids of TFDS's own cifar10.

    Args:
        dataset: has a test split.
        destination: the data_dir to be; missing or empty. It appears whole or not at all.

    Raises:
        UserError: `destination` is not empty or cannot be written, or there is no test split.
        RunError: the disk is full or fails.
    """
    if dataset.test_images is None:
        raise UserError(f"{dataset.source} has no labelled test split, which TFDS's cifar10 has")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise UserError(f"{destination} is not an empty folder; name a new one")
    # Imported here because it takes 8 s, which `--help` and bad input need not wait for.
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # JAX owns the GPU: TensorFlow would take all of its memory.
    tf.config.set_visible_devices([], "GPU")
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=CLASS_NAMES),
    }
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tfds-", dir=destination.parent) as scratch:
            folder = Path(scratch) / destination.name
            tfds.dataset_builders.store_as_tfds_dataset(
                name="cifar10",
                version=TFDS_VERSION,
                features=tfds.features.FeaturesDict(features),
                split_datasets={
                    "train": _examples("train", dataset.train_images, dataset.train_labels),
                    "test": _examples("test", dataset.test_images, dataset.test_labels),
                },
                data_dir=folder,
                description=f"CIFAR-10, written by cifar_jax from: {dataset.source}.",
                homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            )
            shutil.rmtree(folder / "downloads")  # TFDS makes it, empty
            os.replace(folder, destination)
    except (OSError, tf.errors.OpError) as error:
        is_full = isinstance(error, tf.errors.ResourceExhaustedError)
        kind = RunError if is_full else kind_of_failed_write(error)
        raise kind(f"{destination} cannot be written ({error})") from error


def _examples(
    split: str, images: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"id": f"{split}_{index:05d}", "image": image, "label": int(label)}


def main() -> None:
    """Loads the data and writes it."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.write_tfds", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("destination", type=Path, help="new or empty folder")
    parser.add_argument("--source", choices=SOURCES, default="auto")
    parser.add_argument("--directory", default=DEFAULT_DIRECTORY, help="default: %(default)s")
    arguments = parser.parse_args()
    with exit_on_user_error():
        destination = arguments.destination.expanduser().absolute()
        write_tfds(load(arguments.source, arguments.directory), destination)
    print(f'written; read it with tfds.load("cifar10", data_dir="{destination}")')


if __name__ == "__main__":
    main()
