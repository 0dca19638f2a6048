"""SIGKILL at any moment, start again: the run ends as if nothing had happened, bit for bit."""

import random
import signal
import time

import pytest

from cifar_jax.checkpoint import FOLDER, find_step
from cifar_jax.recording.metrics_log import JSONL_NAME, read_rows
from cifar_jax.recording.run_record import read_run_record
from cifar_jax.train import train_and_evaluate
from tests.runs import assert_same_run, start_command

STEPS = 15  # of a call; a row and a save come after each


@pytest.fixture(scope="module")
def config():
    from configs import mlp

    config = mlp.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "sample",
            "train_for": "8 epochs",
            "steps_per_call": STEPS,
            "log_every": f"{STEPS} steps",
            "checkpoint_every": f"{STEPS} steps",  # so that most moments are near a save
            "eval_batch_size": 64,
        }
    )
    return config


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    train_and_evaluate(config, workdir)
    return workdir


def wait_for(condition, process):
    """Waits until the condition holds, which must be while the process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)


def kill(process):
    """Kills a process that must still be running."""
    assert process.poll() is None, process.communicate()[0]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def kill_during_a_save(process, workdir):
    """Kills while an unfinished checkpoint lies in the folder."""
    while True:
        wait_for(lambda: unfinished(workdir), process)
        process.send_signal(signal.SIGSTOP)  # so that it is still unfinished at the kill
        if unfinished(workdir):
            return kill(process)
        process.send_signal(signal.SIGCONT)


def unfinished(workdir):
    return list((workdir / FOLDER).glob("*tmp*"))


def saved(workdir):
    """Finished checkpoints: orbax gives a folder its number when it is whole."""
    return {int(path.name) for path in (workdir / FOLDER).glob("[0-9]*") if path.name.isdigit()}


def count_rows(workdir):
    log = workdir / JSONL_NAME
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_in_training(process, workdir, *, rows, seconds):
    """Kills `seconds` after this process has saved and then written that many rows."""
    before = saved(workdir)
    wait_for(lambda: saved(workdir) - before, process)
    written = count_rows(workdir) + rows
    wait_for(lambda: count_rows(workdir) >= written, process)
    time.sleep(seconds)
    kill(process)
    assert saved(workdir)
    assert read_run_record(workdir)["result"] is None


def assert_resumes_to(reference, config, workdir):
    result = train_and_evaluate(config, workdir)
    assert result.stopped_by is None
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_killed_during_a_save(config, reference, tmp_path):
    kill_during_a_save(start_command(config, tmp_path), tmp_path)
    assert unfinished(tmp_path)
    assert_resumes_to(reference, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_moment(number, config, reference, tmp_path):
    """From right after the first save to nearly the end, and at any point between two rows."""
    draw = random.Random(number)
    written = read_rows(reference)
    last = len(written) - 8  # two or three are written before a save is seen
    calls = sum(row["event"] == "train" for row in written)
    rows, seconds = draw.randint(0, last), draw.uniform(0, written[-1]["train_seconds"] / calls)
    kill_in_training(start_command(config, tmp_path), tmp_path, rows=rows, seconds=seconds)
    assert find_step(tmp_path, "latest") < find_step(reference, "latest")
    assert_resumes_to(reference, config, tmp_path)
    resumed_at = [start["step"] for start in read_run_record(tmp_path)["starts"]]
    assert len(resumed_at) == 2 and resumed_at[1] >= STEPS


@pytest.mark.slow
def test_killed_while_it_starts(config, reference, tmp_path):
    process = start_command(config, tmp_path)
    wait_for(lambda: (tmp_path / FOLDER).exists(), process)
    kill(process)
    assert not saved(tmp_path)
    assert_resumes_to(reference, config, tmp_path)


@pytest.mark.slow
def test_killed_again_and_again(config, reference, tmp_path):
    draw = random.Random(0)
    for _ in range(4):
        process = start_command(config, tmp_path)
        kill_in_training(process, tmp_path, rows=draw.randint(0, 3), seconds=draw.uniform(0, 0.02))
    starts = [start["step"] for start in read_run_record(tmp_path)["starts"]]
    assert len(starts) == 4 and sorted(set(starts)) == starts  # each went on from a later step
    assert_resumes_to(reference, config, tmp_path)
