"""Pictures of a run's examples, one by one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.reporting.test_page import shown
from wsolkit.errors import JobError
from wsolkit.reporting.charts import PREDICTED, TRUTH
from wsolkit.reporting.examples import Example, read_examples, write_examples


def near(picture: Path, colour: str) -> int:
    """How many pixels of a JPEG have a colour, more or less."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    with PIL.Image.open(picture) as opened:
        return int((abs(np.asarray(opened, dtype=int) - wanted).max(axis=2) < 40).sum())


def test_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_examples(tmp_path) == []
    images = [shown("birds/a b.jpg", 0.25), shown("2", float("nan"), None)]
    write_examples(tmp_path, images, "maxboxacc", 0.3)
    first, second = read_examples(tmp_path)
    label, predicted = "Black-footed Albatross", "Laysan Albatross"
    files = "00_truth.jpg", "00_map.jpg"
    assert first == Example("birds/a b.jpg", label, predicted, 0.25, "maxboxacc", 0.3, *files)
    assert (second.predicted_label, second.iou) == (None, None)
    names = {"examples.json", *files, "01_truth.jpg", "01_map.jpg"}
    assert {path.name for path in (tmp_path / "examples").iterdir()} == names


def test_one_picture_has_the_truth_and_the_other_both_boxes(tmp_path: Path) -> None:
    black = shown("1", 0.25)._replace(image=np.zeros((56, 56, 3), np.uint8))
    write_examples(tmp_path, [black], "maxboxacc", 0.3)
    truth, both = (tmp_path / "examples" / f"00_{name}.jpg" for name in ("truth", "map"))
    for picture in (truth, both):
        assert near(picture, TRUTH) > 1000
    assert near(both, PREDICTED) > 400
    assert near(truth, PREDICTED) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "damaged"),
        ("{}", "expected a list of images"),
        ("[1]", "damaged"),
        ("[{}]", "damaged"),
        ({"iou": "high"}, "a field is of a wrong type"),
        ({"map_file": 1}, "damaged"),
        ({"map_file": "../metrics.json"}, "a picture is not beside it"),
        ({"map_file": "/etc/hostname"}, "a picture is not beside it"),
        ({"map_file": "05_map.jpg"}, "names '05_map.jpg', which cannot be read"),
        ({"map_file": "broken.jpg"}, "names 'broken.jpg', which cannot be read"),
    ],
)
def test_damaged_lists_are_named(content: str | dict[str, object], message: str, tmp_path: Path) -> None:
    write_examples(tmp_path, [shown("1", 0.25), shown("2", 0.5)], "maxboxacc", 0.3)
    path = tmp_path / "examples" / "examples.json"
    (path.parent / "broken.jpg").write_text("no picture")
    (first, second) = json.loads(path.read_text())
    path.write_text(content if isinstance(content, str) else json.dumps([first | content, second]))
    with pytest.raises(JobError, match=re.escape(message)) as raised:
        read_examples(tmp_path)
    assert str(path) in str(raised.value)
