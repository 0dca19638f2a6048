"""The command line: bad input is one line and an exit code, and leaves nothing behind."""

import importlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cifar_jax import main
from cifar_jax.checkpoint import FOLDER, Checkpointer, read_checkpoint
from cifar_jax.command import python_command
from cifar_jax.config import RULES
from cifar_jax.data import sources
from cifar_jax.evaluate import evaluate
from cifar_jax.labels import CLASS_NAMES
from cifar_jax.predict import predict_image, predict_images
from cifar_jax.train import train_and_evaluate
from tests.runs import ROOT

MLP = "--config=configs/mlp.py"
SAMPLE = "--config.data.source=sample"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short finished run, to be copied and damaged."""
    from configs import mlp

    config = mlp.get_config()
    config.data.source = "sample"
    config.train_for = "2 steps"
    workdir = tmp_path_factory.mktemp("finished")
    train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture
def place(tmp_path, finished, monkeypatch):
    """A folder with a copy of a run, a picture, and odd files; the project is importable there."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "text.txt").write_text("not a picture")
    (tmp_path / "syntax.py").write_text("def get_config(:\n")
    (tmp_path / "no_function.py").write_text("x = 1\n")
    (tmp_path / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (tmp_path / "own.py").write_text(
        "from configs import mlp\n"
        "def get_config():\n    c = mlp.get_config()\n    del c.optimizer.decay\n    return c\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def truncate_checkpoint(place):
    for file in (place / "run" / FOLDER / "2" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-9])


def other_model_in_checkpoint(place):
    """A checkpoint that is whole, and whose configuration belongs to another model."""
    arrays, extra = read_checkpoint(place / "run", 2)
    extra["config"]["model"]["hidden_sizes"] = [32]
    checkpointer = Checkpointer(place / "run", keep=2)
    checkpointer.save(2, arrays, extra, accuracy=None)
    checkpointer.wait()
    checkpointer.close()


def data_file(name, content):
    """Puts a damaged file where the data is looked for."""

    def put(place):
        (place / "data").mkdir()
        (place / "data" / name).write_bytes(content)

    return put


def cut_metrics(place):
    (place / "run" / FOLDER / "2" / "metrics" / "metrics").write_text("")


def nothing(place):
    pass


# name: (module, arguments, what is done to the folder first, what the line must say)
DATA = [MLP, "--workdir=new", "--config.data.directory=data"]
TRAIN = [MLP, "--workdir=new", SAMPLE]
LOST = "raise ModuleNotFoundError(\"No module named 'configs'\")"
CASES = {
    "no arguments": ("main", [], nothing, "--config is missing"),
    "no workdir": ("main", [MLP], nothing, "--workdir is missing"),
    "empty workdir": ("main", [MLP, "--workdir="], nothing, "--workdir is missing"),
    "home of nobody": ("main", [MLP, "--workdir=~nobody_of_that_name/x", SAMPLE], nothing, "user"),
    "too long a name": (
        "main", [MLP, f"--workdir={'x' * 300}", SAMPLE], nothing, "File name too long",
    ),
    "unknown flag": ("main", [*TRAIN, "--wrkdir=x"], nothing, "wrkdir"),
    "loose argument": ("main", [*TRAIN, "configs/mlp.py"], nothing, "unexpected argument"),
    "no such config": ("main", ["--config=nope.py", "--workdir=new"], nothing, "nope.py"),
    "config is a folder": ("main", ["--config=configs", "--workdir=new"], nothing, "configs"),
    "config with a syntax error": (
        "main", ["--config=syntax.py", "--workdir=new"], nothing, "syntax.py",
    ),
    "config without get_config": (
        "main", ["--config=no_function.py", "--workdir=new"], nothing, "get_config",
    ),
    "config that raises": ("main", ["--config=raises.py", "--workdir=new"], nothing, "division"),
    "config without a field": (
        "main", ["--config=own.py", "--workdir=new"], nothing, "config.optimizer.decay is missing",
    ),
    "a group of fields": (
        "main", [MLP, "--workdir=new", "--config.data=sample"], nothing,
        "error: config.data is a group of fields; set one of them, as in --config.data.NAME=VALUE",
    ),
    "an argument for a config that takes none": (
        "main", ["--config=configs/mlp.py:x", "--workdir=new"], nothing,
        "parsing config file: TypeError: get_config() takes 0",
    ),
    "norms that keep the statistics of no file": (
        "main", ["--config=configs/resnet50_cpu.py", *TRAIN[1:], "--config.model.pretrained=none"],
        nothing, "set config.model.batch_norm=train",
    ),
    "a frozen part for features": (
        "main", [*TRAIN, "--config.freeze.features=stage2"], nothing,
        "here config.freeze.layers names what does not learn",
    ),
    "accuracy of a checkpoint is cut": (
        "evaluate", ["--workdir=run", "--checkpoint=best"], cut_metrics, "metrics is damaged",
    ),
    "config from another folder": (
        "main", ["--config=lost.py", "--workdir=new"],
        lambda place: (place / "lost.py").write_text(LOST),
        "run it from the folder that holds configs/",
    ),
    "unknown key": (
        "main", [*TRAIN, "--config.batch_sze=3"], nothing,
        "error: config.batch_sze is no field (did you mean batch_size?); see --help",
    ),
    "unknown nested key": (
        "main", [*TRAIN, "--config.optimizer.rho=3"], nothing,
        "error: config.optimizer.rho is no field; see --help",
    ),
    "unknown group": (
        "main", [*TRAIN, "--config.nonsense.x=3"], nothing,
        "error: config.nonsense.x is no field; see --help",
    ),
    "batch is a word": ("main", [*TRAIN, "--config.batch_size=many"], nothing, "config.batch_size"),
    "batch is a fraction": ("main", [*TRAIN, "--config.batch_size=1.5"], nothing, "batch_size"),
    "batch 0": ("main", [*TRAIN, "--config.batch_size=0"], nothing, "config.batch_size is 0"),
    "batch above the images": (
        "main", [*TRAIN, "--config.batch_size=2000"], nothing, "at most the 1440 training images",
    ),
    "batch not shared by 8": ("main", [*TRAIN, "--config.batch_size=12"], nothing, "8 devices"),
    "eval batch not shared by 8": (
        "main", [*TRAIN, "--config.eval_batch_size=9"], nothing, "config.eval_batch_size is 9",
    ),
    "negative rate": (
        "main", [*TRAIN, "--config.optimizer.learning_rate=-1"], nothing, "learning_rate is -1.0",
    ),
    "rate is NaN": (
        "main", [*TRAIN, "--config.optimizer.learning_rate=nan"], nothing, "learning_rate is nan",
    ),
    "unknown optimizer": (
        "main", [*TRAIN, "--config.optimizer.name=lion"], nothing,
        "one of rmsprop, sgd, adam, adamw",
    ),
    "momentum of 1": ("main", [*TRAIN, "--config.optimizer.momentum=1.0"], nothing, "below 1"),
    "unknown schedule": ("main", [*TRAIN, "--config.schedule.name=step"], nothing, "cosine"),
    "warm-up above the run": (
        "main", [*TRAIN, "--config.schedule.warmup=99 epochs"], nothing, "config.schedule.warmup",
    ),
    "unknown model": ("main", [*TRAIN, "--config.model.name=vgg"], nothing, "config.model.name"),
    "unknown execution": ("main", [*TRAIN, "--config.execution=xmap"], nothing, "jit, pmap"),
    "unknown source": ("main", [*TRAIN, "--config.data.source=web"], nothing, "auto, sample, tfds"),
    "unknown protocol": ("main", [*TRAIN, "--config.data.protocol=kaggle"], nothing, "standard"),
    "unknown precision": ("main", [*TRAIN, "--config.matmul_precision=low"], nothing, "highest"),
    "hidden size 0": (
        "main", [*TRAIN, "--config.model.hidden_sizes=(64, 0)"], nothing, "hidden_sizes",
    ),
    "seed too large": ("main", [*TRAIN, f"--config.seed={2**40}"], nothing, "config.seed"),
    "duration without a unit": (
        "main", [*TRAIN, "--config.train_for=10"], nothing, '"10 epochs" or "500 steps"',
    ),
    "duration of nothing": (
        "main", [*TRAIN, "--config.train_for=0 epochs"], nothing, "less than one step",
    ),
    "period below a step": (
        "main", [*TRAIN, "--config.log_every=0.001 epochs"], nothing, "config.log_every",
    ),
    "workdir is a file": (
        "main", [MLP, "--workdir=text.txt", SAMPLE], nothing, "text.txt",
    ),
    "workdir below a file": (
        "main", [MLP, "--workdir=text.txt/run", SAMPLE], nothing, "text.txt",
    ),
    "data directory is a file": (
        "main", [MLP, "--workdir=new", "--config.data.directory=text.txt"], nothing, "text.txt",
    ),
    "run of another config": (
        "main", [MLP, "--workdir=run", SAMPLE, "--config.train_for=2 steps", "--config.seed=9"],
        nothing, "seed was 0 and is 9",
    ),
    "the only checkpoint is damaged": (
        "main", [MLP, "--workdir=run", SAMPLE, "--config.train_for=2 steps"], truncate_checkpoint,
        "none of the checkpoints [2] can be read",
    ),
    "run.json is damaged": (
        "main", [MLP, "--workdir=run", SAMPLE, "--config.train_for=2 steps"],
        lambda place: (place / "run" / "run.json").write_text("{"), "run.json",
    ),
    "metrics.jsonl is damaged": (
        "main", [MLP, "--workdir=run", SAMPLE, "--config.train_for=2 steps"],
        lambda place: (place / "run" / "metrics.jsonl").write_text("?\n{}\n"), "metrics.jsonl",
    ),
    "predict without a run": (
        "predict", ["--workdir=nowhere", "black.png"], nothing, "nowhere",
    ),
    "predict with a damaged checkpoint": (
        "predict", ["--workdir=run", "black.png"], truncate_checkpoint, "is damaged",
    ),
    "predict with another model's checkpoint": (
        "predict", ["--workdir=run", "black.png"], other_model_in_checkpoint,
        "does not fit the model",
    ),
    "predict a missing picture": ("predict", ["--workdir=run", "no.png"], nothing, "no.png"),
    "predict a text": ("predict", ["--workdir=run", "text.txt"], nothing, "text.txt"),
    "predict a folder": ("predict", ["--workdir=run", "configs"], nothing, "configs"),
    "predict the best of none": (
        "predict", ["--workdir=run", "--checkpoint=best", "black.png"],
        lambda place: shutil.rmtree(place / "run" / FOLDER / "2" / "metrics"), "no best checkpoint",
    ),
    "evaluate without a run": ("evaluate", ["--workdir=nowhere"], nothing, "nowhere"),
    "evaluate with a damaged checkpoint": (
        "evaluate", ["--workdir=run"], truncate_checkpoint, "is damaged",
    ),
    "data: a batch is cut": (
        "main", DATA, data_file("data_batch_1.bin", b"\x01" * 1000), "data_batch_1.bin",
    ),
    "data: a pickle that calls": (
        "main", DATA, data_file("data_batch_1", b"cos\nsystem\n(S'true'\ntR."), "data_batch_1",
    ),
    "data: an archive that is none": (
        "main", DATA, data_file("cifar-10-binary.tar.gz", b"nothing"), "cifar-10-binary.tar.gz",
    ),
    "data: Kaggle's labels without pictures": (
        "main", DATA, data_file("trainLabels.csv", b"id,label\n1,frog\n"), "data",
    ),
    "a run longer than asked for": (
        "main", [MLP, "--workdir=run", SAMPLE, "--config.train_for=1 step"], nothing,
        "2 steps already",
    ),
    "a flag file that is not there": ("main", ["--flagfile=nope"], nothing, "nope"),
    "more steps than can be counted": (
        "main", [*TRAIN, "--config.train_for=100000000 epochs"], nothing, "at most 2147483647",
    ),
    "keep one checkpoint": (
        "main", [*TRAIN, "--config.keep_checkpoints=1"], nothing, "from 2 to",
    ),
    "report without a run": ("report", ["nowhere"], nothing, "nowhere"),
    "report on a damaged record": (
        "report", ["run"], lambda place: (place / "run" / "run.json").write_text("[]"), "run.json",
    ),
}  # fmt: skip


def run_command(module, arguments, capsys, monkeypatch):
    """Runs a command's main; returns its exit code and what it wrote to standard error."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    # ml_collections gives every configuration file the same module name.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    for command in ("main", "features"):  # global, for a command
        monkeypatch.setattr(f"cifar_jax.{command}.set_up_logging", lambda: None)
    capsys.readouterr()
    try:
        importlib.import_module(f"cifar_jax.{module}").main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, capsys.readouterr().err


def contents(folder):
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p: p.read_bytes() for p in files if p.suffix != ".pyc" and "lock" not in p.name}


def test_the_table_is_large_enough():
    assert len(CASES) >= 40


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see errors.py
@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_changes_nothing(case, place, capsys, monkeypatch):
    module, arguments, prepare, said = CASES[case]
    prepare(place)
    before = contents(place)
    code, errors = run_command(module, arguments, capsys, monkeypatch)
    lines = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], errors
    assert contents(place) == before
    assert not list(place.rglob("*tmp*"))


@pytest.mark.parametrize("flag", ["--config=", "-config="])
def test_a_configuration_in_the_home_folder_is_found(flag, place, capsys, monkeypatch):
    """With a field that only this file lacks; other fields are read behind it, as ever."""
    monkeypatch.setenv("HOME", str(place))
    arguments = [f"{flag}~/own.py", "--workdir=new", "--config.seed=3"]
    code, errors = run_command("main", arguments, capsys, monkeypatch)
    assert code == 2 and errors.startswith("error: config.optimizer.decay is missing")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_quick_and_names_every_field(flag):
    """No time is taken: what makes a command slow to answer is what it imports."""
    code = (
        "import sys\nfrom cifar_jax import main\n"
        f"sys.argv = ['main', '--config=configs/mlp.py', {flag!r}]\n"
        "try: main.main()\n"
        "except SystemExit as stopped: assert stopped.code == 0\n"
        "slow = {'jax', 'flax', 'tensorflow', 'matplotlib', 'orbax'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key in RULES:
        assert f"--config.{key}=" in done.stdout


def test_a_prediction_does_not_import_tensorflow(place):
    code = (
        "import sys\nfrom cifar_jax.predict import predict_image\n"
        "print(predict_image('black.png', workdir='run'))\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in CLASS_NAMES


def call(module, *arguments, **environment):
    """Runs a command in a process of its own; returns its exit code and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", f"cifar_jax.{module}", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("predict", ["black.png"]), ("evaluate", []), ("average", ["a.safet"])],
)
def test_without_a_device_no_checkpoint_is_called_damaged(module, arguments, place):
    workdir = ["run"] if module == "average" else ["--workdir=run"]
    arguments = [each.replace(".safet", ".safetensors") for each in arguments]
    code, told = call(module, *workdir, *arguments, JAX_PLATFORMS="cuda")
    assert code == 2 and told.startswith("error: JAX finds no device") and told.count("\n") == 1


