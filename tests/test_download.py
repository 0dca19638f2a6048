"""Downloads from a server on this machine that misbehaves on purpose."""

import contextlib
import http.server
import socket
import threading

import pytest

from cifar_jax.download import download
from cifar_jax.errors import UserError

CONTENT = bytes(range(256)) * 1200


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the path names how it misbehaves."""

    def do_GET(self):
        self.server.ranges.append(self.headers.get("Range"))
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/silent":
            self.server.released.wait(10)
            return
        start = 0
        asked = self.headers.get("Range")
        if asked and self.path != "/no-ranges":
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(CONTENT):
                self.send_error(416)
                return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        if start:
            shift = 1 if self.path == "/other-range" else 0
            self.send_header(
                "Content-Range", f"bytes {start + shift}-{len(CONTENT) - 1}/{len(CONTENT)}"
            )
        if self.path != "/no-length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path == "/drops" and not start:
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.ranges = []
        server.released = threading.Event()
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def _get(server, name, path, **arguments):
    arguments = {"description": "test file", "timeout": 5, **arguments}
    return download(f"{server.address}/{name}", path, **arguments)


@pytest.mark.parametrize("name", ["good", "no-length", "no-ranges"])
def test_whole_file_arrives_under_its_name_only(server, tmp_path, name):
    path = tmp_path / "new folder" / "file.bin"
    assert _get(server, name, path) == path
    assert path.read_bytes() == CONTENT
    assert not path.with_name("file.bin.part").exists()


def test_file_that_is_there_is_not_fetched_again(server, tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"mine")
    _get(server, "good", path)
    assert path.read_bytes() == b"mine" and server.ranges == []


def test_broken_connection_is_told_and_the_next_call_fetches_only_the_rest(server, tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(UserError, match=r"broke off after 153,600 of 307,200 bytes; run again"):
        _get(server, "drops", path)
    assert not path.exists()
    _get(server, "drops", path)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=153600-"]


def test_server_without_ranges_starts_from_the_beginning(server, tmp_path):
    path = tmp_path / "file.bin"
    path.with_name("file.bin.part").write_bytes(CONTENT[:1000])
    _get(server, "no-ranges", path)
    assert path.read_bytes() == CONTENT


def test_part_longer_than_the_file_is_thrown_away(server, tmp_path):
    path = tmp_path / "file.bin"
    path.with_name("file.bin.part").write_bytes(CONTENT + b"tail of another version")
    _get(server, "good", path)
    assert path.read_bytes() == CONTENT


def test_answer_with_another_part_is_refused(server, tmp_path):
    path = tmp_path / "file.bin"
    path.with_name("file.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match="another part"):
        _get(server, "other-range", path)
    assert not path.exists()


def test_file_that_fails_its_check_never_gets_the_name_and_is_not_resumed(server, tmp_path):
    def refuse(part):
        assert part.read_bytes() == CONTENT
        raise UserError("wrong MD5")

    path = tmp_path / "file.bin"
    with pytest.raises(UserError, match="wrong MD5"):
        _get(server, "good", path, check=refuse)
    assert not path.exists() and not path.with_name("file.bin.part").exists()


def test_failures_name_file_address_and_cause(server, tmp_path):
    path = tmp_path / "file.bin"
    with pytest.raises(UserError, match=r"test file: .*/missing to .*file\.bin .*404 Not Found"):
        _get(server, "missing", path)
    with pytest.raises(UserError, match="stopped answering|cannot be reached.*timed out"):
        _get(server, "silent", path, timeout=0.2)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused\)"):
        download(f"http://127.0.0.1:{port}/f", path, description="test file", timeout=5)
    blocked = tmp_path / "a file"
    blocked.write_bytes(b"")
    with pytest.raises(UserError, match="a file"):
        _get(server, "good", blocked / "file.bin")


def test_simultaneous_callers_share_one_download(server, tmp_path):
    path = tmp_path / "file.bin"
    threads = [threading.Thread(target=_get, args=(server, "good", path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == CONTENT and server.ranges == [None]
