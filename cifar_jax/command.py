"""What the commands that train share: their flags, and how they end."""

import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from absl import flags
from ml_collections import config_flags

from cifar_jax.config import flatten
from cifar_jax.errors import LastingStream, UserError

if TYPE_CHECKING:  # it imports JAX, for which `--help` does not wait
    from cifar_jax.train import Result


SWITCHES = {
    "profile": "Write a trace of a few steps to WORKDIR/profile.",
    "test": "Read the test split too.",
}


def define_flags(names: Collection[str], argv: Sequence[str]) -> flags.FlagValues:
    """Returns the flags of a command that has a configuration, not yet parsed.

    Args:
      names: of them.
      argv: what will be parsed; which fields of the configuration are flags depends on it.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Configuration file, such as configs/mlp.py.",
        lock_config=True,
        flag_values=values,
        sys_argv=list(argv),
    )
    if "workdir" in names:
        flags.DEFINE_string(
            "workdir",
            None,
            "Folder for checkpoints, metrics, figure and record; a run found there goes on.",
            flag_values=values,
        )
    for name in SWITCHES.keys() & set(names):
        flags.DEFINE_bool(name, False, SWITCHES[name], flag_values=values)
    flags.DEFINE_bool("help", False, "Show this.", short_name="h", flag_values=values)
    return values


def parse_flags(
    doc: str, examples: Mapping[str, str], *, switch: str = "profile"
) -> flags.FlagValues:
    """Parses `sys.argv`; `--help` is answered here.

    Args:
      doc: what the command does, for `--help`.
      examples: a value for each flag that must be there.
      switch: the one of SWITCHES that the command has.

    Raises:
      UserError: one line, for a wrong flag, a missing file, an unknown key or a wrong type.
    """
    names = [*examples, switch]
    values, rest = read_flags(names, sys.argv)
    if values.help:
        show_help(values, doc, names)
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; every option is --NAME=VALUE")
    for name, example in examples.items():
        if not values[name].value:
            raise UserError(f"--{name} is missing; for example --{name}={example}")
    return values


def read_flags(names: Collection[str], argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """Parses a command line, and reads the configuration that it names.

    Args:
      names: of the flags, as `define_flags` takes them.
      argv: the program's name, and its arguments.

    Returns:
      The flags, and the arguments that are none.

    Raises:
      UserError: one line, for a wrong flag, a missing file, an unknown key or a wrong type.
    """
    argv = [_expand_home(argument) for argument in argv]
    try:
        values = define_flags(names, argv)
        rest = values(argv)[1:]
        if values.config is not None:
            values.config.keys()  # a file that could not be read says so only when it is used
    # A configuration file is a program: reading it may raise anything.
    except Exception as error:
        raise UserError(f"{_reason(error, argv)}; see --help") from error
    return values, rest


def _expand_home(argument: str) -> str:
    """A shell leaves the ~ of --config=~/own.py as it is."""
    name, equals, path = argument.partition("=")
    return name + equals + os.path.expanduser(path) if name.strip("-") == "config" else argument


def _reason(error: Exception, argv: Sequence[str]) -> str:
    """Puts what ml_collections says of a flag the way that a reader of it needs."""
    while isinstance(error, KeyError | AttributeError) and isinstance(error.args[0], KeyError):
        error = error.args[0]
    text = error.args[0] if isinstance(error, KeyError) else error  # its str is a repr
    text = " ".join(str(text).split())
    if isinstance(error, KeyError) and (unknown := _unknown_field(text, argv)):
        return unknown
    if match := re.match(r"flag --(config\.\S+)=.*: Failed to parse .* as a ConfigDict", text):
        name = match[1]
        return f"{name} is a group of fields; set one of them, as in --{name}.NAME=VALUE"
    text = re.sub(r"Traceback \(most recent call last\): .*?(?=\b\w+(Error|Exception): )", "", text)
    if "No module named 'configs'" in text:
        text += "; run it from the folder that holds configs/"
    return text


def _unknown_field(text: str, argv: Sequence[str]) -> str | None:
    """Says which of the flags has no field, where a lookup of its name has failed."""
    found = re.match(r"""'(\w+)'(?: Did you mean "(\w+)")?""", text)
    flag_names = [argument.partition("=")[0].lstrip("-") for argument in argv]
    for name in flag_names:
        if found and found[1] in name.split(".")[1:]:
            return f"{name} is no field" + (f" (did you mean {found[2]}?)" if found[2] else "")
    return None


def show_help(values: flags.FlagValues, doc: str, names: Sequence[str]) -> NoReturn:
    """Prints what the command does, its flags, and the fields of the configuration if given."""
    print(doc)
    for name in names:
        print(f"--{name}: {values[name].help}")
    if values.config is None:
        print("\nWith --config=FILE, --help lists the fields of that file too.")
    else:
        print("\nFields of this configuration:")
        for key, value in flatten(values.config):
            print(f"--config.{key}={value}")
    sys.stdout.flush()  # a reader that has left is noticed here
    sys.exit(0)


def end(result: "Result", workdir: str, *, module: str) -> None:
    """Prints what a run came to and what to type next; a stopped run ends the process.

    Args:
      result: of the run.
      workdir: as it was given.
      module: of the command, such as "cifar_jax.main".
    """
    from cifar_jax import report  # with what it imports, not needed for `--help`
    from cifar_jax.recording.recorder import CURVES

    if result.stopped_by is not None:
        saved = f"and saved at step {result.step}" if result.step else "before the first step"
        go_on = f"{python_command()} -m {module} {shlex.join(sys.argv[1:])}"
        print(f"stopped {saved}; to go on: {go_on}", file=LastingStream(sys.stderr))
        sys.exit(128 + result.stopped_by)
    print(report.notebook_table(result.record, result.rows))
    print(f"figure: {shlex.quote(f'{workdir}/{CURVES}')}; checkpoint: step {result.step}")
    predict = f"{python_command()} -m cifar_jax.predict"
    print(f"next: {predict} --workdir={shlex.quote(workdir)} PICTURE...")


def python_command() -> str:
    """Returns what to type for this interpreter: it may not be the one on the path."""
    inside = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if inside.startswith("..") else inside)
