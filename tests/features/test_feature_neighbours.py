"""Nearest neighbours among cached features."""

import dataclasses
import os
import signal

import pytest

from cifar_jax import knn
from cifar_jax.backbone import Backbone
from cifar_jax.data.splits import fingerprint, make_splits
from cifar_jax.errors import UserError
from cifar_jax.pretrained import port
from tests.features.helpers import changed, quick_program
from tests.test_knn import reference as knn_reference


def test_neighbours_are_found_among_cached_features(
    reference, module_config, small_data, tmp_path, monkeypatch
):
    """Against a loop over the same features; the test split is only read when asked for."""
    monkeypatch.setattr(Backbone, "_program", staticmethod(quick_program))
    config = changed(module_config, data__directory=str(tmp_path))
    found = knn.evaluate_knn(config, (1, 7), test=True)
    splits = make_splits(small_data, protocol="notebook", seed=42)
    splits = {n: dataclasses.replace(s, images=quick_program(s.images)) for n, s in splits.items()}
    expected = {k: knn_reference(splits["train"], splits["validation"], k) for k in (1, 7)}
    assert found["validation"] == pytest.approx(expected)
    best = max((1, 7), key=expected.get)
    assert found["test"] == pytest.approx(
        {best: knn_reference(splits["train"], splits["test"], best)}
    )
    header = port.read(config.model.pretrained).header
    assert found["weights"] == dataclasses.asdict(header)
    assert found["splits_sha256"] == fingerprint(splits)
    assert found["features"]["upsampling"] == config.model.upsampling
    assert "test" not in knn.evaluate_knn(module_config, (1,), test=False)


def test_a_signal_during_the_search_ends_it(reference, module_config, monkeypatch):
    """There is nothing to save: only the features, which may take hours, end in order."""
    search = "cifar_jax.neighbours.accuracy_by_k"
    monkeypatch.setattr(search, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        knn.evaluate_knn(module_config, (1,), test=False)


def test_neighbours_need_pooled_features_and_equal_shares(module_config):
    with pytest.raises(UserError, match='config.model.head is "flatten"; neighbours need "pooled"'):
        knn.evaluate_knn(changed(module_config, model__head="flatten"), (1,), test=False)
    with pytest.raises(UserError, match="config.eval_batch_size is 20; .* the 8 devices"):
        knn.evaluate_knn(changed(module_config, eval_batch_size=20), (1,), test=False)
