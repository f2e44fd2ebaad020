"""The index of a data set: one Arrow file with the content of its official files, so that runs start in seconds.

Each split has a record batch with these columns:

    path     name of an image, relative to its split's folder
    label    from 0
    size     width and height that the boxes refer to; null: those of the file
    upright  whether the image is turned as its EXIF orientation says
    boxes    x0, y0, x1, y1 each, as published: not clipped at the edges of the image
    masks    paths of the files that mark the objects, or run lengths: height, width and COCO's "counts"
    ignored  the same for what is to be ignored

The file is mapped into memory and used where it lies. The processes of a machine share it, and none of them copies it.

The file also holds the sources of each split (lists and folders, with their times of change and sizes) and the settings
of its reader. An index that does not fit them any more is not used.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from wsolkit.data.coco import RunLengthMasks
from wsolkit.data.files import IMAGE_SUFFIXES, noted_sources
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import FileRecords, Names, Records, Split
from wsolkit.errors import DataError
from wsolkit.system.drafts import draft

FORMAT = 2
"""Raise it when the file's form changes, or the result of reading official files."""

_ARCHIVES = (".tar", ".gz", ".tgz", ".zip")
_MANY = 100  # If a folder has more files, their folder is watched instead of the files.
_KEY = b"wsolkit"
_SCHEMA = pa.schema(
    {
        "path": pa.large_string(),
        "label": pa.int64(),
        "size": pa.list_(pa.int64(), 2),
        "upright": pa.bool_(),
        "boxes": pa.large_list(pa.list_(pa.int64(), 4)),
        "masks": pa.large_list(pa.large_string()),
        "ignored": pa.large_list(pa.large_string()),
    }
)


@dataclass(frozen=True)
class Indexed:
    """Reads the splits of a data set from its index if it has a valid one, or else from its official files.

    Args:
        read: reads a split from the official files.
        settings: the settings of `read`.
        root: the folder of the data set.
        path: the path of the index.
        warn: is called with the reason if an existing index is not used.
    """

    read: Callable[[Split], Records]
    settings: Mapping[str, Any]
    root: Path
    path: Path
    warn: Callable[[str], object]

    def __call__(self, split: Split) -> Records:
        """Read a split.

        Raises:
            DataError: see the data set's module.
        """
        if not self.path.is_file():
            return self.read(split)
        found = read_index(self.path, split, self.settings, self.root)
        if isinstance(found, str):
            self.warn(
                f"the index '{self.path}' is not used for the {split} split: {found}. Run python -m wsolkit.prepare "
                "again. The data set's own files are read instead"
            )
            return self.read(split)
        return found


def write_index(
    path: Path, splits: Sequence[Split], read: Callable[[Split], Records], settings: Mapping[str, Any], root: Path
) -> dict[Split, FileRecords]:
    """Read splits from a data set's official files and write its index.

    Args:
        path: the path of the index. An old one is replaced when the new one is complete.
        splits: the splits.
        read: reads a split from the official files.
        settings: the settings of `read`.
        root: the folder of the data set.

    Raises:
        DataError: a split cannot be read, or its kind has no index, or `path` cannot be written.
    """
    records: dict[Split, FileRecords] = {}
    about: dict[str, Any] = {}
    for split in splits:
        with noted_sources() as seen:
            found = read(split)
        if not isinstance(found, FileRecords) or not isinstance(found.masks, MaskFiles | RunLengthMasks | None):
            raise DataError(f"the {split} split is no FileRecords with masks that can be written down: it has no index")
        records[split] = found
        about[split] = _about(found, settings, root) | {"sources": _sources(seen, found, settings, root)}
    schema = _SCHEMA.with_metadata({_KEY: json.dumps({"format": FORMAT, "splits": about})})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft(path, "wb") as place, pa.ipc.new_file(place, schema) as file:
            for found in records.values():
                file.write_batch(_batch(found, schema))
    except OSError as error:
        raise DataError(f"the index '{path}' cannot be written ({error}). Set another dataset.index=FILE") from error
    return records


