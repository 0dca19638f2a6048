"""Contenders take turns, each in a process of its own, and may die there."""

import collections
import importlib
import itertools
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from cifar_jax.errors import UserError
from experiments.benchmarks import ablate, interleaved
from experiments.benchmarks.twins import TWINS
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


def failing(turns):
    next(turns)
    raise EOFError("a file is cut off")


def killed(turns):
    next(turns)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_round_holds_everybody_once_in_its_order(tmp_path, monkeypatch):
    monkeypatch.setenv(ORDER, str(tmp_path / "order"))
    reports = interleaved.run({"first": first, "second": second}, rounds=3)
    assert {name: len(taken) for name, taken in reports.items()} == {"first": 3, "second": 3}
    names = (tmp_path / "order").read_text().split()
    assert names == [*("first", "second"), *("second", "first") * 2, *("first", "second")]
    assert [report["after"] for report in reports["first"]] == ["second", "second", None]


@pytest.mark.parametrize("count", range(1, 10))
def test_everybody_follows_everybody_else_equally_often(count):
    names = "abcdefghi"[:count]
    rounds = [interleaved.order_of(names, number) for number in range(2 * count)]
    assert all(sorted(each) == list(names) for each in rounds)
    followers = collections.Counter(pair for each in rounds for pair in itertools.pairwise(each))
    assert len(followers) == count * (count - 1)
    assert set(followers.values()) <= {2}


def test_a_contender_that_aborts_leaves_the_others_their_rounds():
    workers = {"quick": quick, "aborting": aborting}
    with pytest.raises(interleaved.DeadContender, match="of aborting ended before its turns did$"):
        interleaved.run(workers, rounds=1)
    reports, dead = run_survivors(workers, 2)
    assert set(dead) == {"aborting"}
    assert [report["loss"] for report in reports["quick"]] == [0.5] * 2
    assert run_survivors({"aborting": aborting}, 2)[0] == {}


def test_a_contender_that_fails_says_why_itself(capfd):
    with pytest.raises(interleaved.DeadContender, match="of failing ended before its turns did$"):
        interleaved.run({"failing": failing}, rounds=1)
    assert "EOFError: a file is cut off" in capfd.readouterr().err


def test_a_contender_that_is_killed_is_told_to_want_memory():
    with pytest.raises(interleaved.DeadContender, match="of killed ended .* want of memory"):
        interleaved.run({"quick": quick, "killed": killed}, rounds=1)


COMMANDS = ("ablate", "layers", "loop", "resnet")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--batch-size=0", "argument --batch-size: found '0', expected a positive integer"),
        ("--upsampling=9", "argument --upsampling: invalid choice: 9 (choose from 1, 2, 3"),
        ("--rounds=-1", "argument --rounds: found '-1', expected a positive integer"),
        ("--batch-size=3000", "a turn needs 3,000 images; expected at most 2,000"),
        ("--results=/proc/version/x", "argument --results: /proc/version is not a folder"),
        ("--results=/", "argument --results: found '/', expected the path of a file"),
        ("--results=", "argument --results: found '', expected the path of a file"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_timed(
    command, option, told, monkeypatch, capsys
):
    module = importlib.import_module(f"experiments.benchmarks.{command}")
    monkeypatch.setattr(sys, "argv", [command, option])
    with pytest.raises(SystemExit) as error:
        module.main()
    assert error.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["resnet", "mlp", "layers"])
def test_a_missing_package_is_told_before_anything_is_timed(command, monkeypatch):
    module = importlib.import_module(f"experiments.benchmarks.{command}")
    monkeypatch.setattr(module, "PACKAGES", ("jax", "no-such-package"))
    monkeypatch.setattr(sys, "argv", [command])
    with pytest.raises(UserError, match="no-such-package is not installed; pip install -r req"):
        module.main()


def test_ablate_has_rounds_for_everybody_to_follow_everybody():
    assert ablate.ROUNDS == 2 * (len(TWINS) + 1)


def test_a_dot_in_the_name_of_results_stays(tmp_path):
    interleaved.write_results(tmp_path / "a_v1.5", {"x": 1}, text="page")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_v1.5.json", "a_v1.5.md"]


def test_the_peak_is_this_processs_and_not_its_parents():
    held = np.ones(400_000_000, np.uint8)
    code = "from experiments.benchmarks.interleaved import peak_mb; print(peak_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert 10 < float(child.stdout) < 300 and interleaved.peak_mb() > held.nbytes / 1e6
