"""Compare recipes: run a file of overrides, one after the other, and rank them on validation.

    python -m cifar_jax.sweep sweep.toml --config=configs/resnet50_cpu.py --workdir=runs/rates

The file is TOML: a table for each run, with its name and the fields that it sets.

    [slow]
    optimizer.learning_rate = 0.003

    [frozen_stem]
    optimizer.learning_rate = 0.03
    freeze.layers = "stem"

    [head_only]
    command = "features"                # cifar_jax.features instead of cifar_jax.main:
    progressive = ""                    # of each image once, as it is
    augment.flip = false
    model.test_time_flip = false
    optimizer.learning_rate = 0.001

Every run has a folder in WORKDIR and is what its own command would have made, but that the test
split is left unread: the ranking in WORKDIR/sweep.md is by validation alone, at the end of each
run. The same command goes on where a stopped one left off. Read the test split of the winner, once:
python -m cifar_jax.evaluate --workdir=WORKDIR/NAME --split=test
"""

import argparse
import contextlib
import dataclasses
import functools
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar_jax import config as configuration
from cifar_jax.command import python_command, read_flags
from cifar_jax.errors import RunError, UserError, exit_on_user_error, tell
from cifar_jax.lock import locked
from cifar_jax.recording.files import write_atomically
from cifar_jax.recording.metrics_log import evaluation_rows, read_rows
from cifar_jax.signals import StopSignal

COMMANDS = ("main", "features")
RANKING_NAME = "sweep.md"


def read_sweep(path: Path) -> dict[str, list[str]]:
    """Reads a file of overrides.

    Returns:
      By run, the end of its command: module and flags.

    Raises:
      UserError: the file is missing, no TOML, or holds anything but tables of fields.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a TOML file, see --help") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}; expected a TOML file, see --help") from error
    if not tables:
        raise UserError(f"{path}: no runs in it; expected a table for each, see --help")
    return {name: _arguments(path, name, table) for name, table in tables.items()}


def _arguments(path: Path, name: str, table: Any) -> list[str]:
    if not isinstance(table, dict) or not re.fullmatch(r"\w[\w.-]*", name) or name == RANKING_NAME:
        raise UserError(f'{path}: "{name}" is no table with the name of a folder; see --help')
    if table.get("test"):
        raise UserError(f"{path}: {name}.test is set; a sweep leaves the test split unread")
    command = table.pop("command", COMMANDS[0])
    if command not in COMMANDS:
        raise UserError(f'{path}: {name}.command is "{command}"; expected {" or ".join(COMMANDS)}')
    flags = [f"--config.{key}={value}" for key, value in _fields(table)]
    return [f"cifar_jax.{command}", *flags]


def _fields(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, tuple(value) if isinstance(value, list) else value


def check_runs(
    runs: Mapping[str, list[str]], shared: Sequence[str], path: Path
) -> dict[str, dict[str, Any]]:
    """Refuses fields that no run could start with, before the first one has begun.

    Args:
      runs: as `read_sweep` gives them.
      shared: flags of all runs.
      path: of the sweep's file.

    Returns:
      By run, its configuration, as `config.to_dict` gives it.

    Raises:
      UserError: naming file and run, or the flag where it is one of all runs.
    """
    values, _ = read_flags(["config"], ["sweep", *shared])
    if any(flag.startswith("--config.test=") for flag in shared) and values.config.test:
        raise UserError("--config.test: a sweep leaves the test split unread; leave the flag out")
    configs = {}
    for name, (module, *flags) in runs.items():
        with _naming(path, name):
            values, _ = read_flags(["config"], ["sweep", *shared, *flags])
            configuration.check(values.config)
            plain = configuration.to_dict(values.config)
            if module.endswith(".features"):
                configuration.check_features(plain)
            else:
                configuration.check_whole_model(plain)
            configs[name] = plain
    return configs


def check_files(
    runs: Mapping[str, list[str]], configs: Mapping[str, dict[str, Any]], path: Path
) -> None:
    """Refuses what images or weights do not allow; both are fetched where they are missing.

    Args:
      runs: as `read_sweep` gives them.
      configs: as `check_runs` gives them, of the runs that are still to start.
      path: of the sweep's file.

    Raises:
      UserError: naming file and run.
    """
    # JAX takes seconds to import, and no backend starts: the runs need all of a GPU's memory.
    from cifar_jax.initial import find_weights
    from cifar_jax.models.registry import create_model
    from cifar_jax.plan import make_plan
    from cifar_jax.setup import check_model, load_splits

    create = functools.partial(create_model, seed=0)
    counts: dict[str, int] = {}  # of training images, by what is said of the data
    checked = set()  # reading weights and making a ResNet-50's structure take a second
    for name, config in configs.items():
        with _naming(path, name):
            data = str(config["data"])
            if data not in counts:
                counts[data] = len(load_splits(config)[1]["train"])
            plan = make_plan(config, train_count=counts[data])
            model = str((config["model"], config["freeze"], plan.phases))
            if runs[name][0].endswith(".features"):
                find_weights(config["model"])
            elif model not in checked:
                check_model(config, plan, create)
                checked.add(model)


@contextlib.contextmanager
def _naming(path: Path, name: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}") from error


def run_all(runs: Mapping[str, list[str]], shared: Sequence[str], workdir: Path) -> set[str]:
    """Makes every run in a process of its own; a failed one is told, and the next one starts.

    Args:
      runs: as `read_sweep` gives them.
      shared: flags of all runs; a run's own are stronger.
      workdir: takes a folder for each run.

    Returns:
      The names of the failed runs.

    Raises:
      UserError: where another process has a run, such as one that outlived its sweep.
      SystemExit: with 128 + signal, after a signal has ended the present run in order.
    """
    failed = set()
    for number, (name, (module, *flags)) in enumerate(runs.items(), start=1):
        if (workdir / name).is_dir():
            with locked(workdir / name, setting="--workdir"):
                pass
        command = [sys.executable, "-m", module, *shared]
        command += [f"--workdir={workdir / name}", *flags, "--config.test=False"]
        tell(f"run {number}/{len(runs)}: {python_command()} {shlex.join(command[1:])}")
        with StopSignal() as stop:
            # In a session of its own, so that each signal reaches it once, from here.
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
            stop.pass_on = process.send_signal
            if stop.received is not None:  # before there was a process
                process.send_signal(stop.received)
            code = process.wait()
        if stop.received is not None:
            again = f"{python_command()} -m cifar_jax.sweep {shlex.join(sys.argv[1:])}"
            tell(f"the sweep goes on with: {again}")
            sys.exit(128 + stop.received)
        if code:
            failed.add(name)
            tell(f"{name}: ended with exit code {code}")
    return failed


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A run and its evaluations on validation, in order; none of a failed run."""

    name: str
    failed: bool
    evaluations: list[dict[str, Any]]

    def last(self) -> float:
        """Returns the accuracy at the end; -1 where there is none."""
        return self.evaluations[-1]["validation_accuracy"] if self.evaluations else -1.0


