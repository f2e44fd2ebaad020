"""Downloads from a server on this machine, which breaks connections."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

from tests.data.serving import Server, serving
from wsolkit.data.preparing import download as module
from wsolkit.data.preparing.archives import Archive
from wsolkit.data.preparing.download import Resuming, download
from wsolkit.errors import DataError

CONTENT = np.random.default_rng(0).bytes(5_000_000)
QUIET = Progress(disable=True)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(x__tar=CONTENT) as server:
        yield server


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "_PAUSE", 0)
    (tmp_path / "root" / ".wsolkit").mkdir(parents=True)
    return tmp_path / "root"


def archive(server: Server, **changes: Any) -> Archive:
    settings: dict[str, Any] = {
        "file": "x.tar",
        "page": "https://example.org/data",
        "url": f"{server.url}/x.tar",
        "size": len(CONTENT),
        "checksum": f"sha256:{hashlib.sha256(CONTENT).hexdigest()}",
        "unpack": {".": "."},
        "holds": [],
        "setting": None,
    }
    return Archive(**settings | changes)


def assert_downloaded(root: Path) -> None:
    assert (root / "x.tar").read_bytes() == CONTENT
    assert sorted(path.name for path in root.rglob("*")) == [".wsolkit", "x.tar"]  # nothing else is left


def test_file_arrives(server: Server, root: Path) -> None:
    download(archive(server), root, QUIET)
    assert_downloaded(root)
    assert server.asked == [None]


def test_broken_connections_are_gone_on_from(server: Server, root: Path) -> None:
    server.cuts = [1_000_000, 0, 2_500_000, 7]
    download(archive(server), root, QUIET)
    assert_downloaded(root)
    assert server.asked[0] is None
    starts = [int(str(asked).removeprefix("bytes=").rstrip("-")) for asked in server.asked[1:]]
    assert starts == sorted(starts)
    assert 900_000 < starts[0] <= 1_000_000
    assert 3_400_000 < starts[-1] <= 3_500_000


def test_connection_that_breaks_for_good_is_named_and_gone_on_from_later(server: Server, root: Path) -> None:
    server.cuts = [2_000_000] + [0] * 5
    place = re.escape(str(root / "x.tar"))
    message = f"cannot be downloaded .* get it from https://example.org/data and put it there as '{place}', or run"
    with pytest.raises(DataError, match=message):
        download(archive(server), root, QUIET)
    assert len(server.asked) == 6
    assert not (root / "x.tar").exists()
    server.asked.clear()
    download(archive(server), root, QUIET)
    assert_downloaded(root)
    assert len(server.asked) == 1
    assert server.asked[0] not in (None, "bytes=0-")


def test_another_version_of_the_file_is_not_glued_to_the_old_one(server: Server, root: Path) -> None:
    server.files["x.tar"], server.cuts = bytes(len(CONTENT)), [2_000_000] + [0] * 5
    with pytest.raises(DataError):
        download(archive(server), root, QUIET)
    server.files["x.tar"], server.version = CONTENT, '"2"'
    download(archive(server), root, QUIET)
    assert_downloaded(root)


@pytest.mark.parametrize("version", ["", 'W/"weak"'])
def test_file_without_a_version_is_fetched_anew(server: Server, root: Path, version: str) -> None:
    server.version, server.cuts = version, [2_000_000]
    download(archive(server), root, QUIET)
    assert_downloaded(root)
    assert server.asked == [None, None]


def test_server_without_parts_is_asked_for_everything_again(server: Server, root: Path) -> None:
    server.ranges, server.cuts = False, [2_000_000]
    download(archive(server), root, QUIET)
    assert_downloaded(root)


def test_part_that_is_complete_is_taken(server: Server, root: Path) -> None:
    (root / ".wsolkit" / "x.tar.part").write_bytes(CONTENT)
    (root / ".wsolkit" / "x.tar.part.version").write_text(server.version)
    download(archive(server), root, QUIET)
    assert_downloaded(root)


def test_part_that_is_too_long_is_thrown_away(server: Server, root: Path) -> None:
    (root / ".wsolkit" / "x.tar.part").write_bytes(CONTENT + b"more")
    (root / ".wsolkit" / "x.tar.part.version").write_text(server.version)
    download(archive(server), root, QUIET)
    assert_downloaded(root)


def test_wrong_content_is_refused_and_not_kept(server: Server, root: Path) -> None:
    server.files["x.tar"] = CONTENT[:-1] + b"?"
    with pytest.raises(DataError, match="is not the archive that is published .*SHA256 hash"):
        download(archive(server), root, QUIET)
    assert not (root / "x.tar").exists()
    server.files["x.tar"] = CONTENT
    download(archive(server), root, QUIET)
    assert_downloaded(root)


def test_unknown_checksum_is_not_compared(server: Server, root: Path) -> None:
    download(archive(server, size=None, checksum=None), root, QUIET)
    assert_downloaded(root)


@pytest.mark.parametrize(("status", "requests"), [(403, 1), (404, 1), (503, 5)])
def test_refusals_are_named(server: Server, root: Path, status: int, requests: int) -> None:
    server.status = status
    with pytest.raises(DataError, match=f"cannot be downloaded .{status} .* get it from https://example.org/data"):
        download(archive(server), root, QUIET)
    assert len(server.asked) == requests


def test_server_that_is_not_there_is_named(root: Path) -> None:
    with serving() as gone:
        pass
    with pytest.raises(DataError, match="cannot be downloaded .*Connection refused.* get it from https://example.org"):
        download(archive(gone), root, QUIET)


def test_file_larger_than_the_disk_is_refused(server: Server, root: Path) -> None:
    with pytest.raises(DataError, match="there is no room for 'x.tar' of 1,000,000,000,000,000 bytes on the disk"):
        download(archive(server, size=10**15), root, QUIET)
    assert not server.asked


def test_progress_says_how_far_it_is(server: Server, tmp_path: Path) -> None:
    progress = Progress(disable=True)
    server.cuts = [2_000_000]
    Resuming(tmp_path / "part", "Downloading", progress)(f"{server.url}/x.tar", str(tmp_path / "x"), None)
    (task,) = progress.tasks
    assert (task.description, task.completed, task.total) == ("Downloading", len(CONTENT), len(CONTENT))


DOWNLOAD = """
import sys, time
from pathlib import Path
from rich.progress import Progress
from wsolkit.data.preparing import archives, download

download._CHUNK = 50_000
advance = Progress.advance
Progress.advance = lambda *arguments: (time.sleep(0.01), advance(*arguments))
url, checksum, root = sys.argv[1:]
archive = archives.Archive("x.tar", "", url, None, checksum, {".": "."}, [], None)
download.download(archive, Path(root), Progress(disable=True))
"""


def test_killed_download_goes_on(server: Server, root: Path) -> None:
    given = archive(server)
    command = [sys.executable, "-c", DOWNLOAD, str(given.url), str(given.checksum), str(root)]
    part = root / ".wsolkit" / "x.tar.part"
    child = subprocess.Popen(command)
    while not (part.exists() and part.stat().st_size > 1_000_000):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    had = part.stat().st_size
    assert had < len(CONTENT)
    assert subprocess.run(command, check=False).returncode == 0
    assert (root / "x.tar").read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={had}-"]
