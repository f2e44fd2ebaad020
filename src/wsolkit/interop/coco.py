"""Write predictions to files as images come in: COCO's results, a COCO data set of pseudo-labels, and CSV.

Each image has a line in `progress.jsonl`, which grows batch by batch. At the end, the other files are made from these
lines, each in one step. A killed run therefore leaves no broken file, and the next one continues.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from pycocotools import mask as rle_masks

import wsolkit
from wsolkit.errors import DataError
from wsolkit.system.drafts import draft, remove_drafts, write_text
from wsolkit.system.locks import alone

if TYPE_CHECKING:
    from wsolkit.localizer import Prediction

PROGRESS, SETTINGS, LOCK = "progress.jsonl", "settings.json", ".predict.lock"
RESULTS, LABELS, TABLE, FAILED = "predictions.json", "pseudo_labels.json", "predictions.csv", "failed.csv"

COLUMNS = ("image_id", "file_name", "image_width", "image_height", "category_id", "label", "score")
BOX_COLUMNS = ("x", "y", "width", "height")


class Source(NamedTuple):
    """An image file: its name in the output; a stamp with its size in bytes and time of change; its given label."""

    name: str
    stamp: list[int]
    given: int | None


def encoded(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as plain containers: its class, and COCO's `bbox`, `area` and `segmentation` for each box.

    `category_id` is the label + 1, since detectors keep 0 for the background. `bbox` is x, y, width, height in pixels.
    """
    objects = []
    for number, (x0, y0, x1, y1) in enumerate(prediction.boxes.tolist(), start=1):
        rle = rle_masks.encode(np.asfortranarray(prediction.regions == number, np.uint8))
        objects.append(
            {
                "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1],
                "area": int(rle_masks.area(rle)),
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")},
            }
        )
    return {"category_id": prediction.label_index + 1, "score": prediction.score, "objects": objects}


