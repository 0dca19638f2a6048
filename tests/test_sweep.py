"""Sweeps: real runs in processes of their own, ranked on validation."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from cifar_jax import sweep
from cifar_jax.errors import UserError
from cifar_jax.lock import locked
from cifar_jax.pretrained import ours
from cifar_jax.pretrained.names import Structure, shapes
from cifar_jax.recording.metrics_log import evaluation_rows, read_rows
from tests.port_sources import random_array
from tests.runs import ROOT

SWEEP = """
[slow]
optimizer.learning_rate = 1e-5

[fast]
train_for = "3 epochs"
optimizer.learning_rate = 1e-3
model.hidden_sizes = [32, 16]
"""
# Long enough to be stopped on its way, and quick to end afterwards.
LONG = """train_for = "150 epochs"
evaluate_every = "50 epochs"
log_every = "1 epoch"
checkpoint_every = "50 epochs"
"""
CONFIG = """
from configs import mlp

def get_config():
    config = mlp.get_config()
    config.data.source = "sample"
    config.train_for = "2 epochs"
    config.steps_per_call = 45
    return config
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    (tmp_path / "own.py").write_text(CONFIG)
    return [str(tmp_path / "sweep.toml"), f"--config={tmp_path / 'own.py'}"]


def records(workdir):
    return {
        name: json.loads((workdir / name / "run.json").read_text()) for name in ("slow", "fast")
    }


