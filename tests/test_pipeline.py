"""The input pipeline: order, start anywhere, hosts, masks."""

import collections
import os
import time

import numpy as np
import pytest

from cifar_jax.data.pipeline import eval_batches, train_batches, train_rows
from cifar_jax.data.splits import Split


@pytest.fixture(scope="module")
def numbered():
    """A split of 103 of 200 images; each image's pixels and label tell its row."""
    rows = np.arange(200, dtype=np.int32)
    images = np.ascontiguousarray(
        np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (200, 32, 32, 3))
    )
    indices = np.random.default_rng(0).permutation(200)[:103]
    return Split("train", images, rows, indices)


def one_step_calls(start, stop):
    return [(step, 1) for step in range(start, stop)]


def labels(split, calls, **options):
    options = {"batch_size": 10, "seed": 3, **options}
    rows = train_rows(split, calls, **options)
    return [batch["label"] for batch in train_batches(split, rows)]


def test_pixels_stay_uint8_and_belong_to_their_labels(numbered):
    rows = train_rows(numbered, [(0, 5), (5, 5)], batch_size=10, seed=0)
    for batch in train_batches(numbered, rows):
        assert batch["image"].dtype == np.uint8 and batch["image"].shape == (5, 10, 32, 32, 3)
        assert batch["label"].dtype == np.int32 and batch["label"].shape == (5, 10)
        assert np.array_equal(batch["image"][..., 0, 0, 0], batch["label"])


def test_tensorflow_is_quiet_without_being_told(numbered, monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    labels(numbered, [(0, 1)])
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"


def test_the_end_of_a_run_waits_for_nothing(numbered):
    """`tf.data`'s tuner sleeps up to a minute, the longer the older it is, and is waited for."""

    def slow_rows():
        while True:
            time.sleep(0.01)
            yield {"row": np.zeros((1, 10), np.int32)}

    pipelines = [train_batches(numbered, slow_rows()) for _ in range(20)]
    started = time.perf_counter()
    while time.perf_counter() < started + 3:
        for pipeline in pipelines:
            next(pipeline)
    stopped = time.perf_counter()
    del pipeline, pipelines
    assert time.perf_counter() < stopped + 1  # 0.03 s, and with the tuner from 6 s to over 20


def test_an_epoch_is_a_permutation_without_its_remainder(numbered):
    epochs = [np.ravel(labels(numbered, [(10 * e, 10)])) for e in range(30)]
    for epoch in epochs:
        assert len(set(epoch)) == 100 and set(epoch) <= set(numbered.indices)
    left_out = collections.Counter(i for e in epochs for i in set(numbered.indices) - set(e))
    assert len(left_out) > 30  # 90 places over 103 images: another remainder in every epoch
    assert not np.array_equal(epochs[0], epochs[1])


def test_batch_k_is_a_function_of_seed_and_k(numbered):
    whole = np.concatenate(labels(numbered, one_step_calls(0, 25)))
    stacked = np.concatenate(labels(numbered, [(0, 7), (7, 3), (10, 10), (20, 5)]))
    from_17 = np.concatenate(labels(numbered, one_step_calls(17, 25)))
    assert np.array_equal(whole, stacked)
    assert np.array_equal(whole[17:], from_17)
    assert not np.array_equal(
        whole, np.concatenate(labels(numbered, [(0, 10), (10, 10), (20, 5)], seed=4))
    )


@pytest.mark.parametrize("hosts", [2, 5])
def test_hosts_share_the_global_batch(numbered, hosts):
    calls = [(0, 4), (4, 6), (10, 3)]
    whole = labels(numbered, calls)
    shares = [
        labels(numbered, calls, process_index=host, process_count=hosts) for host in range(hosts)
    ]
    for k, batch in enumerate(whole):
        assert np.array_equal(batch, np.concatenate([share[k] for share in shares], axis=1))


def test_rows_are_those_of_the_batches(numbered):
    calls, options = [(0, 7), (7, 3), (10, 10)], dict(batch_size=10, seed=3)
    options |= dict(process_index=1, process_count=2)
    rows = [call["row"] for call in train_rows(numbered, calls, **options)]
    assert {array.dtype for array in rows} == {np.dtype(np.int32)}
    batches = train_batches(numbered, train_rows(numbered, calls, **options))
    for row, batch in zip(rows, batches, strict=True):
        assert np.array_equal(numbered.images[row], batch["image"])
        assert np.array_equal(numbered.labels[row], batch["label"])


@pytest.mark.parametrize("batch_size", [1, 10, 103, 200])
def test_evaluation_sees_every_image_once_in_order(numbered, batch_size):
    batches = list(eval_batches(numbered, batch_size=batch_size))
    assert all(len(batch["label"]) == batch_size for batch in batches)
    seen = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
    assert np.array_equal(seen, numbered.labels[numbered.indices])


def test_evaluation_on_hosts_makes_equally_many_batches(numbered):
    shares = [
        list(eval_batches(numbered, batch_size=20, process_index=host, process_count=4))
        for host in range(4)
    ]
    assert {len(share) for share in shares} == {6}
    seen = [b["label"][b["mask"]] for share in shares for b in share]
    assert sorted(np.concatenate(seen)) == sorted(numbered.indices)
