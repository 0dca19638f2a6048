"""Which images train, which validate, which test."""

import dataclasses
import hashlib

import numpy as np

from cifar_jax.data.sources import Dataset
from cifar_jax.errors import UserError

NAMES = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """A view of some of the images, or of features of theirs: nothing is copied."""

    name: str  # one of NAMES
    images: np.ndarray  # uint8 [N, 32, 32, 3] of the whole source; or float32 [N, h, w, C]
    labels: np.ndarray  # int32 [N]
    indices: np.ndarray  # int64 [n], rows of the source in this split's order

    def __len__(self) -> int:
        return len(self.indices)


def make_splits(
    data: Dataset, *, protocol: str, seed: int, images_a_class: int = 0
) -> dict[str, Split]:
    """Returns the splits {"train", "validation", "test"} of a protocol.

    "notebook" takes everything from the labelled training images, shuffled: a fifth tests, and the
    last tenth of the rest validates (of 50,000: 36,000 / 4,000 / 10,000; Keras's
    `validation_split=0.1` takes the last tenth too). "standard" keeps the official test images for
    the test and validates on a tenth of the training images (45,000 / 5,000 / 10,000).

    Args:
      data: the images.
      protocol: "notebook" or "standard".
      seed: of the shuffle.
      images_a_class: the training split keeps the first so many of each class; 0: all of it. Then
        the other splits are the same, and a smaller set is part of a larger one.

    Raises:
      UserError: where the protocol needs an official test split that the source lacks, or a class
        has too few images.
    """
    count = len(data.train_images)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    test_count = count // 5 if protocol == "notebook" else 0
    labelled = count - test_count
    train_count = labelled - labelled // 10
    cuts = {
        "train": _first_of_each_class(data.train_labels, order[:train_count], images_a_class),
        "validation": order[train_count:labelled],
        "test": order[labelled:],
    }
    splits = {
        name: Split(name, data.train_images, data.train_labels, indices)
        for name, indices in cuts.items()
    }
    if protocol == "standard":
        if data.test_images is None:
            raise UserError(
                f'config.data.protocol is "standard", but {data.source} has no labelled test '
                'images; use config.data.protocol="notebook"'
            )
        everything = np.arange(len(data.test_images))
        splits["test"] = Split("test", data.test_images, data.test_labels, everything)
    return splits


def _first_of_each_class(labels: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    if not count:
        return indices
    own = labels[indices]
    places = [np.flatnonzero(own == label)[:count] for label in np.unique(own)]
    if smallest := [len(each) for each in places if len(each) < count]:
        raise UserError(
            f"config.data.images_a_class is {count}; a class has {min(smallest)} training images"
        )
    return indices[np.sort(np.concatenate(places))]


def fingerprint(splits: dict[str, Split]) -> str:
    """Returns the SHA-256 of all indices with their splits' names and sizes."""
    digest = hashlib.sha256()
    for name in NAMES:
        indices = splits[name].indices
        digest.update(f"{name} {len(indices)}\n".encode())
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()


def duplicates_across(splits: dict[str, Split]) -> dict[str, int]:
    """Counts images that stand, pixel for pixel, in two splits.

    Returns:
      {"train-validation": n, "train-test": n, "validation-test": n}, n images of the second.
    """
    hashes = {
        name: np.array([hash(split.images[i].tobytes()) for i in split.indices])
        for name, split in splits.items()
    }
    pairs = [("train", "validation"), ("train", "test"), ("validation", "test")]
    return {f"{a}-{b}": int(np.isin(hashes[b], hashes[a]).sum()) for a, b in pairs}
