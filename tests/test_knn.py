"""Nearest neighbours, against a loop in NumPy."""

import json
import sys

import numpy as np
import pytest

from cifar_jax import knn
from cifar_jax.data.splits import Split
from cifar_jax.neighbours import accuracy_by_k

KS = (1, 5, 60, 500)


@pytest.fixture
def splits():
    """300 features around ten centres, not at distance 1: 250 to look among, 50 to classify."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 300).astype(np.int32)
    features = rng.normal(size=(10, 1, 1, 8))[labels] + rng.normal(size=(300, 1, 1, 8))
    features *= rng.uniform(0.1, 9, size=(300, 1, 1, 1))
    order = rng.permutation(300)
    features = features.astype(np.float32)
    return [Split("train", features, labels, rows) for rows in (order[:250], order[250:])]


def reference(train, queries, k):
    right = 0
    for row in queries.indices:
        cosines = []
        for other in train.indices:
            a, b = (train.images[i].ravel().astype(float) for i in (row, other))
            cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        nearest = np.argsort(cosines)[::-1][:k]
        votes = np.zeros(10)
        for i in nearest:
            votes[train.labels[train.indices[i]]] += np.exp(cosines[i] / 0.07)
        right += votes.argmax() == queries.labels[row]
    return right / len(queries)


def test_accuracies_are_those_of_the_loop(splits):
    found = accuracy_by_k(*splits, KS)
    assert found == {k: pytest.approx(reference(*splits, k)) for k in KS}
    assert len(set(found.values())) > 1 and 0.2 < found[5] < 1


def test_votes_count_exp_of_cosine_over_007():
    """Two neighbours weigh as much as one that is 0.07 log 2 = 0.0485 nearer."""
    angles = {0.047: 1, 0.050: 0}  # difference of the cosines: who wins
    for difference, winner in angles.items():
        x = 1 - difference
        bank = np.array([[1, 0], [x, (1 - x**2) ** 0.5], [x, -((1 - x**2) ** 0.5)], [1, 0]])
        images = bank.reshape(4, 1, 1, 2).astype(np.float32)
        labels = np.array([0, 1, 1, winner], np.int32)
        splits = [Split("train", images, labels, rows) for rows in (np.arange(3), np.arange(3, 4))]
        assert accuracy_by_k(*splits, [3]) == {3: 1.0}


def test_batches_change_nothing(splits, monkeypatch):
    whole = accuracy_by_k(*splits, KS)
    monkeypatch.setattr("cifar_jax.neighbours.BATCH", 7)
    assert accuracy_by_k(*splits, KS) == whole


def test_the_command_prints_nothing_but_json(monkeypatch, capsys):
    monkeypatch.setattr(knn, "set_up_memory", lambda: None)  # it would stay with this process
    monkeypatch.setattr(knn, "evaluate_knn", lambda config, ks, test: {"validation": {ks[0]: 0.5}})
    monkeypatch.setattr(sys, "argv", ["knn", "--config=configs/resnet50_probe.py"])
    knn.main()
    assert json.loads(capsys.readouterr().out) == {"validation": {str(knn.KS[0]): 0.5}}
