"""What the README shows runs as it stands."""

import re

import numpy as np
from PIL import Image

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
