"""Reads what W&B has written offline: its file is a log of records, in LevelDB's format."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, 7


@dataclass
class OfflineRun:
    """A run of W&B.

    history: rows of each key, by key; files of media are in `files`; config; steps: the metric against which a key is
    drawn; tags, group, job_type.
    """

    folder: Path
    history: dict[str, list[tuple[dict[str, Any], Any]]] = field(default_factory=lambda: defaultdict(list))
    config: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    group: str = ""
    job_type: str = ""

    def values(self, key: str) -> list[Any]:
        """What was logged under a key, in order."""
        return [value for _, value in self.history[key]]

    def table(self, key: str) -> list[dict[str, Any]]:
        """Rows of the last table logged under a key."""
        content = json.loads((self.folder / "files" / self.values(key)[-1]["path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def read_offline(folder: Path) -> OfflineRun:
    """Read the one run that W&B has left in a run directory."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    run = OfflineRun(file.parent)
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.tags, run.group, run.job_type = list(record.run.tags), record.run.run_group, record.run.job_type
        elif kind == "config":
            run.config |= {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.config.update
            }
        elif kind == "metric":
            run.steps[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                key, *below = item.nested_key or [item.key]
                if below:
                    row.setdefault(key, {})["/".join(below)] = json.loads(item.value_json)
                else:
                    row[key] = json.loads(item.value_json)
            for key, value in row.items():
                run.history[key].append((row, value))
    return run


def _records(content: bytes) -> Iterator[Record]:
    """Each is in one piece (kind 1), or in a first (2), middle (3) and last one (4); none crosses the end of a block."""
    at, record = 7, b""
    while at + _HEADER <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        record += content[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""
