"""What CIFAR-10 is, whatever form it came in: its size, its arrays and their content hash."""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cifar_jax.errors import UserError

IMAGE_SHAPE = (32, 32, 3)
TRAIN_BATCHES = 5  # every published form but TFDS's and Kaggle's cuts the set into 5 + 1 batches
_ALIGNMENT = 64


class Arrays(NamedTuple):
    """Both splits, decoded, in the original order.

    Images are uint8 [N, 32, 32, 3], RGB, C-contiguous; labels uint8 [N], 0..9. The test split is
    None where the source has no test labels.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray | None
    test_labels: np.ndarray | None


@dataclass(frozen=True)
class Edition:
    """The set that is expected: its size and the hash of its content.

    Attributes:
        per_batch: images in each of the five training batches and in the test batch.
        sha256: `content_hash` of the split, by split name ("train", "test").
    """

    per_batch: int
    sha256: dict[str, str]


CIFAR10 = Edition(
    per_batch=10_000,
    sha256={
        "train": "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b",
        "test": "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa",
    },
)


def empty_images(count: int) -> np.ndarray:
    """An uninitialised uint8 [count, 32, 32, 3] array that begins at a 64-byte boundary."""
    return _empty_aligned((count, *IMAGE_SHAPE), np.dtype(np.uint8))


def aligned(array: np.ndarray) -> np.ndarray:
    """The array itself where it begins at a 64-byte boundary, else a copy that does.

    TensorFlow can use such an array where it lies (handed over through DLPack) instead of copying
    184 MB. NumPy aligns to 16 bytes only: there TensorFlow aborts the process in the first
    operation that checks the address.
    """
    if array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
        return array
    copy = _empty_aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def empty_arrays(train: int, test: int) -> Arrays:
    """Uninitialised arrays of `train` and `test` images, for a reader to fill."""
    return Arrays(
        empty_images(train), np.empty(train, np.uint8), empty_images(test), np.empty(test, np.uint8)
    )


def content_hash(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 over the image bytes (uint8, C order), then the label bytes (uint8)."""
    digest = hashlib.sha256(np.ascontiguousarray(images, np.uint8))
    digest.update(np.ascontiguousarray(labels, np.uint8))
    return digest.hexdigest()


def check_content(arrays: Arrays, sha256: dict[str, str], place: str) -> dict[str, str]:
    """Compares every split that is there with its known hash.

    Args:
        arrays: what a reader gave.
        sha256: the known hash by split name.
        place: where the arrays came from, for the message.

    Returns:
        The hashes of the splits that are there.

    Raises:
        UserError: a split differs from the known one in any pixel, label or in their order.
    """
    found = {"train": content_hash(arrays.train_images, arrays.train_labels)}
    if arrays.test_images is not None:
        found["test"] = content_hash(arrays.test_images, arrays.test_labels)
    for split, digest in found.items():
        if digest != sha256[split]:
            raise UserError(
                f"{place}: the {split} split decodes to SHA-256 {digest[:16]}..., expected "
                f"{sha256[split][:16]}...: images, labels or their order differ from the original; "
                "replace it by a fresh copy"
            )
    return found
