"""Prepare names for people and for files. Names of classes, images, folders and settings may be any text."""

from __future__ import annotations

import codecs
import csv
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import IO

AS_IN_FILES = "wsolkit-as-in-files"
"""The error handler that encodes text with names in it, for `errors=` of `open` and of `str.encode`.

Where a file name is not UTF-8, Python holds lone surrogates in place of its bytes. This handler writes these bytes.
It replaces other lone surrogates, which cannot be encoded, by U+FFFD.
"""

_LONGEST_FILE_NAME = 255  # In bytes, on every usual file system.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LINE_BREAK = re.compile("\r\n|[\n\x0b\x0c\r\x1c-\x1e\x85\u2028\u2029]")


def _encoded(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    code = ord(error.object[error.start])
    return bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else "\N{REPLACEMENT CHARACTER}".encode(), error.start + 1


codecs.register_error(AS_IN_FILES, _encoded)


def readable(text: str) -> str:
    """Return text that every page, terminal and library accepts. Control characters and lone surrogates become U+FFFD.

    Tabs and line ends stay.
    """
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """Return readable text in one line, with ↵ in place of line ends."""
    return readable(_LINE_BREAK.sub("↵", text)).replace("\t", " ")


def shortened(text: str, width: int) -> str:
    """Return readable text in one line that has at most `width` columns of a terminal.

    Longer text keeps its beginning and its end, with … between them.

    Args:
        width: 3 or more.
    """
    text = one_line(text)
    columns = list(map(_columns, text))
    if sum(columns) <= width:
        return text
    start, end, left = 0, len(text), width - 1
    while True:
        at = start if start <= len(text) - end else end - 1  # It takes characters from both sides in turn.
        left -= columns[at]
        if left < 0:
            return f"{text[:start]}…{text[end:]}"
        start, end = (start + 1, end) if at == start else (start, end - 1)


def isolated(name: str) -> str:
    """Return a name that can stand in a line of a picture. A right-to-left name does not turn the text beside it."""
    return f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE}" if runs_from_the_right(name) else name


def runs_from_the_right(text: str) -> bool:
    """Say whether a part of a text is written from right to left."""
    return any(unicodedata.bidirectional(character) in ("R", "AL", "RLE", "RLO", "RLI") for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def file_name(name: str, ending: str) -> str:
    """Return the path of a file that is named after another file: `name + ending`.

    If the last part of the path is too long for a file system, it is cut off and gets a digest of the whole name.

    Args:
        name: it may contain folders, separated by slashes.
        ending: for example ".jpg".
    """
    folder, slash, last = name.rpartition("/")
    encoded = last.encode(errors=AS_IN_FILES)
    if len(encoded) + len(ending) <= _LONGEST_FILE_NAME:
        return name + ending
    mark = f"-{hashlib.sha256(encoded).hexdigest()[:8]}{ending}"
    kept = encoded[: _LONGEST_FILE_NAME - len(mark)].decode(errors="ignore")
    return f"{folder}{slash}{kept}{mark}"


def write_csv(file: IO[str], rows: Iterable[Sequence[object]]) -> None:
    r"""Write rows as CSV with \n as line end, so that csv.reader returns every text unchanged."""
    usual = csv.writer(file, lineterminator="\n")
    quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        # Python before 3.13 does not quote \r, and readers would end the line there.
        (quoted if any("\r" in str(cell) for cell in row) else usual).writerow(row)
