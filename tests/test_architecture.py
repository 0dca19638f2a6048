"""The shape of the code: imports go downwards, TensorFlow stays in its place, files stay short."""

import ast
import re

import pytest

from tests.runs import ROOT

PACKAGE = ROOT / "cifar_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def rows_of_the_readme():
    """By module or folder the number of its row in the README's table of the code."""
    table = (ROOT / "README.md").read_text().partition("| file | |")[2].partition("\n\n")[0]
    return {
        name: number
        for number, row in enumerate(table.splitlines())
        for name in re.findall(r"`(\w+)(?:\.py|/)`", row.split("|")[1] if "|" in row else "")
    }


# A module imports only from its own row or from rows below it.
LEVEL = rows_of_the_readme() | {"__init__": 999}


def imported_modules(path):
    """Yields (module, whether at the top of the file) for every import of a file."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from ((name, node in tree.body) for name in names)


def test_every_module_has_a_row():
    assert {part(path) for path in FILES} == LEVEL.keys()


def part(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    for module, _ in imported_modules(path):
        names = module.split(".")
        if names[0] == "cifar_jax" and len(names) > 1 and names[1] in LEVEL:
            assert LEVEL[names[1]] >= LEVEL[part(path)], f"{path.name} imports {module}"
        assert names[0] not in ("configs", "experiments", "tests"), f"{path.name} imports {module}"


def names_of(path):
    """What another module can import from a file: what its top level defines, and its folder."""
    if not path.exists():  # a folder without __init__.py
        return {each.stem for each in path.parent.iterdir()}
    names = {each.stem for each in path.parent.iterdir()} if path.name == "__init__.py" else set()
    nodes = ast.parse(path.read_text()).body
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        else:
            nodes.extend(ast.iter_child_nodes(node))
    return names


def file_of(module):
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


OWN = ("cifar_jax", "configs", "experiments", "tests")
EVERY_FILE = [path for folder in OWN for path in sorted((ROOT / folder).rglob("*.py"))]


def test_what_is_imported_exists():
    """Also inside functions, and in experiments that no test runs."""
    missing = []
    for path in EVERY_FILE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OWN:
                known = names_of(file_of(node.module))
                for alias in node.names:
                    if alias.name != "*" and alias.name not in known:
                        missing.append(f"{path.relative_to(ROOT)}: {node.module}.{alias.name}")
    assert missing == []


def test_tensorflow_is_imported_late_and_only_to_feed():
    users = {}
    for path in FILES:
        for module, at_top in imported_modules(path):
            if module.split(".")[0] in ("tensorflow", "tensorflow_datasets"):
                users.setdefault(module.split(".")[0], set()).add(str(path.relative_to(PACKAGE)))
                assert not at_top, f"{path.name} imports {module} when it is imported"
    tfds_users = {"data/png_formats.py", "write_tfds.py"}  # the TFDS reader and writer
    assert users["tensorflow"] <= {"data/pipeline.py"} | tfds_users
    assert users["tensorflow_datasets"] <= tfds_users | {"data/sources.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_public_functions_have_docstrings_and_hints(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, path.name
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    for scope in (tree, *classes):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
                arguments = [*node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None]
                assert set(bare) <= {"self", "cls"}, f"{path.name}: {node.name} {bare}"
