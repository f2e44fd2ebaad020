"""Read files for visitors of a server on this machine, and decide which requests it answers."""

from __future__ import annotations

import ipaddress
import json
import multiprocessing
import os
import signal
import socket
import stat
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import PIL.Image

from wsolkit.data.decoding import decoding
from wsolkit.data.records import decode_image
from wsolkit.errors import DataError
from wsolkit.types import Exif, Image

MAX_BYTES = 64 * 2**20
"""The size of the largest file that visitors may upload."""
MAX_PIXELS = 50_000_000
"""The pixels of the largest image that is decoded for a visitor. Photos of phones have up to 50 million."""
_SECONDS = 10.0
_MAX_REQUEST = 2**20  # In bytes. A page only sends text.
_UPLOAD = "/gradio_api/upload"  # Gradio takes files at this address.

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class Uploads:
    """Images that visitors have uploaded. A separate process decodes them within limits of size and time.

    Args:
        folder: the folder of the uploads. A path that leads anywhere else is refused.
        exif: see `Exif`.
        seconds: the time that decoding an image may take.
    """

    def __init__(self, folder: Path, exif: Exif, seconds: float = _SECONDS) -> None:
        self._folder, self._exif, self._seconds = folder.resolve(), exif, seconds
        self._one = threading.Lock()  # It admits one image at a time.
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def read(self, path: Path) -> Image:
        """Decode an upload: [H, W, 3].

        Raises:
            DataError: it is not an upload, is too large, cannot be decoded, or takes too long.
        """
        if not self.holds(path):
            raise DataError(f"'{path.name}' was not uploaded here")
        try:
            status = os.lstat(path)
        except OSError as error:
            raise DataError(f"'{path.name}' is no longer there: upload it again") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"'{path.name}' is not a file")
        if status.st_size > MAX_BYTES:
            raise DataError(f"'{path.name}' has {status.st_size:,} bytes: expected {MAX_BYTES:,} at most")
        return self.decode(path.resolve())

    def holds(self, path: Path) -> bool:
        """Say whether a path leads into the folder of uploads."""
        try:
            return path.resolve().is_relative_to(self._folder)
        except (OSError, ValueError):  # It is not a path. It may contain a null character.
            return False

    def decode(self, path: Path) -> Image:
        """Decode a file that need not be an upload, see `read`."""
        with self._one:
            try:
                connection = self._connection or self._start()
                connection.send((str(path), self._exif))
                if not connection.poll(self._seconds):
                    raise DataError(f"'{path.name}' takes longer than {self._seconds:g} seconds to decode")
                found = connection.recv()
            except (EOFError, OSError) as error:
                self.close()
                raise DataError(f"'{path.name}' ended the process that decodes images, perhaps for memory") from error
            except DataError:
                self.close()
                raise
        if isinstance(found, str):
            raise DataError(found)
        image: Image = found
        return image

    def close(self) -> None:
        """End the decoding process. The next image starts another one."""
        process, self._process, self._connection = self._process, None, None
        if process is not None:
            process.kill()
            process.join(_SECONDS)

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # A fork would keep this process's threads waiting.
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_decode_each, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        assert self._connection.recv() == "ready"  # Its imports do not count for the time of an image.
        return self._connection


def _decode_each(connection: Connection) -> None:
    """Decode files that are named through a connection, and answer with their pixels, or with an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, which ends this process.
    connection.send("ready")
    while True:
        try:
            path, exif = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_decoded(Path(path), exif))
        except Exception as error:  # Decoders raise all kinds of errors on broken files.
            connection.send(str(error) or type(error).__name__)


def _decoded(path: Path, exif: Exif) -> Image:
    try:
        with decoding(f"'{path.name}'"), PIL.Image.open(path) as image:
            width, height = image.size
    except DataError as error:
        if not isinstance(error.__cause__, PIL.Image.DecompressionBombError):
            raise
        width = height = MAX_PIXELS
    if width * height > MAX_PIXELS:
        raise DataError(f"'{path.name}' has more than {MAX_PIXELS // 10**6} million pixels")
    return decode_image(path, exif, f"'{path.name}'")


class OnlyUploads:
    """Passes on only requests that name no files of this machine except uploads.

    Gradio may copy any file that a request names, before other code checks it.

    Args:
        app: answers the requests.
        uploads: the files that may be named.
    """

    def __init__(self, app: _App, uploads: Uploads) -> None:
        self._app, self._uploads = app, uploads

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answer a request, or refuse it with status 400, 403 or 413."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or scope["path"] == _UPLOAD:
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > _MAX_REQUEST:
                await _refuse(send, 413, f"a request has up to {_MAX_REQUEST:,} bytes")
                return
        try:
            named = [Path(path) for path in _paths(json.loads(body))] if body else []
        except (ValueError, RecursionError):
            await _refuse(send, 400, "a request is JSON")
            return
        for path in named:
            if not self._uploads.holds(path):
                await _refuse(send, 403, f"'{path.name}' was not uploaded here")
                return
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> MutableMapping[str, Any]:
            return next(whole, None) or await receive()

        await self._app(scope, again, send)


def _paths(content: object) -> Iterator[str]:
    """Yield the files that a request's content names."""
    if isinstance(content, dict):
        if "path" in content and content["path"] is not None:
            yield str(content["path"])
        for value in content.values():
            yield from _paths(value)
    elif isinstance(content, list):
        for value in content:
            yield from _paths(value)


async def _refuse(send: _Send, status: int, reason: str) -> None:
    text = reason.encode(errors="replace")
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text})


class KnownHosts:
    """Passes on only requests whose `Host` names this machine.

    A page of another site may point its own name to this machine (DNS rebinding). Its requests then come under that
    name.

    Args:
        app: answers the requests.
        host: the name or address on which the server listens.
        others: other names that are accepted, for example of a proxy.
    """

    def __init__(self, app: _App, host: str, others: Sequence[str]) -> None:
        self._app = app
        self._here = _address(host) or ipaddress.ip_address("127.0.0.1" if host == "localhost" else "0.0.0.0")
        own = socket.gethostname().lower()
        self._names = {"localhost", host.lower(), own, f"{own}.local", *(name.lower() for name in others)}

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answer a request, or refuse it with status 421."""
        if scope["type"] not in ("http", "websocket") or self.knows(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            own = "This server does not know itself by this name: open it under its own, or add it to hosts=[NAME]."
            await _refuse(send, 421, own)

    def knows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Say whether the one `Host` among a request's headers is this machine."""
        given = [value.decode("latin-1").strip().lower() for name, value in headers if name.lower() == b"host"]
        if len(given) != 1:
            return False
        name = given[0][1:].partition("]")[0] if given[0].startswith("[") else given[0].partition(":")[0]
        address = _address(name)
        if address is not None:  # A page of another site cannot have an address of this machine as its name.
            return address.is_loopback or not self._here.is_loopback
        return name in self._names


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