def test_runs_are_made_and_ranked_and_the_test_split_is_left(files, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "runs"
    shared = ["--config.label_smoothing=0.1", "--config.optimizer.learning_rate=9"]
    sweep.main([*files, f"--workdir={workdir}", *shared])
    told = capfd.readouterr()
    table = told.out.strip()
    assert table == (workdir / "sweep.md").read_text().strip()
    last = {
        name: evaluation_rows(read_rows(workdir / name))[-1]["validation_accuracy"]
        for name in ("slow", "fast")
    }
    first, second = sorted(last, key=last.get, reverse=True)
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    assert rows == [[f"| {name}", f"{last[name]:.4f}"] for name in (first, second)]
    assert f"evaluate --workdir={workdir / first} --split=test\n" in told.err
    for name, rate in (("slow", 1e-5), ("fast", 1e-3)):
        record = records(workdir)[name]
        assert record["config"]["optimizer"]["learning_rate"] == rate  # not the shared 9
        assert record["config"]["label_smoothing"] == 0.1
        assert not record.get("result") and not record.get("test_reads")
    assert records(workdir)["fast"]["config"]["model"]["hidden_sizes"] == [32, 16]


def test_the_ranking_is_by_validation_at_the_end(tmp_path):
    """Neither by the best epoch, nor by loss or training; a failed run stands last."""
    accuracies = {  # of training and validation, for two epochs
        "late": [(0.1, 0.5), (0.2, 0.7)],
        "early": [(0.8, 0.9), (0.9, 0.6)],
        "never": [],
        "failed": [(0.9, 0.95), (0.95, 0.99)],
    }
    for name, epochs in accuracies.items():
        (tmp_path / name).mkdir()
        rows = [
            {"step": 10 * n, "epoch": n, "event": "evaluation", "train_seconds": 60.0 * n}
            | {"train_accuracy": train, "validation_accuracy": validation}
            | {"train_loss": 1 - train, "validation_loss": validation}
            for n, (train, validation) in enumerate(epochs, start=1)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    ranking = sweep.rank(list(accuracies)[::-1], tmp_path, failed={"failed"})
    assert sweep.format_ranking(ranking).splitlines()[2:] == [
        "| late | 0.7000 | 2 | 0.7000 | 2 | 2.0 |",
        "| early | 0.6000 | 2 | 0.9000 | 1 | 2.0 |",
        "| failed | failed | - | - | - | - |",
        "| never | - | - | - | - | - |",
    ]


def test_other_flags_are_refused(files, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        sweep.main([*files, f"--workdir={tmp_path / 'runs'}", "--profile", "--config.seed=1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --profile\n" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flag", ["--config.nonsense.x=3", "--config.seed=x", "--config.test=True"])
def test_a_wrong_field_of_all_runs_is_told_before_the_first(files, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        sweep.main([*files, f"--workdir={tmp_path / 'runs'}", flag])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and flag.strip("-")[:11] in told and told.count("\n") == 1
    assert files[0] not in told  # no run of the file is to blame
    assert not (tmp_path / "runs").exists()


def test_the_example_of_the_help_starts(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(textwrap.dedent(sweep.__doc__.split("sets.\n")[1].split("Every run has")[0]))
    shared = [f"--config={ROOT / 'configs' / 'resnet50_cpu.py'}"]
    runs = sweep.read_sweep(path)
    assert list(runs) == ["slow", "frozen_stem", "head_only"]
    sweep.check_runs(runs, shared, path)


def test_a_head_that_has_no_use_for_a_field_is_told_before_the_first_run(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('[plain]\n\n[head]\ncommand = "features"\naugment.flip = true\n')
    runs = sweep.read_sweep(path)
    shared = [f"--config={ROOT / 'configs' / 'resnet50_probe.py'}"]
    with pytest.raises(UserError, match="head: config.augment.flip is True; features are"):
        sweep.check_runs(runs, shared, path)


def test_features_are_not_for_a_run_of_the_whole_model(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text('[plain]\n\n[whole]\nfreeze.features = "stage2"\n')
    shared = [f"--config={ROOT / 'configs' / 'resnet50_cpu.py'}"]
    with pytest.raises(UserError, match='whole: config.freeze.features is "stage2"; cifar_jax.f'):
        sweep.check_runs(sweep.read_sweep(path), shared, path)


@pytest.mark.slow
def test_a_failed_run_is_told_and_the_others_are_made(files, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "sweep.toml").write_text('[wrong]\n[right]\ntrain_for = "1 epoch"\n')
    (tmp_path / "runs" / "wrong").mkdir(parents=True)
    (tmp_path / "runs" / "wrong" / "checkpoints").write_text("a file where a folder is to be")
    with pytest.raises(SystemExit) as caught:
        sweep.main([*files, f"--workdir={tmp_path / 'runs'}"])
    told = capfd.readouterr()
    assert caught.value.code == 1
    assert "wrong: ended with exit code 2" in told.err and "1 of 2 runs failed" in told.err
    assert [line.split(" | ")[0] for line in told.out.splitlines()[2:]] == ["| right", "| wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_sweep_goes_on(files, tmp_path, number):
    """A signal to the sweep alone, during the first run: that saves; then both are made."""
    (tmp_path / "sweep.toml").write_text(SWEEP.replace("[slow]", "[slow]\n" + LONG))
    workdir = tmp_path / "runs"
    command = [sys.executable, "-m", "cifar_jax.sweep", *files, f"--workdir={workdir}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    metrics = workdir / "slow" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(number)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + number, told
    assert "stopped and saved" in told and not (workdir / "fast").exists()
    again = f"-m cifar_jax.sweep {' '.join(files)} --workdir={workdir}\n"
    assert told.endswith(again) and "the sweep goes on with: " in told
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    starts = [start["step"] for start in records(workdir)["slow"]["starts"]]
    assert len(starts) == 2 and 0 < starts[1] < 150 * 45


def test_a_run_that_outlived_its_sweep_stops_the_next_one(files, tmp_path, capsys):
    """Else it would count as failed, and another one as the best."""
    workdir = tmp_path / "runs"
    with locked(workdir / "slow", setting="--workdir"), pytest.raises(SystemExit) as caught:
        sweep.main([*files, f"--workdir={workdir}"])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and "slow is in use by another run; wait for it" in told
    assert not (workdir / "fast").exists() and not (workdir / sweep.RANKING_NAME).exists()


WAITER = """
import pathlib, signal, time
got = []
def note(number, _):
    got.append(number)
    pathlib.Path("noted").write_text(str(got))
signal.signal(signal.SIGINT, note)
pathlib.Path("ready").touch()
until = time.monotonic() + 60
while time.monotonic() < until and len(got) < 2:
    time.sleep(0.05)
"""
RUN_ALL = """
import pathlib
from cifar_jax import sweep
sweep.run_all({"a": ["waiter"]}, [], pathlib.Path("runs"))
"""


def test_a_second_signal_reaches_the_run_too(tmp_path):
    """The sweep leaves at once; a run that went on alone would be in a session of its own."""
    (tmp_path / "waiter.py").write_text(WAITER)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_ALL], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    while not (tmp_path / "noted").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    both = str([int(signal.SIGINT)] * 2)
    while (tmp_path / "noted").read_text() != both:
        assert time.monotonic() < until, "the run has not been told"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a", "expected a TOML file"),
        ("", "no runs in it"),
        ("rate = 1", '"rate" is no table with the name of a folder'),
        ('["../a"]\nseed = 1', '"../a" is no table with the name of a folder'),
        ('[""]\nseed = 1', '"" is no table'),
        ('["sweep.md"]\nseed = 1', '"sweep.md" is no table'),
        ('[a]\ncommand = "rm"', 'a.command is "rm"; expected main or features'),
        ("[a]\ntest = true", "a.test is set; a sweep leaves the test split unread"),
        # Told before the first run, whichever it is of.
        ("[a]\n[b]\noptimizer.lerning_rate = 1", "b: config.optimizer.lerning_rate is no field"),
        ("[a]\n[b]\nema_decay = 2.0", "b: config.ema_decay is 2.0; expected"),
        ('[a]\n[b]\nseed = "x"', "b: flag --config.seed=x"),
        ("[a]\n[b]\nbatch_size = 5000", "b: config.batch_size is 5000"),  # of 1,440 images
        (
            '[a]\n[b]\ntrain_for = "9 steps"\noptimizer.accumulate = 2',
            "b: config.optimizer.accumulate is 2",
        ),
        ('[a]\n[b]\nfreeze.layers = "dense9"', 'b: config.freeze.layers has "dense9"'),
        ('[a]\n[b]\nfreeze.layers = "dense1 dense2 dense3"', "which leaves nothing to train"),
        (
            '[a]\n[b]\nmodel.name = "resnet50"\nmodel.pretrained = "none.pth"',
            "b: config.model.pretrained: none.pth",
        ),
    ],
)
def test_a_wrong_file_is_one_line(files, tmp_path, capsys, text, expected):
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(SystemExit) as caught:
        sweep.main([*files, f"--workdir={tmp_path / 'runs'}"])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and expected in told and told.count("\n") == 1
    assert not (tmp_path / "runs").exists()


CHECK = """
import pathlib, sys

from jax._src import xla_bridge

from cifar_jax import sweep
from cifar_jax.errors import UserError

path = pathlib.Path(sys.argv[1])
runs = sweep.read_sweep(path)
try:
    sweep.check_files(runs, sweep.check_runs(runs, sys.argv[2:], path), path)
except UserError as error:
    print(error)
sys.exit(len(xla_bridge._backends))
"""
TRANSFER = """
[fits]
model.variant = "torchvision"

[other]
model.variant = "keras"
"""


def test_weights_that_do_not_fit_are_told_and_no_backend_starts(files, tmp_path):
    """It would take most of a GPU's memory from the runs."""
    weights = tmp_path / "w.safetensors"
    structure = Structure("torchvision")
    values = {name: random_array(name, shape) for name, shape in shapes(structure).items()}
    ours.write(weights, values, ours.Header("a", "0", "1", "test", *["torchvision"] * 2, "unknown"))
    path = tmp_path / "sweep.toml"
    path.write_text(TRANSFER)
    flags = ["name=resnet50", "head=pooled", f"pretrained={weights}"]
    command = [sys.executable, "-c", CHECK, *files, *(f"--config.model.{flag}" for flag in flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'{path}: other: config.model.variant is "keras", but {weights}')
