"""Freed memory is kept: the same block again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from cifar_jax import average, evaluate, features, knn, main
from cifar_jax.errors import UserError

PROGRAM = """
import resource
import numpy as np
from cifar_jax.memory import keep_freed_memory, release_freed_memory

if {keep}:
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def fill():
    block = np.empty(64 << 20, np.uint8)
    block[:] = 1
    return faults()

fill()
before = faults()
for _ in range(4):
    fill()
    if {release}:
        release_freed_memory()
print(faults() - before)
"""


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def page_faults(keep: bool, release: bool = False, tunables: str = "") -> int:
    command = [sys.executable, "-c", PROGRAM.format(keep=keep, release=release)]
    options = {"capture_output": True, "text": True, "check": True}
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    return int(subprocess.run(command, env=environment, **options).stdout)


@glibc
def test_freed_memory_is_kept():
    # Measured: none, and 2,176: numpy asks for huge pages, else there were 65,536.
    assert page_faults(keep=True) < 20
    assert page_faults(keep=False) > 100


@glibc
def test_kept_memory_can_be_released():
    assert page_faults(keep=True, release=True) > 100


@glibc
def test_it_is_given_back_where_the_user_asks_for_large_pages():
    assert page_faults(keep=True, tunables="glibc.malloc.hugetlb=1") > 100


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (main, ["--config=configs/mlp.py", "--workdir=unused"]),
        (features, ["--config=configs/resnet50_probe.py", "--workdir=unused"]),
        (knn, ["--config=configs/resnet50_probe.py"]),
        (evaluate, ["--workdir=unused"]),
        (average, ["unused", "unused.safetensors"]),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else "",
)
def test_commands_that_compute_keep_it(command, flags, monkeypatch, capsys):
    def kept():
        raise UserError("kept")

    monkeypatch.setattr(command, "keep_freed_memory", kept)
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit):
        command.main()
    assert "error: kept" in capsys.readouterr().err