@contextmanager
def prediction_files(
    folder: Path, class_names: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[PredictionFiles]:
    """Open a folder of predictions.

    Args:
        folder: the folder, which is created if it does not exist.
        class_names: the names of the classes by label.
        settings: the settings that the predictions depend on, flat, including "exif".

    Raises:
        DataError: the folder holds predictions under other settings.
        BusyError: another process writes to it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        alone(folder / LOCK, f"writing to '{folder}'", "choose another output"),
        (folder / PROGRESS).open("a+b") as progress,
    ):
        remove_drafts(folder / name for name in (SETTINGS, RESULTS, LABELS, TABLE, FAILED))
        _check_settings(folder / SETTINGS, settings)
        yield PredictionFiles(folder, class_names, str(settings["exif"]), progress)


class PredictionFiles:
    """The files in a folder of predictions, see `prediction_files`."""

    def __init__(self, folder: Path, class_names: Sequence[str], exif: str, progress: BinaryIO) -> None:
        self.folder, self.class_names, self._exif, self._file = folder, class_names, exif, progress
        self._lines = dict(self._read())

    def missing(self, sources: Sequence[Source], complete: Callable[[str], bool]) -> list[int]:
        """Return the positions of the images without a line, and of those that have changed since or are incomplete.

        Args:
            sources: the images.
            complete: says whether all else is there for an image that has a line.
        """
        return [
            place
            for place, source in enumerate(sources)
            if self._lines.get(source.name, (0, None))[1] != (source.stamp, source.given) or not complete(source.name)
        ]

    def add(self, found: Iterable[tuple[Source, Sequence[Prediction]]]) -> None:
        """Append the lines of a batch of images, and put them on the disk."""
        for source, predictions in found:
            height, width = predictions[0].score_map.shape
            line = {
                "file_name": source.name,
                "stamp": source.stamp,
                "given": source.given,
                "width": width,
                "height": height,
                "predictions": [encoded(prediction) for prediction in predictions],
            }
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(line).encode() + b"\n")
            self._lines[source.name] = place, (source.stamp, source.given)
        self._file.flush()
        os.fsync(self._file.fileno())

    def write(self, sources: Sequence[Source], failed: Mapping[str, str]) -> int:
        """Write all files that are made from the lines.

        Args:
            sources: all images, in the order of their ids. Those without a line are left out.
            failed: the reasons why images could not be read, by name.

        Returns:
            the number of images with predictions.
        """
        known = [source.name for source in sources if source.name in self._lines and source.name not in failed]

        def images() -> Iterator[dict[str, Any]]:
            for number, name in enumerate(known, start=1):
                yield {"id": number} | self._line(name)

        def annotations() -> Iterator[dict[str, Any]]:
            count = 0
            for image in images():
                best = image["predictions"][0]
                for part in best["objects"]:
                    count += 1
                    annotation = {"id": count, "image_id": image["id"], "category_id": best["category_id"]}
                    yield annotation | part | {"iscrowd": 0, "score": best["score"]}

        with draft(self.folder / RESULTS) as file:
            _write_list(
                file,
                (
                    {"image_id": image["id"], "category_id": each["category_id"], "bbox": part["bbox"]}
                    | {"score": each["score"], "segmentation": part["segmentation"]}
                    for image in images()
                    for each in image["predictions"]
                    for part in each["objects"]
                ),
            )
        with draft(self.folder / LABELS) as file:
            file.write('{"info": ' + json.dumps(self._info()) + ',\n"images": ')
            _write_list(
                file, ({key: image[key] for key in ("id", "file_name", "width", "height")} for image in images())
            )
            file.write(',\n"annotations": ')
            _write_list(file, annotations())
            file.write(',\n"categories": ')
            _write_list(file, ({"id": label + 1, "name": name} for label, name in enumerate(self.class_names)))
            file.write("}\n")
        with draft(self.folder / TABLE) as file:
            table = csv.writer(file)
            table.writerow((*COLUMNS, *BOX_COLUMNS))
            for image in images():
                for each in image["predictions"]:
                    label = self.class_names[each["category_id"] - 1]
                    head = [image[key] for key in ("id", "file_name", "width", "height")]
                    for box in [part["bbox"] for part in each["objects"]] or [[""] * 4]:
                        table.writerow((*head, each["category_id"], label, each["score"], *box))
        (self.folder / FAILED).unlink(missing_ok=True)
        if failed:
            with draft(self.folder / FAILED) as file:
                csv.writer(file).writerows([("file_name", "reason"), *failed.items()])
        return len(known)

    def _info(self) -> dict[str, str]:
        how = (
            "turned upright as its EXIF data say"
            if self._exif == "apply"
            else "as it is stored, whatever its EXIF data"
        )
        text = f"wsolkit {wsolkit.__version__}; sizes, boxes and masks are in pixels of each image {how}"
        return {"description": text, "exif": self._exif}

    def _line(self, name: str) -> dict[str, Any]:
        self._file.seek(self._lines[name][0])
        line: dict[str, Any] = json.loads(self._file.readline())
        return line

    def _read(self) -> Iterator[tuple[str, tuple[int, tuple[list[int], int | None]]]]:
        """Yield the place of each image's line, with its stamp and label, and cut off an unfinished line."""
        place = self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(place)
                break
            try:
                content = json.loads(line)
                yield content["file_name"], (place, (content["stamp"], content["given"]))
            except (ValueError, KeyError, TypeError) as error:
                path = self.folder / PROGRESS
                raise DataError(f"{path}:{number}: the line is damaged ({error}): delete it, or the folder") from error
            place += len(line)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Compare the settings with those in the folder, or write them into a new folder."""
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        earlier = json.loads(path.read_bytes())
        keys = [key for key in {**earlier, **settings} if earlier.get(key) != settings.get(key)]
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DataError(f"'{path}' is damaged ({error}): choose another output, or delete that folder") from error
    if keys:
        differences = "; ".join(f"{key}: {earlier.get(key)} there, {settings.get(key)} here" for key in keys[:5])
        raise DataError(
            f"'{path.parent}' holds predictions under other settings ({differences}): choose another output, or delete "
            "that folder"
        )


def _write_list(file: IO[str], entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON list with one entry per line."""
    separator = "[\n"
    for entry in entries:
        file.write(separator + json.dumps(entry))
        separator = ",\n"
    file.write("]" if separator == ",\n" else "[]")
