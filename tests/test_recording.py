"""The log of metrics and the run record."""

import csv
import errno
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import tempfile
import threading

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from cifar_jax.errors import RunError, UserError
from cifar_jax.recording import run_record
from cifar_jax.recording.files import write_atomically
from cifar_jax.recording.metrics_log import MetricsLog, read_rows


def row(step, event="train", **metrics):
    return {"step": step, "epoch": step / 4, "event": event, **metrics}


def write_all(workdir, rows, *, resume_step=0, resume_rows=0):
    log = MetricsLog(workdir, resume_step=resume_step, resume_rows=resume_rows)
    for each in rows:
        log.write(each)
    log.close()


def tensorboard_scalars(workdir):
    """Reads event files as TensorBoard does: a start of a session hides what has its step or more.

    Frames are length (8 bytes), its checksum (4), the event, its checksum (4).
    """
    scalars = {}
    for path in sorted(pathlib.Path(workdir, "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                scalars = {key: x for key, x in scalars.items() if key[1] < event.step}
            for value in event.summary.value:
                scalars[value.tag, event.step] = value.simple_value
    return scalars


# Metrics log

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
ROWS = st.lists(
    st.tuples(
        st.integers(0, 3),  # by how many steps the run went on
        st.sampled_from(["train", "evaluation"]),
        st.dictionaries(st.sampled_from(["train_loss", "validation_accuracy"]), FLOATS),
    ),
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(rows=ROWS, data=st.data())
def test_a_killed_and_resumed_log_equals_an_uninterrupted_one(rows, data):
    steps = np.cumsum([step for step, _, _ in rows], dtype=int).tolist()
    rows = [row(step, event, **x) for step, (_, event, x) in zip(steps, rows, strict=True)]
    known = data.draw(st.integers(0, len(rows)), label="rows that the checkpoint knew")
    written = data.draw(st.integers(known, len(rows)), label="rows written before the kill")
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
        write_all(whole, rows)
        write_all(killed, rows[:written])
        log = pathlib.Path(killed, "metrics.jsonl")
        if written < len(rows):
            line = json.dumps(rows[written]).encode()
            torn = line[: data.draw(st.integers(0, len(line)), label="bytes of the torn line")]
            log.write_bytes(log.read_bytes() + torn)
            # A whole object, short of its line break only, is a row like any other.
            assert read_rows(killed) == rows[: written + (torn == line)]

        resume_step = rows[known - 1]["step"] if known else 0
        resumed = MetricsLog(killed, resume_step=resume_step, resume_rows=known)
        assert resumed.rows == read_rows(killed) == rows[:known]
        for each in rows[known:]:
            resumed.write(each)
        resumed.close()
        for name in ("metrics.jsonl", "metrics.csv"):
            assert pathlib.Path(killed, name).read_bytes() == pathlib.Path(whole, name).read_bytes()


def test_no_row_comes_twice_where_lines_were_deleted(tmp_path):
    write_all(tmp_path, [row(step) for step in (6, 8)])  # 2 and 4 are gone
    write_all(tmp_path, [row(8)], resume_step=6, resume_rows=3)
    assert [each["step"] for each in read_rows(tmp_path)] == [6, 8]


def test_values_round_trip_exactly_in_both_files(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, np.float32(0.1), np.pi * 1e-30]
    values.append(jax.numpy.float32(0.7))
    write_all(tmp_path, [row(i, "evaluation", train_loss=x) for i, x in enumerate(values)])
    assert [each["train_loss"] for each in read_rows(tmp_path)] == [float(x) for x in values]
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert [float(x["train_loss"]) for x in csv.DictReader(file)] == [float(x) for x in values]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 0


def test_csv_is_the_table_of_evaluations(tmp_path):
    rows = [row(4, train_loss=2.0), row(4, "evaluation", validation_loss=1.5)]
    write_all(tmp_path, [*rows, row(8, "evaluation", validation_loss=1.0, train_loss=0.5)])
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,epoch,validation_loss,train_loss\n4,1.0,1.5,\n8,2.0,1.0,0.5\n"
    )


def test_tensorboard_shows_the_resumed_run(tmp_path):
    write_all(tmp_path, [row(step, train_loss=1.0, learning_rate=0.5) for step in (2, 4, 6)])
    write_all(
        tmp_path, [row(6, "evaluation", validation_accuracy=0.25)], resume_step=4, resume_rows=2
    )
    scalars = tensorboard_scalars(tmp_path)
    assert scalars["train/loss", 4] == 1.0 and scalars["learning_rate", 2] == 0.5
    assert scalars["validation/accuracy", 6] == 0.25 and scalars["epoch", 6] == 1.5
    assert ("train/loss", 6) not in scalars


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, resume_rows=0)
    log.write(row(1, "evaluation", train_loss=1.0))
    assert read_rows(tmp_path) == log.rows
    assert tensorboard_scalars(tmp_path)["train/loss", 1] == 1.0
    log.close()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "7",
        "\0\0",
        '{"step": 1}',
        '{"step": "1", "epoch": 1.0, "event": "train"}',
        '{"step": true, "epoch": 1.0, "event": "train"}',
        '{"step": 1, "epoch": null, "event": "train"}',
        '{"step": 1, "epoch": 1.0, "event": "pause"}',
    ],
)
def test_malformed_line_is_named(tmp_path, line):
    good = json.dumps(row(1))
    for content in (f"{good}\n{line}\n{good}\n", f"{good}\n{line}\n"):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(UserError, match="metrics.jsonl: line 2 ") as raised:
            MetricsLog(tmp_path, resume_step=5, resume_rows=5)
        assert "\n" not in str(raised.value)
        assert (tmp_path / "metrics.jsonl").read_text() == content


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, resume_step=0, resume_rows=0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match="metrics.jsonl: cannot be written .No space left"):
        log.write(row(1, train_loss=1.0))
    log.close()


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    run_record.update_run_record(tmp_path, model="mlp")
    write_bytes = pathlib.Path.write_bytes

    def half_then_full(path, content):
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_bytes", half_then_full)
    with pytest.raises(RunError, match="run.json: cannot be written"):
        run_record.update_run_record(tmp_path, model="resnet50")
    assert run_record.read_run_record(tmp_path) == {"model": "mlp"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.json.lock", "run.json"]


def test_a_file_is_replaced_not_overwritten(tmp_path):
    path, seen_by_a_reader = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    seen_by_a_reader.hardlink_to(path)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and seen_by_a_reader.read_bytes() == b"old"


# Run record


def test_record_keeps_order_and_merges(tmp_path):
    run_record.update_run_record(tmp_path, zebra=1, config={"b": [1, 2], "a": None})
    record = run_record.update_run_record(tmp_path, accuracy=np.float32(0.5), zebra=2)
    assert record["config"] == {"b": [1, 2], "a": None}
    text = (tmp_path / "run.json").read_text()
    assert re.findall(r'^  "(\w+)"', text, re.M) == ["zebra", "config", "accuracy"]
    assert run_record.read_run_record(tmp_path) == {**record, "accuracy": 0.5}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "not found"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"starts": 3}', "has no valid starts"),
        (b'{"result": 3, "test_reads": {}}', "has no valid test_reads, result"),
        (
            b'{"result": {"step": "9"}, "config": [], "features": 1}',
            "has no valid config, features",
        ),
    ],
)
def test_bad_record_is_one_clear_line_and_stays(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(UserError, match=message):
            run_record.update_run_record(tmp_path, a=1)
        assert (tmp_path / "run.json").read_bytes() == content
    with pytest.raises(UserError, match=f"run.json: {message}") as raised:
        run_record.read_run_record(tmp_path)
    assert "\n" not in str(raised.value)


def test_every_read_of_the_test_split_is_counted(tmp_path):
    threads = [
        threading.Thread(target=run_record.count_test_read, args=(tmp_path, {"step": step}))
        for step in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reads = run_record.read_run_record(tmp_path)["test_reads"]
    assert sorted(read["step"] for read in reads) == list(range(8))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", read["time"]) for read in reads)


def test_environment_is_described(monkeypatch):
    monkeypatch.setattr(run_record, "PACKAGES", ("jax", "no-such-package"))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "cifar_jax.main", "--config=a b.py"])
    environment = run_record.describe_environment()
    json.dumps(environment)
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["versions"]["no-such-package"] is None
    assert environment["device_count"] == 8 and environment["device_kind"] == "cpu"
    assert environment["process_count"] == 1
    assert environment["cpu"]
    assert environment["command"] == "python -m cifar_jax.main '--config=a b.py'"


def test_git_commit_and_dirty_flag(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code = tmp_path / "code"
    code.mkdir()
    (code / "__init__.py").write_text("")
    assert run_record.describe_git(code) is None  # no repository
    git("init", "--quiet")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-qm", "other")
    assert run_record.describe_git(code) is None  # another project's repository
    git("add", "code")
    git("commit", "-qm", "code")
    commit = git("rev-parse", "HEAD")
    assert run_record.describe_git(code) == {"commit": commit, "dirty": False}
    (code / "__init__.py").write_text("changed = True")
    assert run_record.describe_git(code) == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert run_record.describe_git(code) is None  # no git
