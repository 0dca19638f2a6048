"""Contenders take turns, each in a process of its own, and may die there."""

import os

import pytest

from experiments.benchmarks import interleaved
from experiments.gpu.throughput import run_survivors

ORDER = "ORDER_OF_TURNS"  # an environment variable, which reaches the processes: a file's path


def quick(turns):
    for report in turns:
        report["loss"] = 0.5


def first(turns):
    _write_turns("first", turns)


def second(turns):
    _write_turns("second", turns)


def _write_turns(name, turns):
    for _ in turns:
        with open(os.environ[ORDER], "a") as file:
            file.write(f"{name}\n")


def aborting(turns):
    next(turns)
    os.abort()


def test_a_round_holds_everybody_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(ORDER, str(tmp_path / "order"))
    reports = interleaved.run({"first": first, "second": second}, rounds=9)
    assert {name: len(taken) for name, taken in reports.items()} == {"first": 9, "second": 9}
    names = (tmp_path / "order").read_text().split()
    rounds = list(zip(names[::2], names[1::2], strict=True))
    assert set(rounds) == {("first", "second"), ("second", "first")}


def test_a_contender_that_aborts_leaves_the_others_their_rounds():
    workers = {"quick": quick, "aborting": aborting}
    with pytest.raises(interleaved.DeadContender, match="of aborting ended"):
        interleaved.run(workers, rounds=1)
    reports, dead = run_survivors(workers, 2)
    assert set(dead) == {"aborting"}
    assert [report["loss"] for report in reports["quick"]] == [0.5] * 2
    assert run_survivors({"aborting": aborting}, 2)[0] == {}
