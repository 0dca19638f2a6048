"""One file from the network: resumable, with progress; all of it under its final name, or none."""

import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import filelock
import tqdm

from cifar_jax.errors import UserError

_CHUNK_BYTES = 1 << 20
_RANGE_NOT_SATISFIABLE = 416


def download(
    url: str,
    path: str | os.PathLike,
    *,
    description: str,
    timeout: float,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Puts the file at `url` under `path`, unless something is there already.

    What has arrived waits in `<path>.part`; the next call asks the server for the rest. Processes
    that want the same file at the same time wait for the first one.

    Args:
        url: http or https address.
        path: where the file shall be; missing folders are made.
        description: what the file is, for the progress bar and for messages.
        timeout: seconds without a byte (or an answer) after which the attempt fails.
        check: raises `UserError` if the complete file, not yet under its final name, is not the
            expected one; the file is then thrown away.

    Returns:
        `path`, as an absolute `Path`.

    Raises:
        UserError: with the cause, where the file could not be had. What had arrived is kept.
    """
    path = Path(path).expanduser().absolute()
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(path.with_name(path.name + ".lock")):
            if not path.exists():
                _fetch_rest(url, part, description=description, timeout=timeout)
                _check_or_discard(part, check)
                os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{description}: download of {url} to {path} failed: {_cause(error)}"
        ) from error
    return path


def _fetch_rest(url: str, part: Path, *, description: str, timeout: float) -> None:
    """Appends to `part` what it still lacks."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != _RANGE_NOT_SATISFIABLE or not start:
            raise
        # The kept part is no beginning of what the server has now.
        part.unlink()
        _fetch_rest(url, part, description=description, timeout=timeout)
        return
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT and response.headers.get(
            "Content-Range", ""
        ).startswith(f"bytes {start}-")
        if response.status == http.client.PARTIAL_CONTENT and not resumed:
            raise UserError(f"{description}: {url} answered with another part than was asked for")
        start = start if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        with open(part, "ab" if resumed else "wb") as file:
            _copy(response, file, start=start, total=total, description=description)
        if total is not None and part.stat().st_size != total:
            raise UserError(
                f"{description}: the connection to {url} broke off after "
                f"{part.stat().st_size:,} of {total:,} bytes; run again to fetch the rest"
            )


def _copy(
    source: http.client.HTTPResponse,
    target: BinaryIO,
    *,
    start: int,
    total: int | None,
    description: str,
) -> None:
    with tqdm.tqdm(
        total=total, initial=start, desc=description, unit="B", unit_scale=True
    ) as progress:
        # read1 returns what has arrived, so that a broken connection loses nothing.
        while chunk := source.read1(_CHUNK_BYTES):
            target.write(chunk)
            progress.update(len(chunk))


def _check_or_discard(part: Path, check: Callable[[Path], None] | None) -> None:
    if check is None:
        return
    try:
        check(part)
    except UserError:
        part.unlink()
        raise


def _cause(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"the server cannot be reached ({error.reason})"
    if isinstance(error, TimeoutError):
        return "the server stopped answering; run again to fetch the rest"
    return str(error) or type(error).__name__
