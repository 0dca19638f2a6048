"""Whole runs on the sample: files, resuming after every kind of stop, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys

import filelock
import jax
import numpy as np
import pytest

from cifar_jax import config as configuration
from cifar_jax.checkpoint import FOLDER, REPLACED, find_step, read_checkpoint
from cifar_jax.errors import RunError, UserError
from cifar_jax.evaluate import evaluate
from cifar_jax.loop import History, Loop
from cifar_jax.recording.metrics_log import read_rows
from cifar_jax.recording.run_record import read_run_record, update_run_record
from cifar_jax.train import train_and_evaluate
from tests.runs import ROOT, assert_same_run, start_command

TOTAL = 90  # 2 epochs of 45 steps, in calls of 15


@pytest.fixture(scope="module")
def module_config():
    from configs import mlp

    config = mlp.get_config()
    config.update_from_flattened_dict(
        {
            "data.source": "sample",
            "train_for": "2 epochs",
            "steps_per_call": 15,
            "log_every": "15 steps",
            "eval_batch_size": 64,
        }
    )
    return config


@pytest.fixture(scope="module")
def reference(module_config, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("reference")
    train_and_evaluate(module_config, workdir)
    return workdir


def test_a_run_leaves_all_that_it_should(reference):
    record, rows = read_run_record(reference), read_rows(reference)
    assert [row["step"] for row in rows if row["event"] == "evaluation"] == [45, 90]
    assert [row["step"] for row in rows if row["event"] == "train"] == [15, 30, 45, 60, 75, 90]
    seconds = [row["train_seconds"] for row in rows if row["event"] == "train"]
    assert 0 < seconds[0] and seconds == sorted(set(seconds))  # the first call counts as well
    assert record["data"]["is_sample"] and "sample" in record["data"]["source"]
    assert record["splits"]["sizes"] == {"train": 1440, "validation": 160, "test": 400}
    assert record["parameters"] == 3072 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    assert record["result"]["test_count"] == 400 and record["result"]["step"] == TOTAL
    assert [read["step"] for read in record["test_reads"]] == [TOTAL]
    assert record["starts"][0]["versions"]["jax"] == jax.__version__
    assert record["starts"][0]["started"] <= record["starts"][0]["ended"]
    assert record["total_steps"] == TOTAL
    assert (reference / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((reference / "metrics.csv").read_text().splitlines()) == 3
    assert list((reference / "tensorboard").iterdir())
    assert find_step(reference, "latest") == TOTAL


def test_epoch_means_are_the_means_of_their_rows(reference):
    rows = read_rows(reference)
    steps = [row for row in rows if row["event"] == "train"]
    epochs = [row for row in rows if row["event"] == "evaluation"]
    for number, epoch in enumerate(epochs):
        thirds = steps[3 * number : 3 * number + 3]
        for metric in ("loss", "accuracy"):
            mean = np.mean([row[metric] for row in thirds])
            assert epoch[f"train_{metric}"] == pytest.approx(mean, rel=1e-9)


def test_a_finished_run_is_shown_again_without_a_second_look_at_the_test(reference, module_config):
    before = read_run_record(reference)
    result = train_and_evaluate(module_config, reference)
    assert result.step == TOTAL and result.record["result"] == before["result"]
    assert len(result.record["test_reads"]) == 1 and len(result.record["starts"]) == 2


def test_evaluate_agrees_with_the_run_and_counts_its_looks(reference, monkeypatch, capsys):
    record = read_run_record(reference)
    monkeypatch.setenv("HOME", str(reference.parent))
    test = evaluate(f"~/{reference.name}", split="test")
    assert test["accuracy"] == record["result"]["test_accuracy"] and test["count"] == 400
    assert "has been read before, 1 time(s)" in capsys.readouterr().err
    assert test["loss"] == pytest.approx(record["result"]["test_loss"], rel=1e-6)
    assert len(read_run_record(reference)["test_reads"]) == len(record["test_reads"]) + 1
    best = evaluate(reference, checkpoint="best")
    accuracies = [r["validation_accuracy"] for r in read_rows(reference) if "validation_loss" in r]
    assert best["accuracy"] == max(accuracies)
    assert len(read_run_record(reference)["test_reads"]) == len(record["test_reads"]) + 1


def send_in(monkeypatch, method, at_call, number=signal.SIGTERM):
    """Lets the process get a signal when `Loop.method` is entered for the nth time."""
    original, calls = getattr(Loop, method), []

    def wrapped(self, *args, **options):
        calls.append(None)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)
        return original(self, *args, **options)

    monkeypatch.setattr(Loop, method, wrapped)


@pytest.mark.parametrize(
    ("method", "at_call", "number", "stopped_at"),
    [
        ("dispatch", 1, signal.SIGTERM, 15),
        ("dispatch", 3, signal.SIGINT, 45),  # the evaluation of step 45 is left to the next start
        ("dispatch", 5, signal.SIGTERM, 75),
        ("evaluate", 1, signal.SIGTERM, 45),  # during the evaluation of step 45
        ("save", 1, signal.SIGTERM, 45),
        ("write_row", 4, signal.SIGTERM, 45),  # the row of the first evaluation, the best so far
        ("evaluate", 2, signal.SIGINT, 90),  # at the end, before its evaluation
        ("evaluate", 3, signal.SIGTERM, 90),  # during the test
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    method, at_call, number, stopped_at, module_config, reference, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        send_in(patch, method, at_call, number)
        result = train_and_evaluate(module_config, tmp_path)
    assert (result.step, result.stopped_by) == (stopped_at, number)
    assert find_step(tmp_path, "latest") == stopped_at
    assert result.record["result"] is None
    result = train_and_evaluate(module_config, tmp_path)
    assert (result.step, result.stopped_by) == (TOTAL, None)
    assert_same_run(tmp_path, reference)


def test_a_signal_when_all_is_done_has_stopped_nothing(module_config, reference, tmp_path):
    with pytest.MonkeyPatch.context() as patch:

        def record_end(workdir):
            os.kill(os.getpid(), signal.SIGTERM)
            return read_run_record(workdir)

        patch.setattr("cifar_jax.train.record_end", record_end)
        result = train_and_evaluate(module_config, tmp_path)
    assert (result.step, result.stopped_by) == (TOTAL, None)
    assert_same_run(tmp_path, reference)


def test_another_run_is_seen_to_differ(module_config, reference, tmp_path):
    """The comparison above can fail: one other dropout-free bit of input is enough."""
    config = module_config.copy_and_resolve_references()
    config.data.split_seed = 43
    train_and_evaluate(config, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, reference)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see errors.py
def test_a_damaged_latest_checkpoint_costs_only_its_steps(
    module_config, reference, tmp_path, capsys
):
    config = module_config.copy_and_resolve_references()
    config.checkpoint_every = "30 steps"
    train_and_evaluate(config, tmp_path)
    for file in (tmp_path / FOLDER / "90" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-7])
    train_and_evaluate(config, tmp_path)
    assert "90 is damaged" in capsys.readouterr().err
    assert_same_run(tmp_path, reference)


def test_where_the_weights_came_from_is_kept(module_config, tmp_path, capsys, monkeypatch):
    """The file may have moved: it was read by the first start, and no other one needs it."""
    # A quick MLP stands in for what has such a file.
    monkeypatch.delitem(configuration.ONLY_RESNET50, "model.pretrained")
    config = module_config.copy_and_resolve_references()
    config.train_for = "1 epoch"
    train_and_evaluate(config, tmp_path)
    assert "note: " not in capsys.readouterr().err
    config.train_for = "2 epochs"
    config.model.pretrained = "moved.pth"
    train_and_evaluate(config, tmp_path)
    note = 'note: config.model.pretrained is "moved.pth"; this run started from "none"'
    assert capsys.readouterr().err.splitlines().count(note) == 1
    for saved in (read_run_record(tmp_path), read_checkpoint(tmp_path, TOTAL)[1]):
        assert saved["config"]["model"]["pretrained"] == "none"


def test_only_a_new_run_needs_its_weights(module_config, reference, tmp_path, monkeypatch):
    """Nor one whose only checkpoint was set aside by a process that was killed in that instant."""

    def missing(config):
        raise UserError("no weights")

    monkeypatch.setattr("cifar_jax.train.find_weights", missing)
    with pytest.raises(UserError, match="no weights"):
        train_and_evaluate(module_config, tmp_path / "new")
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    train_and_evaluate(module_config, workdir)
    shutil.rmtree(workdir / FOLDER / "45", ignore_errors=True)
    (workdir / FOLDER / str(TOTAL)).rename(workdir / f"{REPLACED}{TOTAL}")
    assert train_and_evaluate(module_config, workdir).step == TOTAL


def test_a_longer_run_goes_on_from_a_finished_one(module_config, tmp_path):
    config = module_config.copy_and_resolve_references()
    config.train_for = "1 epoch"
    train_and_evaluate(config, tmp_path)
    config.train_for = "2 epochs"
    result = train_and_evaluate(config, tmp_path)
    assert result.step == TOTAL and len(result.record["test_reads"]) == 2


def test_a_longer_run_without_a_test_has_no_result_of_the_shorter_one(module_config, tmp_path):
    config = module_config.copy_and_resolve_references()
    config.train_for = "1 epoch"
    assert train_and_evaluate(config, tmp_path).record["result"]["step"] == 45
    config.train_for, config.test = "2 epochs", False
    record = train_and_evaluate(config, tmp_path).record
    assert record["result"] is None and len(record["test_reads"]) == 1


def test_an_evaluation_after_a_stop_is_made_once(module_config, tmp_path, monkeypatch):
    """Also where it is not the best: the checkpoint of that step was saved before it."""
    with monkeypatch.context() as patch:
        send_in(patch, "evaluate", 2)  # of step 90
        train_and_evaluate(module_config, tmp_path)
    read = History.from_json
    with monkeypatch.context() as patch:
        patch.setattr(History, "from_json", lambda saved: read({**saved, "best_accuracy": 1.0}))
        train_and_evaluate(module_config, tmp_path)
    rows = read_rows(tmp_path)
    assert rows[-1]["event"] == "evaluation" and rows[-1]["validation_accuracy"] < 1
    monkeypatch.setattr(Loop, "evaluate", lambda *_: pytest.fail("evaluated again"))
    train_and_evaluate(module_config, tmp_path)
    assert read_rows(tmp_path) == rows


def test_a_shorter_run_is_refused(module_config, reference):
    config = module_config.copy_and_resolve_references()
    config.train_for = "1 epoch"
    with pytest.raises(UserError, match='train_for is "1 epoch", 45 steps;.*90 steps already'):
        train_and_evaluate(config, reference)


def test_another_configuration_or_data_is_refused_and_nothing_changes(
    module_config, reference, tmp_path, monkeypatch
):
    before = {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()}
    config = module_config.copy_and_resolve_references()
    config.optimizer.learning_rate = 0.5
    with pytest.raises(UserError, match="optimizer.learning_rate was 0.001 and is 0.5"):
        train_and_evaluate(config, reference)
    monkeypatch.setattr("cifar_jax.setup.fingerprint", lambda splits: "other")
    with pytest.raises(UserError, match="a run on other images or splits"):
        train_and_evaluate(module_config, reference)
    assert {p: p.stat().st_mtime_ns for p in reference.rglob("*") if p.is_file()} == before


def test_without_checkpoints_only_the_same_unfinished_run_starts_anew(
    module_config, reference, tmp_path
):
    """Killed before its first save, a run has a record and no more; that record names the run."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / FOLDER)
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    other = module_config.copy_and_resolve_references()
    other.seed = 9
    for config in (module_config, other):
        with pytest.raises(UserError, match="a finished run whose checkpoints are gone"):
            train_and_evaluate(config, workdir)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before
    update_run_record(workdir, result=None, weights={"source": "of the start that was killed"})
    with pytest.raises(UserError, match="seed was 0 and is 9"):
        train_and_evaluate(other, workdir)
    result = train_and_evaluate(module_config, workdir)
    assert result.step == TOTAL and result.record["weights"] is None
    assert_same_run(workdir, reference)


