"""Download files, and continue interrupted downloads."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import pooch
import requests
from rich.progress import Progress, TaskID

from wsolkit.data.preparing.archives import STATE, Archive
from wsolkit.errors import DataError

_CHUNK = 2**16  # A broken connection loses this many bytes at most.
_TIMEOUT = (30, 60)  # Seconds to connect, and between two pieces.
_TRIES = 5  # A connection may break this many times in a row without a byte.
_PAUSE = 1.0  # Seconds to wait after the first break. The time doubles with each further one.


def download(archive: Archive, root: Path, progress: Progress) -> None:
    """Download an archive into the root of its data set, and compare its checksum if that is known.

    It continues what a killed process or a broken connection has left.

    Raises:
        DataError: it cannot be downloaded, or is a different file.
    """
    assert archive.url is not None
    folder, path = root / STATE, root / archive.file
    by_hand = f"get it from {archive.page} and put it there as '{path}', or run the same command again to continue"
    if archive.size is not None and archive.size > shutil.disk_usage(folder).free:
        raise DataError(f"there is no room for '{archive.file}' of {archive.size:,} bytes on the disk of '{root}'")
    downloader = Resuming(folder / f"{archive.file}.part", f"Downloading {archive.file}", progress)
    pooch.get_logger().setLevel(logging.ERROR)  # The progress bar says it.
    try:
        pooch.retrieve(archive.url, archive.checksum, archive.file, folder, downloader=downloader)
    except requests.RequestException as error:
        raise DataError(f"'{archive.url}' cannot be downloaded ({error}): {by_hand}") from error
    except ValueError as error:
        raise DataError(f"what is at '{archive.url}' is not the archive that is published ({error})") from error
    except OSError as error:
        raise DataError(f"'{archive.url}' cannot be downloaded to '{folder}' ({error})") from error
    (folder / archive.file).replace(path)


class Resuming:
    """A downloader for pooch, which by itself starts from the beginning each time.

    Args:
        part: the file with what has been downloaded so far, which is kept until it is complete. `<part>.version` beside
            it has the server's version of the file. A download of another version starts from the beginning.
        description: the text of the progress bar.
        progress: shows the bar.
    """

    def __init__(self, part: Path, description: str, progress: Progress) -> None:
        self.part, self.version = part, part.with_name(f"{part.name}.version")
        self.description, self.progress = description, progress

    def __call__(self, url: str, output_file: str, pooch: object, check_only: bool = False) -> None:
        """Download a file for pooch.

        Raises:
            requests.RequestException: the server refuses, or the connection breaks again and again.
        """
        task = self.progress.add_task(self.description, total=None)
        failures = 0
        while True:
            before = self._size()
            try:
                self._continue(url, task)
                break
            except requests.RequestException as error:
                answer = error.response
                if answer is not None and answer.status_code < 500:
                    raise
                failures = 0 if self._size() > before else failures + 1
                if failures == _TRIES:
                    raise
                time.sleep(_PAUSE * 2 ** max(failures - 1, 0))
        self.version.unlink(missing_ok=True)
        self.part.replace(output_file)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, url: str, task: TaskID) -> None:
        version = self.version.read_text(encoding="utf-8") if self.version.exists() else ""
        start = self._size() if version else 0  # All of it is fetched, unless it is known to be the same file.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": version}
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
            given = answer.headers.get("Content-Range", "")
            if answer.status_code == 416:
                if given == f"bytes */{start}":  # The process was killed after the last byte.
                    return
                self.part.unlink()
                raise requests.ConnectionError(f"the server has no more than {given or 'a part'} of {start} bytes")
            answer.raise_for_status()
            if answer.status_code != 206:
                start = 0
            elif not given.startswith(f"bytes {start}-"):
                self.part.unlink()
                raise requests.ConnectionError(f"asked for the file from byte {start}, the server sent {given}")
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            self.version.write_text(_version(answer), encoding="utf-8")
            self.progress.update(task, total=total, completed=start)
            with self.part.open("ab" if start else "wb") as file:
                for chunk in answer.iter_content(_CHUNK):
                    file.write(chunk)
                    self.progress.advance(task, len(chunk))
        if total is not None and self._size() < total:
            raise requests.ConnectionError(f"the connection ended after {self._size()} of {total} bytes")


def _version(answer: requests.Response) -> str:
    """Return what a server accepts in `If-Range`: a strong ETag, or a date."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")
