"""What `make` hands to the commands, with an interpreter that only notes what it was given."""

import shutil
import subprocess

import pytest

from tests.runs import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
PYTHON = """#!/bin/sh
case "$*" in *fetch_data*) echo "$*" > "${NOTED%noted}asked"; echo "$SOURCE"; exit;; esac
for argument; do echo "$argument"; done > "$NOTED"
exit "$CODE"
"""


@pytest.fixture
def make(tmp_path):
    """A function: what follows `make`, how the command ends -> its arguments, make's messages."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "installed").touch()

    def run(*arguments, code=0, source="auto"):
        noted = tmp_path / "noted"
        environment = {"PATH": "/usr/bin:/bin", "NOTED": noted, "CODE": str(code), "SOURCE": source}
        command = [shutil.which("make"), f"VENV={tmp_path}", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, "FLAGS": "-O2"}, capture_output=True, text=True
        )
        assert (done.returncode != 0) == (code != 0)
        return noted.read_text().splitlines(), done.stderr

    return run


@pytest.mark.parametrize(
    ("target", "source"), [("transfer", "auto"), ("train", "auto"), ("train", "sample")]
)
def test_further_flags_come_last(target, source, make):
    """So that they win over those of the target itself, --workdir among them."""
    usual, _ = make(target, source=source)
    longer, errors = make(target, "FLAGS=--config.seed=1 --workdir=runs/other", source=source)
    assert longer == [*usual, "--config.seed=1", "--workdir=runs/other"] and errors == ""
    assert "-O2" not in usual  # of the environment: somebody else's


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ("", "-m cifar_jax.fetch_data --or-sample"),
        (
            "--config.seed=1 --config.data.directory=/data",
            "-m cifar_jax.fetch_data --or-sample --directory=/data",
        ),
        ("--config.data.source=sample", None),
        ("--config.data.source=tfds", None),
    ],
)
def test_the_data_is_looked_for_where_the_flags_say(flags, asked, make, tmp_path):
    arguments, _ = make("train", f"FLAGS={flags}", source="auto")
    noted = tmp_path / "asked"
    assert (noted.read_text().strip() if noted.exists() else None) == asked
    assert ("--workdir=runs/mlp-sample" in arguments) == ("sample" in flags)


def test_a_file_of_weights_may_have_a_space_in_its_name(make):
    assert (
        "--config.model.pretrained=my weights.pth" in make("transfer", "WEIGHTS=my weights.pth")[0]
    )


@pytest.mark.parametrize(("code", "told"), [(2, True), (1, False), (130, False)])
def test_bad_input_ends_with_what_make_takes(code, told, make):
    """The command before it speaks of its own flags."""
    _, errors = make("transfer", code=code)
    assert ("make transfer WEIGHTS=FILE FLAGS=" in errors) == told
    assert f"Error {code}" in errors
