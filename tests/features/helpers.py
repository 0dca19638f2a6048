"""Small heads on features: their weights, configurations, commands and a stand-in backbone."""

import contextlib
import pathlib
import sys

import numpy as np

from cifar_jax import features, main
from cifar_jax.config import flatten
from cifar_jax.pretrained import ours
from cifar_jax.pretrained.names import Structure, shapes
from tests.references import weights
from tests.runs import ROOT

COUNT = 104  # of the sample's images: 76 train, 8 validate, 20 test
BATCH = 16
TOTAL = 8  # 2 epochs of 4 steps


def write_weights(path, *, factor=1.0):
    """A file of ours with a whole backbone of trained-like random weights."""
    values = {
        name: (weights.draw(name, shape) * (factor if name == "stem_conv.kernel" else 1)).astype(
            np.float32
        )
        for name, shape in shapes(Structure("torchvision")).items()
    }
    header = ours.Header(
        source="random", sha256="", md5="", naming="torchvision", variant="torchvision",
        preprocessing="torchvision", license="none",
    )  # fmt: skip
    ours.write(path, values, header)


def quick_program(images):
    """A stand-in for the network: some function of each image alone."""
    rows = images.reshape(len(images), 1, 1, -1)[..., :2048].astype(np.float32)
    return np.sin(rows / 50)


@contextlib.contextmanager
def without_weights(config):
    """Their file lies elsewhere meanwhile."""
    path = pathlib.Path(config.model.pretrained)
    path.rename(path.with_suffix(".elsewhere"))
    try:
        yield
    finally:
        path.with_suffix(".elsewhere").rename(path)


def cache_files(config, pattern="*.npy"):
    return sorted(pathlib.Path(config.data.directory, "features").glob(f"*/{pattern}"))


def cached(config):
    (path,) = cache_files(config)
    return np.load(path)


def changed(config, **changes):
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


CONFIG = f"--config={ROOT / 'configs' / 'resnet50_probe.py'}"


def run_command(module, arguments, capsys, monkeypatch):
    """Runs a command's main; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    for command in (features, main):
        monkeypatch.setattr(command, "set_up_logging", lambda: None)  # global, for a command
    capsys.readouterr()
    try:
        module.main()
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def flags_of(config, workdir):
    names = (
        *("data.source", "data.directory", "model.pretrained", "model.upsampling", "train_for"),
        *("batch_size", "eval_batch_size", "steps_per_call", "log_every"),
    )
    values = dict(flatten(config))
    return [CONFIG, f"--workdir={workdir}", *(f"--config.{name}={values[name]}" for name in names)]