def read_index(path: Path, split: Split, settings: Mapping[str, Any], root: Path) -> FileRecords | str:
    """Read a split from an index, or say why the index does not fit.

    Args:
        path: the path of the index.
        split: the split.
        settings: the settings of the reader of the official files.
        root: the folder of the data set.
    """
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        content = json.loads((file.schema.metadata or {})[_KEY])
        if content["format"] != FORMAT:
            return "another version of wsolkit has written it"
        if split not in content["splits"]:
            return "it does not have this split"
        about = content["splits"][split]
        changed = _changed(about, settings, root)
        return changed or _records(file.get_batch(list(content["splits"]).index(split)), about, root)
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        return f"it is damaged ({error})"


def _about(records: FileRecords, settings: Mapping[str, Any], root: Path) -> dict[str, Any]:
    masks: dict[str, Any] | None = None
    if isinstance(records.masks, MaskFiles):
        own = records.masks
        masks = {
            "root": _relative(own.root, root),
            "threshold": own.threshold,
            "has_ignored": own.ignored is not None,
        }
    elif records.masks is not None:
        masks = {"root": None}
    return {
        "settings": _portable(settings, root),
        "root": _relative(records.root, root),
        "classes": list(records.classes),
        "banner": records.banner,
        "has_sizes": records.sizes is not None,
        "masks": masks,
    }


def _batch(records: FileRecords, schema: pa.Schema) -> pa.RecordBatch:
    count = len(records.ids)
    sizes = pa.nulls(count, _SCHEMA.field("size").type)
    if records.sizes is not None:
        sizes = pa.FixedSizeListArray.from_arrays(records.sizes.ravel(), 2)
    boxes = pa.FixedSizeListArray.from_arrays(records.box_table.ravel(), 4)
    objects, ignored = _mask_columns(records)
    columns = [
        pa.LargeStringArray.from_buffers(count, pa.py_buffer(records.ids.starts), pa.py_buffer(records.ids.block)),
        pa.array(records.labels),
        sizes,
        pa.array(records.upright),
        pa.LargeListArray.from_arrays(records.box_starts, boxes),
        _column("masks", objects, count),
        _column("ignored", ignored, count),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _mask_columns(records: FileRecords) -> tuple[Sequence[Sequence[str]] | None, Sequence[Sequence[str]] | None]:
    masks = records.masks
    if isinstance(masks, MaskFiles):
        return masks.objects, None if masks.ignored is None else [[name] if name else [] for name in masks.ignored]
    if isinstance(masks, RunLengthMasks):
        return [list(map(_text, found)) for found in masks.objects], [list(map(_text, found)) for found in masks.crowds]
    return None, None


def _text(mask: Mapping[str, Any]) -> str:
    """Return a mask in COCO's compressed run lengths as text."""
    (height, width), counts = mask["size"], mask["counts"]
    return f"{height} {width} {counts.decode('ascii') if isinstance(counts, bytes) else counts}"


def _run_lengths(text: str) -> dict[str, Any]:
    height, width, counts = text.split(" ", 2)
    return {"size": [int(height), int(width)], "counts": counts.encode("ascii")}


def _column(name: str, values: Sequence[Any] | None, count: int) -> pa.Array:
    kind = _SCHEMA.field(name).type
    return pa.nulls(count, kind) if values is None else pa.array(values, kind)


def _records(batch: pa.RecordBatch, about: Mapping[str, Any], root: Path) -> FileRecords:
    path, label, size, upright, boxes, objects, ignored = batch.columns
    _, starts, block = path.buffers()
    return FileRecords(
        root / about["root"],
        Names.of_block(_array(block, np.uint8), _array(starts, np.int64)[: len(path) + 1]),
        label.to_numpy(),
        about["classes"],
        size.values.to_numpy().reshape(-1, 2) if about["has_sizes"] else None,
        boxes.values.values.to_numpy().reshape(-1, 4),
        boxes.offsets.to_numpy(),
        _masks(about["masks"], objects, ignored, root),
        about["banner"],
        upright.to_numpy(zero_copy_only=False),
    )


def _masks(
    about: Mapping[str, Any] | None, objects: pa.Array, ignored: pa.Array, root: Path
) -> MaskFiles | RunLengthMasks | None:
    if about is None:
        return None
    if about["root"] is None:
        return RunLengthMasks(
            *([[_run_lengths(text) for text in texts] for texts in column.to_pylist()] for column in (objects, ignored))
        )
    names = [(found or [""])[0] for found in ignored.to_pylist()] if about["has_ignored"] else None
    return MaskFiles(root / about["root"], objects.to_pylist(), names, about["threshold"])


def _array(buffer: pa.Buffer | None, dtype: type) -> npt.NDArray[Any]:
    return np.frombuffer(b"" if buffer is None else buffer, dtype)


def _changed(about: Mapping[str, Any], settings: Mapping[str, Any], root: Path) -> str | None:
    """Say which setting, list or folder has changed since the index was written, or return None."""
    before, now = about["settings"], json.loads(json.dumps(_portable(settings, root)))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"it was made with {name}={before.get(name)}, and this run has {now.get(name)}"
    for name, *state in about["sources"]:
        if _state(name, root) != state:
            return f"'{root / name}' has changed since it was made"
    return None


def _portable(value: Any, root: Path) -> Any:
    """Return settings with paths relative to the root, so that an index stays valid when the data set is moved."""
    if isinstance(value, Mapping):
        return {str(key): _portable(inner, root) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(inner, root) for inner in value]
    if isinstance(value, str) and (value == str(root) or value.startswith(f"{root}{os.sep}")):
        return f"ROOT/{PurePath(value).relative_to(root).as_posix()}"
    return value


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path.absolute())


