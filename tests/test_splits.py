"""Splits: sizes, disjointness, the seed, and duplicates."""

import dataclasses

import numpy as np
import pytest

from cifar_jax.data.sources import Dataset
from cifar_jax.data.splits import duplicates_across, fingerprint, make_splits
from cifar_jax.errors import UserError


@pytest.fixture(scope="module")
def full_size():
    """The size of CIFAR-10 without its pixels: only indices matter here."""
    empty = np.broadcast_to(np.uint8(0), (50000, 32, 32, 3))
    labels = np.arange(50000, dtype=np.int32) % 10
    return Dataset(empty, labels, empty[:10000], labels[:10000], "made up", False, {})


@pytest.mark.parametrize(
    ("protocol", "sizes"), [("notebook", (36000, 4000, 10000)), ("standard", (45000, 5000, 10000))]
)
def test_sizes_and_disjointness(full_size, protocol, sizes):
    splits = make_splits(full_size, protocol=protocol, seed=42)
    assert tuple(len(split) for split in splits.values()) == sizes
    of_training_images = [s.indices for s in splits.values() if len(s.images) == 50000]
    together = np.sort(np.concatenate(of_training_images))
    assert np.array_equal(together, np.arange(50000))  # every image once: no index in two splits


def test_the_notebook_takes_its_test_first_and_validates_on_the_last_tenth(full_size):
    splits = make_splits(full_size, protocol="notebook", seed=7)
    order = np.random.Generator(np.random.PCG64(7)).permutation(50000)
    assert np.array_equal(splits["test"].indices, order[40000:])
    assert np.array_equal(splits["validation"].indices, order[36000:40000])


def test_fingerprint_depends_on_seed_and_protocol_and_nothing_else(full_size):
    def prints(protocol, seed):
        return fingerprint(make_splits(full_size, protocol=protocol, seed=seed))

    assert prints("notebook", 1) == prints("notebook", 1)
    assert len({prints("notebook", 1), prints("notebook", 2), prints("standard", 1)}) == 3


def test_standard_protocol_needs_labelled_test_images(full_size):
    kaggle = dataclasses.replace(full_size, test_images=None, test_labels=None)
    with pytest.raises(UserError, match="config.data.protocol"):
        make_splits(kaggle, protocol="standard", seed=0)
    assert len(make_splits(kaggle, protocol="notebook", seed=0)["test"]) == 10000


def test_duplicates_are_counted_across_splits(sample):
    images = sample.train_images.copy()
    doctored = dataclasses.replace(sample, train_images=images)
    splits = make_splits(doctored, protocol="notebook", seed=0)
    before = duplicates_across(splits)
    images[splits["test"].indices[3]] = images[splits["train"].indices[5]]
    images[splits["validation"].indices[1]] = images[splits["train"].indices[6]]
    after = duplicates_across(splits)
    assert after["train-test"] == before["train-test"] + 1
    assert after["train-validation"] == before["train-validation"] + 1
    assert after["validation-test"] == before["validation-test"]


def test_few_images_of_each_class_are_part_of_more(full_size):
    """Validation and test stay as they are."""
    make = {"protocol": "standard", "seed": 42}
    whole, few, more = (make_splits(full_size, **make, images_a_class=n) for n in (0, 10, 100))
    assert fingerprint({**few, "train": whole["train"]}) == fingerprint(whole)
    assert len(few["train"]) == 100 and len(more["train"]) == 1000
    labels = few["train"].labels[few["train"].indices]
    np.testing.assert_array_equal(np.bincount(labels), [10] * 10)
    assert set(few["train"].indices) < set(more["train"].indices) < set(whole["train"].indices)
    with pytest.raises(UserError, match="images_a_class is 4900; a class has"):
        make_splits(full_size, **make, images_a_class=4900)
