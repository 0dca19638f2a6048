"""SIGKILL at any moment, start again: the run ends as if nothing had happened, bit for bit."""

import random
import signal
import time

import pytest

from cifar_jax.train import train_and_evaluate
from tests.runs import assert_same_run, start_command


@pytest.fixture(scope="module")
def config():
    from configs import mlp

    config = mlp.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "sample",
            "train_for": "8 epochs",
            "steps_per_call": 15,
            "log_every": "15 steps",
            "checkpoint_every": "15 steps",  # so that most moments are near a save
            "eval_batch_size": 64,
        }
    )
    return config


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("reference")
    train_and_evaluate(config, workdir)
    return workdir


def kill_during_a_save(process, workdir):
    """Kills while an unfinished checkpoint lies in the folder."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if unfinished(workdir):
            process.send_signal(signal.SIGSTOP)  # so that it is still unfinished at the kill
            if unfinished(workdir):
                process.kill()
                process.communicate()
                return
            process.send_signal(signal.SIGCONT)
    raise AssertionError("no save was seen")


def unfinished(workdir):
    return list((workdir / "checkpoints").glob("*tmp*"))


def kill_after(process, workdir, seconds):
    """Kills `seconds` after the first checkpoint folder appears (0: while it starts)."""
    while seconds and not (workdir / "checkpoints").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.communicate()


def assert_resumes_to(reference, config, workdir):
    result = train_and_evaluate(config, workdir)
    assert result.stopped_by is None
    assert_same_run(workdir, reference)


def test_killed_during_a_save(config, reference, tmp_path):
    kill_during_a_save(start_command(config, tmp_path), tmp_path)
    assert unfinished(tmp_path)
    assert_resumes_to(reference, config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_a_random_moment(number, config, reference, tmp_path):
    seconds = random.Random(number).uniform(0, 3) if number else 0
    kill_after(start_command(config, tmp_path), tmp_path, seconds)
    assert_resumes_to(reference, config, tmp_path)


@pytest.mark.slow
def test_killed_again_and_again(config, reference, tmp_path):
    for number in range(4):
        kill_after(start_command(config, tmp_path), tmp_path, random.Random(number).uniform(0, 1))
    assert_resumes_to(reference, config, tmp_path)
