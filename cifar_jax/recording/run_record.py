"""`run.json`: what a run was made of (config, data, versions, machine) and what came out of it."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from numbers import Real
from operator import methodcaller
from pathlib import Path
from typing import Any

from filelock import FileLock

import cifar_jax
from cifar_jax.errors import UserError
from cifar_jax.recording.files import write_atomically, writing

RECORD_NAME = "run.json"
# Of what type a field is that a program reads, where it is there.
FIELDS = {
    "config": dict,
    "features": dict,
    "weights": dict,
    "weights.license": str,
    "starts": list,
    "test_reads": list,
    "result": dict,
    "result.step": int,
    "result.test_accuracy": Real,
    "result.train_seconds": Real,
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe_environment() -> dict:
    """Tells versions, machine, code and command of this process.

    Returns:
        Plain values, for `run.json`. What cannot be found out is None.
    """
    import jax  # here, because whoever only reads a record need not wait for it

    devices = jax.devices()
    return {
        "started": _now(),
        "command": shlex.join(sys.orig_argv),
        "git": describe_git(Path(cifar_jax.__file__).parent),
        "versions": {
            "python": platform.python_version(),
            "cifar_jax": cifar_jax.__version__,
            **{package: _version(package) for package in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def describe_git(folder: Path) -> dict | None:
    """Names the commit that the code in `folder` belongs to.

    Returns:
        {"commit": full hash, "dirty": whether tracked files were changed}; None without git,
        outside a repository, and where the repository does not track this code (a package
        installed into another project's folder).
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=30
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        commit = git("rev-parse", "HEAD")
        return {
            "commit": commit,
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def record_so_far(workdir: str | os.PathLike) -> dict:
    """Reads a run's record; empty where there is none yet.

    Raises:
        UserError: as `read_run_record`.
    """
    return read_run_record(workdir) if (Path(workdir) / RECORD_NAME).exists() else {}


def read_run_record(workdir: str | os.PathLike) -> dict:
    """Reads a run's record.

    Raises:
        UserError: there is none, or it is not a JSON object with fields of the right types.
    """
    path = Path(workdir) / RECORD_NAME
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path}: not found; give the --workdir of a run (of a sweep: a folder in it)"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); restore or delete it") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(record).__name__}")
    bad = [
        name for name, kind in FIELDS.items() if not isinstance(field(record, name), kind | None)
    ]
    if bad:
        raise UserError(f"{path}: has no valid {', '.join(bad)}; restore it from a backup")
    return record


def field(record: dict, name: str) -> Any:
    """Gives the value under a dotted name; None where a part is missing."""
    value = record
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def update_run_record(workdir: str | os.PathLike, **fields) -> dict:
    """Sets top-level fields of a run's record, creating it where it is missing.

    Args:
        workdir: the run's folder; it exists.
        **fields: plain nested values (NumPy and JAX scalars are converted).

    Returns:
        The whole record.

    Raises:
        UserError: the record is corrupt (it is left as it is).
        RunError: it cannot be written.
    """
    with _editing(workdir) as record:
        record.update(fields)
    return record


def count_test_read(workdir: str | os.PathLike, entry: dict) -> int:
    """Notes that the test split was read: the list shows how often results were looked at.

    Args:
        workdir: the run's folder; it exists.
        entry: step and checkpoint; the time is added.

    Returns:
        How often it had been read before.
    """
    with _editing(workdir) as record:
        before = record.get("test_reads") or []
        record["test_reads"] = [*before, {"time": _now(), **entry}]
        return len(before)


def record_end(workdir: str | os.PathLike) -> dict:
    """Notes when the latest start of a run ended in order, beside when it "started".

    Returns:
        The whole record.
    """
    with _editing(workdir) as record:
        record["starts"][-1]["ended"] = _now()
    return record


@contextlib.contextmanager
def _editing(workdir: str | os.PathLike) -> Iterator[dict]:
    """Yields the record, empty where there is none, and writes it when the block ends well."""
    path = Path(workdir) / RECORD_NAME
    lock = path.with_name(f".{RECORD_NAME}.lock")
    with writing(lock):
        lock.touch()
    with FileLock(lock):  # two evaluations at the same time must not lose each other's entry
        record = record_so_far(workdir)
        yield record
        text = json.dumps(record, indent=2, default=methodcaller("item"))
        write_atomically(path, text.encode() + b"\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
