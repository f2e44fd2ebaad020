"""Write the pictures of a run's example images, one by one, into the folder `examples/` of its directory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from wsolkit.errors import JobError
from wsolkit.reporting.charts import Shown, jpeg, map_image, truth_image
from wsolkit.system.drafts import draft, write_text

FOLDER, LIST = "examples", "examples.json"


@dataclass(frozen=True)
class Example:
    """The entry of an image in `examples.json`.

    image: its id; label, predicted_label: names of classes, None for an unknown prediction; iou: of the predicted box,
    in [0, 1], None without ground truth; protocol, threshold: the protocol of the map and the box, and their τ;
    truth_file: the image with ground truth; map_file: the image under the score map, with ground truth and predicted
    box.
    """

    image: str
    label: str
    predicted_label: str | None
    iou: float | None
    protocol: str
    threshold: float
    truth_file: str
    map_file: str


def write_examples(folder: Path, images: Sequence[Shown], protocol: str, threshold: float) -> None:
    """Write two pictures of each image, and the list of them.

    Args:
        folder: the run directory.
        images: the images to draw.
        protocol: the protocol of the maps and boxes.
        threshold: the threshold of the boxes, from 0 to 1.
    """
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, shown in enumerate(images):
        example = Example(
            image=shown.name,
            label=shown.label,
            predicted_label=shown.predicted_label,
            iou=None if math.isnan(shown.iou) else shown.iou,
            protocol=protocol,
            threshold=threshold,
            truth_file=f"{number:02d}_truth.jpg",
            map_file=f"{number:02d}_map.jpg",
        )
        for name, picture in ((example.truth_file, truth_image(shown)), (example.map_file, map_image(shown))):
            with draft(folder / name, "wb", sync=False) as file:
                file.write(jpeg(picture))
        examples.append(asdict(example))
    write_text(folder / LIST, json.dumps(examples, indent=1) + "\n")


def read_examples(folder: Path) -> list[Example]:
    """Read the examples of a run, or return none if it has left no pictures.

    Args:
        folder: the run directory.

    Raises:
        JobError: the list is damaged, or a picture in it is damaged or missing.
    """
    path = folder / FOLDER / LIST
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError, OSError) as error:
        raise JobError(f"'{path}' is damaged ({error})") from error
    if not isinstance(entries, list):
        raise JobError(f"'{path}' is damaged: expected a list of images")
    return [_example(entry, path) for entry in entries]


def _example(entry: Any, path: Path) -> Example:
    try:
        example = Example(**entry)
        fine = (
            all(isinstance(text, str) for text in (example.image, example.label, example.protocol))
            and isinstance(example.predicted_label, str | None)
            and isinstance(example.iou, int | float | None)
            and isinstance(example.threshold, int | float)
        )
        files = [path.parent / name for name in (example.truth_file, example.map_file)]
    except TypeError as error:
        raise JobError(f"'{path}' is damaged ({error})") from error
    # A list may come from anywhere, so files outside of its folder are not shown.
    if not fine or any(file.parent != path.parent for file in files):
        raise JobError(f"'{path}' is damaged: a field is of a wrong type, or a picture is not beside it")
    for file in files:
        try:
            PIL.Image.open(file).close()
        except (OSError, ValueError) as error:
            raise JobError(f"'{path}' names '{file.name}', which cannot be read ({error})") from error
    return example