def rank(names: Sequence[str], workdir: Path, *, failed: Collection[str] = ()) -> list[Ranked]:
    """Returns the runs, the best on validation at its end first.

    Those that failed stand last: what their folders hold may be of another recipe.
    """
    runs = [
        Ranked(name, True, [])
        if name in failed
        else Ranked(name, False, evaluation_rows(read_rows(workdir / name)))
        for name in names
    ]
    return sorted(runs, key=Ranked.last, reverse=True)


def format_ranking(ranking: Sequence[Ranked]) -> str:
    """Returns a Markdown table."""
    lines = ["| run | validation | at epoch | best validation | at epoch | training minutes |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for run in ranking:
        cells = [run.name, "failed" if run.failed else "-", "-", "-", "-", "-"]
        if run.evaluations:
            last = run.evaluations[-1]
            best = max(run.evaluations, key=lambda row: row["validation_accuracy"])
            cells[1:] = [
                f"{last['validation_accuracy']:.4f}",
                f"{last['epoch']:g}",
                f"{best['validation_accuracy']:.4f}",
                f"{best['epoch']:g}",
                f"{last['train_seconds'] / 60:.1f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; exits with 0, 1 (a run failed), 2 (bad input) or 128 + signal."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_jax.sweep",
        usage="%(prog)s FILE --config=PY --workdir=DIR [--config.NAME=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", type=Path, metavar="FILE", help="a TOML file of overrides")
    parser.add_argument(
        "--config", required=True, metavar="PY", help="what the runs share; --config.NAME=VALUE too"
    )
    parser.add_argument("--workdir", required=True, type=Path, help="takes a folder for each run")
    options, shared = parser.parse_known_args(arguments)
    if unknown := [flag for flag in shared if not re.match(r"--config\.[^=]+=", flag)]:
        parser.error(f"unrecognized arguments: {shlex.join(unknown)}")
    with exit_on_user_error():
        runs = read_sweep(options.sweep)
        if not Path(options.config).expanduser().is_file():
            raise UserError(f"--config={options.config}: no such file")
        shared = [f"--config={options.config}", *shared]
        configs = check_runs(runs, shared, options.sweep)
        workdir = options.workdir.expanduser()
        if workdir.exists() and not workdir.is_dir():
            raise UserError(f"--workdir={workdir}: is a file; name a folder")
        new = {name: each for name, each in configs.items() if not (workdir / name).exists()}
        check_files(runs, new, options.sweep)
        failed = run_all(runs, shared, workdir)
        ranking = rank(list(runs), workdir, failed=failed)
        table = format_ranking(ranking)
        if len(failed) < len(runs):  # or it was the command, and an earlier table stays
            write_atomically(workdir / RANKING_NAME, table.encode() + b"\n")
        print(table)
        if len(failed) < len(runs):
            winner = shlex.quote(str(workdir / ranking[0].name))
            tell(
                "read the test split of the first, once: "
                f"python -m cifar_jax.evaluate --workdir={winner} --split=test"
            )
        if failed:
            raise RunError(f"{len(failed)} of {len(runs)} runs failed; what they said stands above")


if __name__ == "__main__":
    main()
