"""Read the log of a run, metrics.csv, even if a process was killed while writing it, or a disk lost power."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import NamedTuple

NAME = "metrics.csv"
_LONGEST = 2**20  # In bytes. A longer line is rubbish, and no more of it is held at a time.


class LogFile(NamedTuple):
    """A log: its columns, empty if its header is damaged; the values of each row; the number of damaged lines."""

    columns: list[str]
    rows: list[dict[str, str]]
    damaged: int


def read_log(path: Path) -> LogFile:
    """Read a log without damaged lines, which lack their end or hold something other than numbers."""
    with path.open("rb") as file:
        columns = _columns(file.readline(_LONGEST))
        rows: list[dict[str, str]] = []
        damaged, ended = 0, True
        for line in iter(partial(file.readline, _LONGEST), b"") if columns else ():
            begins, ended = ended, line.endswith(b"\n")
            row = _row(line, columns) if begins and ended else None
            if row is not None:
                rows.append(row)
            elif begins:
                damaged += 1
    return LogFile(columns, rows, damaged)


def _values(line: bytes) -> list[str]:
    """Return the values in a line of CSV, or none if it is not a whole line of text."""
    try:
        return next(csv.reader([line.decode("utf-8-sig")])) if line.endswith(b"\n") and b"\0" not in line else []
    except (ValueError, csv.Error):
        return []


def _columns(line: bytes) -> list[str]:
    columns = _values(line)
    return columns if "step" in columns and len(set(columns)) == len(columns) else []


def _row(line: bytes, columns: list[str]) -> dict[str, str] | None:
    values = _values(line)
    if len(values) != len(columns):
        return None
    row = {column: value for column, value in zip(columns, values, strict=True) if value}
    try:
        int(row["step"])
        for value in row.values():
            float(value)
    except (KeyError, ValueError):
        return None
    return row
