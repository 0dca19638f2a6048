"""Running the command in a process of its own, and comparing runs bit for bit."""

import os
import pathlib
import subprocess
import sys

import numpy as np

from cifar_jax.checkpoint import find_step, read_checkpoint
from cifar_jax.config import flatten
from cifar_jax.recording.metrics_log import read_rows
from cifar_jax.recording.run_record import read_run_record

ROOT = pathlib.Path(__file__).parent.parent


def start_command(config, workdir, **options) -> subprocess.Popen:
    """Starts `python -m cifar_jax.main` on a configuration that differs from configs/mlp.py."""
    changes = [
        f"--config.{key}={tuple(value) if isinstance(value, list) else value}"
        for key, value in flatten(config)
    ]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "cifar_jax.main", "--config=configs/mlp.py"),
            *(f"--workdir={workdir}", *changes),
        ],
        cwd=ROOT,
        # As in the test process: the same devices give the same bits.
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "train_seconds"}


def assert_same_run(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """Compares arrays, metrics and result of two finished runs, times aside."""
    for which in ("latest", "best"):
        step = find_step(workdir, which)
        assert step == find_step(reference, which)
        ours, theirs = (read_checkpoint(folder, step)[0] for folder in (workdir, reference))
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name, strict=True)
    ours, theirs = ([without_times(r) for r in read_rows(w)] for w in (workdir, reference))
    assert ours == theirs
    ours, theirs = (without_times(read_run_record(w)["result"]) for w in (workdir, reference))
    assert ours == theirs