def test_a_result_of_another_step_is_not_reported(module_config, reference, tmp_path):
    """The last checkpoint is gone, the record still has its result: that is measured again."""
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    shutil.rmtree(workdir / FOLDER / str(TOTAL))
    wrong = {**read_run_record(workdir)["result"], "test_accuracy": 0.123}
    update_run_record(workdir, result=wrong)
    train_and_evaluate(module_config, workdir)
    assert_same_run(workdir, reference)


OURS = ["run.json", "metrics.jsonl", "metrics.csv", "curves.png", "tensorboard/x", "checkpoints/x"]


@pytest.mark.parametrize("name", OURS)
def test_files_of_somebody_else_are_left_alone(name, module_config, tmp_path):
    """They have our names, but no run's record says that they are ours."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("" if name == "metrics.jsonl" else "{}")
    with pytest.raises(
        UserError, match=f"holds {name.split('/')[0]}, but not the run.json of a run"
    ):
        train_and_evaluate(module_config, tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.name != ".lock"] == name.split("/")


@pytest.mark.parametrize("name", OURS[1:])
def test_a_file_for_a_folder_is_told_at_once(name, module_config, tmp_path):
    name, _, inside = name.partition("/")
    (tmp_path / name).write_text("") if inside else (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is (a|no) folder; a run writes a f"):
        train_and_evaluate(module_config, tmp_path)


@pytest.mark.parametrize("at", ["_restore", "_record_start", "open_recorder", "describe_start"])
def test_a_run_that_dies_in_its_first_instant_starts_again(
    at, module_config, reference, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"cifar_jax.train.{at}", kill)
        train_and_evaluate(module_config, tmp_path)
    train_and_evaluate(module_config, tmp_path)
    assert_same_run(tmp_path, reference)


@pytest.mark.parametrize("left", [0, 3])
def test_lost_rows_are_told_and_the_run_goes_on(left, module_config, tmp_path, capsys):
    config = module_config.copy_and_resolve_references()
    config.train_for = "1 epoch"
    train_and_evaluate(config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:left]))
    config.train_for = "2 epochs"
    for lacking in (f"lacks {4 - left} rows", None):  # told once: later checkpoints know
        rows = train_and_evaluate(config, tmp_path).rows
        told = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
        assert [row["step"] for row in rows][left:] == [60, 75, 90, 90]
        assert len(told) == 1 and lacking in told[0] if lacking else not told


def test_a_workdir_in_use_is_refused(module_config, tmp_path):
    with filelock.FileLock(tmp_path / ".lock"):
        with pytest.raises(UserError, match="in use by another run"):
            train_and_evaluate(module_config, tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(module_config, tmp_path):
    config = module_config.copy_and_resolve_references()
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e18
    config.schedule.warmup = "50 steps"  # the first epoch's checkpoint comes through
    config.checkpoint_every = "1 step"
    config.steps_per_call = 1
    with pytest.raises(RunError) as stopped:
        train_and_evaluate(config, tmp_path)
    step = find_step(tmp_path, "latest")
    text = str(stopped.value)
    assert f"last good checkpoint: step {step} in" in text.replace("The last", "last").replace(
        "checkpoint is", "checkpoint:"
    )
    arrays, _ = read_checkpoint(tmp_path, step)
    assert all(np.all(np.isfinite(array)) for array in arrays.values())


def test_a_nan_in_a_call_names_its_step_and_rate(module_config, tmp_path, monkeypatch):
    original = Loop.check_finite

    def poisoned(self, start, losses):
        losses = np.array(losses)
        if start == 60:
            losses[7:] = np.nan
        original(self, start, losses)

    monkeypatch.setattr(Loop, "check_finite", poisoned)
    with pytest.raises(RunError, match=r"loss is nan at step 67 \(learning rate 0.001\).*step 45"):
        train_and_evaluate(module_config, tmp_path)


def test_pmap_runs_the_same_recipe(module_config, reference, tmp_path):
    config = module_config.copy_and_resolve_references()
    config.execution = "pmap"
    train_and_evaluate(config, tmp_path)
    ours, theirs = (
        [r["train_loss"] for r in read_rows(w) if "train_loss" in r] for w in (tmp_path, reference)
    )
    assert ours == pytest.approx(theirs, rel=1e-3)  # float32, sums in another order
    ours, theirs = (read_checkpoint(w, TOTAL)[0] for w in (tmp_path, reference))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_a_training_set_on_the_device_changes_nothing(module_config, reference, tmp_path):
    config = module_config.copy_and_resolve_references()
    config.data.on_device = True
    train_and_evaluate(config, tmp_path)
    assert_same_run(tmp_path, reference)


def test_profile_writes_a_trace(module_config, tmp_path):
    train_and_evaluate(module_config, tmp_path, profile=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_of_too_few_calls_is_told(module_config, tmp_path, capsys):
    config = module_config.copy_and_resolve_references()
    config.train_for = "15 steps"
    train_and_evaluate(config, tmp_path, profile=True)
    assert "--profile: no trace" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def start_sleeper(before=""):
    code = (
        f"import signal, time\n{before}\nfrom cifar_jax.signals import StopSignal\n"
        "with StopSignal() as stop:\n    print('ready', flush=True)\n"
        "    while True:\n        time.sleep(.01)\n        print(stop.received, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    return process


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_leaves_at_once(first):
    process = start_sleeper()
    process.send_signal(first)
    said = process.stderr.readline() + process.stderr.readline()
    assert signal.Signals(first).name.encode() in said
    process.send_signal(signal.SIGHUP)  # not one to leave at: terminals send it twice
    for _ in range(20):
        assert process.stdout.readline()
    assert process.poll() is None  # a handled signal does not end the sleep
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGINT


def test_nohup_is_heeded():
    process = start_sleeper("signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    for _ in range(20):
        assert process.stdout.readline() == b"None\n"
    process.kill()
    process.communicate()


@pytest.mark.slow
def test_a_terminal_or_pipe_that_is_gone_does_not_end_the_run(module_config, tmp_path):
    """Its reader leaves after the first line; then, in another run, SIGHUP comes as well."""
    process = start_command(module_config, tmp_path / "pipe")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 128 + signal.SIGPIPE  # of the table, at the very end
    assert read_run_record(tmp_path / "pipe")["result"]["step"] == TOTAL

    config = module_config.copy_and_resolve_references()
    config.train_for = "10000 epochs"
    process = start_command(config, tmp_path / "hung up")
    for line in process.stdout:
        if "epoch 1:" in line:
            break
    process.stdout.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert find_step(tmp_path / "hung up", "latest") >= 45


def test_ctrl_c_prints_the_command_that_goes_on(module_config, tmp_path):
    config = module_config.copy_and_resolve_references()
    config.train_for = "10000 epochs"
    process = start_command(config, tmp_path)
    for line in process.stdout:
        if "epoch 1:" in line:
            break
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT
    step = find_step(tmp_path, "latest")
    assert f"saved at step {step}; to go on: " in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line(module_config, tmp_path):
    """The file system has room for the first epochs' rows, and not for many checkpoints."""
    config = module_config.copy_and_resolve_references()
    config.keep_checkpoints = 1000
    config.train_for = "1000 epochs"
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        process = start_command(config, small / "run")
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 1, output
        assert output.splitlines()[-1].startswith("error: ") and "o space left" in output
        assert "Traceback" not in output, output
        arrays, extra = read_checkpoint(small / "run", find_step(small / "run", "latest"))
        assert json.dumps(extra) and int(arrays["step"]) >= 45
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
