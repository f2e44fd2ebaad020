"""A web server for archives that can be asked for parts of a file, and that cuts connections."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Server:
    """What it serves, and how.

    files: contents by path. cuts: after how many bytes of the answer to break the connection, one for each request;
    afterwards none is broken. version: of all files. ranges: whether it knows parts of files. status: answers all with
    this. asked: the Range of each request so far.
    """

    files: dict[str, bytes]
    url: str = ""
    cuts: list[int] = field(default_factory=list)
    version: str = '"1"'
    ranges: bool = True
    status: int = 200
    asked: list[str | None] = field(default_factory=list)


@contextmanager
def serving(**files: bytes) -> Iterator[Server]:
    """Serve files on this machine."""
    server = Server({name.replace("__", "."): content for name, content in files.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            server.asked.append(self.headers["Range"])
            content = server.files.get(self.path[1:])
            if content is None or server.status != 200:
                self.send_error(404 if content is None else server.status)
                return
            start, status, total = 0, 200, len(content)
            part = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
            if part and server.ranges and self.headers["If-Range"] in (None, server.version):
                start, status = int(part[1]), 206
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(status)
            if server.version:
                self.send_header("ETag", server.version)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.send_header("Content-Length", str(total - start))
            self.end_headers()
            cut = server.cuts.pop(0) if server.cuts else total
            self.wfile.write(content[start : start + cut])
            if start + cut < total:
                self.wfile.flush()
                self.close_connection = True

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        server.url = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield server
        httpd.shutdown()
        thread.join()
