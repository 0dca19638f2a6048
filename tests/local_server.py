"""An HTTP server on this machine that keeps a record and can be told to misbehave."""

import http.server
import time


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.content`, with Range; drops at `server.limits`; rests half way."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        content, asked = self.server.content, self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        body = content[start:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        # A limit below the length drops the connection there.
        limit = self.server.limits.pop(0) if self.server.limits else len(body)
        self.wfile.write(body[: limit // 2])
        self.wfile.flush()
        time.sleep(self.server.pause)
        self.wfile.write(body[limit // 2 : limit])
        self.close_connection = True

    def log_message(self, *_):
        """Quiet."""


class Server(http.server.ThreadingHTTPServer):
    """A server on this machine, with a record of what was asked."""

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.limits: list[int] = []
        self.ranges: list[str | None] = []
        self.pause = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}/cifar-10-binary.tar.gz"

    def handle_error(self, *_):
        """Quiet too: a client that is killed breaks the pipe."""
