"""What the README shows runs as it stands, and the experiments' commands are read as they stand."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_jax import config as configuration
from cifar_jax.command import read_flags
from cifar_jax.errors import UserError
from cifar_jax.sweep import check_runs, read_sweep
from tests.runs import ROOT

README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "(3072, 64)" in capsys.readouterr().out


def test_every_command_and_file_of_the_readme_exists():
    modules = set(re.findall(r"python -m (cifar_jax\.\w+)", README))
    assert {"cifar_jax.main", "cifar_jax.predict"} <= modules
    files = [f"{module.replace('.', '/')}.py" for module in modules]
    files += re.findall(r"\]\(([\w/.]+)\)", README)
    assert [file for file in files if not (ROOT / file).exists()] == []


def commands(text):
    """Yields the arguments of each command of a page that has a configuration."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        found = re.match(r"(?:\w+=\S+ )*python -m (cifar_jax\.\w+ .*--config=.*)", line.strip())
        if found:
            yield shlex.split(found[1].replace(" ...", ""), comments=True)


def check(module, *arguments):
    values, rest = read_flags(["config", "workdir", "profile", "test"], [module, *arguments])
    configuration.check(values.config)
    if module == "cifar_jax.sweep":
        path = Path(rest.pop(0))
        if path.exists():  # the README's is the reader's own
            shared = [each for each in arguments if each.startswith("--config")]
            check_runs(read_sweep(path), shared, path)
    elif module != "cifar_jax.main":
        configuration.check_features(configuration.to_dict(values.config))
    assert not rest


PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("experiments/*/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_what_their_commands_take(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for arguments in commands((ROOT / page).read_text()):
        check(*arguments)


def test_a_wrong_command_of_a_page_is_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    every = [each for page in PAGES for each in commands((ROOT / page).read_text())]
    assert len(every) > 25
    for wrong in ("--config.sed=1", "--config.train_for=1", "--config.model.batch_norm=thawed"):
        with pytest.raises(UserError, match=wrong.split("=")[0].strip("-")):
            check(*every[0], wrong)