def _sources(seen: set[Path], records: FileRecords, settings: Mapping[str, Any], root: Path) -> list[list[str | int]]:
    """Return the sources of a split with their state: lists, and folders of images."""
    folders = {name.rpartition("/")[0] for name in map(records.ids.__getitem__, range(len(records.ids)))}
    paths = {records.root / folder for folder in folders}
    if isinstance(records.masks, MaskFiles):
        paths |= {(records.masks.root / name).parent for names in records.masks.objects for name in names}
    places = {root.absolute(), *(Path(text) for text in _strings(settings) if Path(text).is_absolute())}
    together = defaultdict(set)
    for path in {Path(os.path.normpath(path.absolute())) for path in seen}:
        # Kaggle has them beside the root.
        if path.suffix == ".xml" or any(path.is_relative_to(place) for place in places):
            together[path.parent].add(path)
    for folder, files in together.items():
        single = {path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES or path.is_dir()}
        paths |= single if len(single) <= _MANY else {path for path in single if path.is_dir()}
        if len(single) > _MANY or single != files:
            paths.add(folder)
    here = root.absolute()
    names = {_relative(path.absolute(), here) for path in paths}
    return [[name, *_state(name, root)] for name in sorted(names)]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def _state(name: str, root: Path) -> list[int]:
    """Return the time of change and the size (0 for a folder), or −1 if nothing is there.

    For the root, this is its content without hidden files, and without archives, which may be deleted.
    """
    path = root / name
    try:
        if name == ".":
            names = (entry.name for entry in os.scandir(path))
            kept = sorted(entry for entry in names if not entry.startswith(".") and not entry.endswith(_ARCHIVES))
            return [len(kept), zlib.crc32("\n".join(kept).encode(errors="surrogateescape"))]
        status = path.stat()
    except OSError:
        return [-1, -1]
    return [status.st_mtime_ns, 0 if stat.S_ISDIR(status.st_mode) else status.st_size]