@pytest.mark.parametrize("module", ["predict", "evaluate"])
def test_a_damaged_checkpoint_is_one_line_to_its_readers(module, place):
    truncate_checkpoint(place)
    code, told = call(module, "--workdir=run", *(["black.png"] if module == "predict" else []))
    assert code == 2 and told.count("\n") == 1
    assert "/2 is damaged (" in told and "restore it from a backup" in told


def test_a_run_is_evaluated_in_any_folder(place, monkeypatch):
    """A relative folder of images is that of the run; another one can be named."""
    (place / "images").mkdir()
    arguments = [*TRAIN, "--config.data.directory=images", "--config.train_for=2 steps"]
    code, told = call("main", *arguments, JAX_PLATFORMS="cpu")
    assert code == 0, told
    extra = read_checkpoint(place / "new", 2)[1]
    assert extra["config"]["data"]["directory"] == str(place / "images")
    loaded = []

    def load(source, directory):
        loaded.append((source, str(directory)))
        return sources.load("sample")

    monkeypatch.setattr("cifar_jax.setup.load", load)
    evaluate("new")
    evaluate("new", directory="elsewhere")
    assert loaded == [("sample", str(place / "images")), ("sample", "elsewhere")]


def test_prediction_is_the_notebooks_recipe(place):
    """Open, RGB, resize, scale, argmax: written out in NumPy from the checkpoint's arrays."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (8, 9, 3)), np.ones((20, 20, 1))).astype(np.uint8)
    Image.fromarray(pixels).save(place / "blocks.png")
    arrays, _ = read_checkpoint(place / "run", 2)
    x = np.asarray(Image.open(place / "blocks.png").convert("RGB").resize((32, 32)))
    x = x.reshape(-1).astype(np.float64) / 255
    for i in (1, 2, 3):
        x = x @ arrays[f"params.dense{i}.kernel"] + arrays[f"params.dense{i}.bias"]
        x = np.maximum(x, 0) if i < 3 else x
    expected = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    (answer,) = predict_images(["blocks.png"], workdir="run")
    found = [answer["probabilities"][name] for name in CLASS_NAMES]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert predict_image("blocks.png", workdir="run") == CLASS_NAMES[int(expected.argmax())]


def test_a_whole_command_ends_with_the_table_and_the_next_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cifar_jax.main.set_up_logging", lambda: None)
    workdir = f"'{tmp_path}/my run'"
    arguments = [MLP, f"--workdir={tmp_path}/my run", SAMPLE, "--config.train_for=45 steps"]
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    main.main()
    output = capsys.readouterr().out
    assert "notebook        0.3748      0.3550" in output and "SAMPLE" in output
    assert f"next: {python_command()} -m cifar_jax.predict --workdir={workdir}" in output
    assert f"figure: '{tmp_path}/my run/curves.png'; " in output


DROPPED_FAILURE = """
import asyncio, sys
from cifar_jax.errors import set_up_logging

async def fail():
    raise ValueError("no space left")

async def drop():
    asyncio.ensure_future(fail())
    await asyncio.sleep(0.01)

if sys.argv[1:]:
    set_up_logging()
asyncio.run(drop())
"""


@pytest.mark.parametrize("arguments", [[], ["quiet"]])
def test_failures_that_orbax_drops_do_not_follow_the_error_line(arguments):
    """Of several writes that fail it reports one; Python tells of the others at exit."""
    command = [sys.executable, "-c", DROPPED_FAILURE, *arguments]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stderr
    assert ("no space left" in told) != bool(arguments)
