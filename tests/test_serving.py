"""What a server reads for visitors, and the names it answers to."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from wsolkit.errors import DataError
from wsolkit.serving import uploads as serving
from wsolkit.serving.uploads import KnownHosts, Uploads


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uploads]:
    served = Uploads(tmp_path_factory.mktemp("uploads"), "apply")
    yield served
    served.close()


def test_an_upload_is_read(uploads: Uploads) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(uploads._folder / "x.png")
    assert np.array_equal(uploads.read(uploads._folder / "x.png"), pixels)


def test_nothing_else_is(uploads: Uploads, tmp_path: Path) -> None:
    elsewhere = tmp_path / "private.png"
    PIL.Image.new("RGB", (4, 4)).save(elsewhere)
    (uploads._folder / "link.png").symlink_to(elsewhere)
    (uploads._folder / "inside.png").symlink_to(uploads._folder / "x.png")
    os.mkfifo(uploads._folder / "pipe.png")
    (uploads._folder / "folder.png").mkdir(exist_ok=True)
    names = {
        elsewhere: "was not uploaded here",
        Path("/dev/zero"): "was not uploaded here",
        uploads._folder / ".." / elsewhere.name: "was not uploaded here",
        uploads._folder / "link.png": "was not uploaded here",
        uploads._folder / "inside.png": "is not a file",
        uploads._folder / "pipe.png": "is not a file",
        uploads._folder / "folder.png": "is not a file",
        uploads._folder / "gone.png": "is no longer there",
    }
    for path, message in names.items():
        with pytest.raises(DataError, match=message):
            uploads.read(path)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_images_too_large_are_refused_before_they_are_decoded(uploads: Uploads, side: int) -> None:
    path = uploads._folder / f"{side}.png"
    header = PIL.Image.new("1", (8, 8))
    header.save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = side.to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(DataError, match="has more than 50 million pixels"):
        uploads.read(path)


def test_files_too_large_are_refused(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "MAX_BYTES", 10)
    (uploads._folder / "long.png").write_bytes(b"x" * 11)
    with pytest.raises(DataError, match="has 11 bytes: expected 10 at most"):
        uploads.read(uploads._folder / "long.png")


def test_broken_files_leave_the_reader_as_it_was(uploads: Uploads) -> None:
    (uploads._folder / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="cannot be decoded"):
        uploads.read(uploads._folder / "text.png")
    test_an_upload_is_read(uploads)


def test_what_takes_too_long_or_ends_the_process_is_refused_and_the_next_is_read(tmp_path: Path) -> None:
    served = Uploads(tmp_path, "apply", seconds=1)
    os.mkfifo(tmp_path / "pipe.png")  # reading it waits for ever
    start = time.monotonic()
    with pytest.raises(DataError, match="takes longer than 1 seconds to decode"):
        served.decode(tmp_path / "pipe.png")
    assert time.monotonic() - start < 30
    served._start()
    assert served._process is not None
    served._process.kill()
    with pytest.raises(DataError, match="ended the process that decodes"):
        served.decode(tmp_path / "pipe.png")
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    served._seconds = 60
    assert served.read(tmp_path / "x.png").shape == (4, 4, 3)
    served.close()


def request(host: str) -> list[tuple[bytes, bytes]]:
    return [(b"accept", b"*/*"), (b"host", host.encode())]


@pytest.mark.parametrize(
    ("bound", "host", "known"),
    [
        ("127.0.0.1", "127.0.0.1:7860", True),
        ("127.0.0.1", "localhost:7860", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]:7860", True),
        ("127.0.0.1", "evil.example", False),
        ("127.0.0.1", "evil.example:7860", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "192.168.1.5:7860", False),
        ("127.0.0.1", "", False),
        ("localhost", "localhost:1", True),
        ("::1", "[::1]:7860", True),
        ("0.0.0.0", "192.168.1.5:7860", True),
        ("0.0.0.0", "evil.example", False),
        ("192.168.1.5", "192.168.1.5", True),
        ("box.lan", "box.lan:80", True),
        ("box.lan", "other.lan:80", False),
        ("0.0.0.0", "demo.example.org", True),
    ],
)
def test_hosts(bound: str, host: str, known: bool) -> None:
    async def app(*_: object) -> None: ...

    assert KnownHosts(app, bound, ["Demo.example.org"]).knows(request(host)) is known


def test_no_host_and_two_hosts_are_refused() -> None:
    async def app(*_: object) -> None: ...

    hosts = KnownHosts(app, "127.0.0.1", [])
    assert not hosts.knows([(b"accept", b"*/*")])
    assert not hosts.knows([*request("localhost"), *request("evil.example")])
