"""Paths in a data set's lists stay in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_listed
from wsolkit.data.benchmarks.listed import listed_records
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import file_records
from wsolkit.errors import DataError

OUTSIDE = ["../x.png", "a/../../x.png", "/etc/x.png", "..", "a/b/../../../x.png"]
INSIDE = ["x.png", "a/../x.png", "a/b/../x.png", "..x.png", "a..b/x.png", ".../x.png", "a/./x.png"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_paths_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leads out of its folder"):
        file_records(tmp_path, ["a.png", name], [0, 0], ["a"], {}, None)
    with pytest.raises(DataError, match="leads out of its folder"):
        MaskFiles(tmp_path, [["a.png"], [name]], None, 0)
    with pytest.raises(DataError, match="leads out of its folder"):
        MaskFiles(tmp_path, [["a.png"]], [name], 0)


@pytest.mark.parametrize("name", INSIDE)
def test_others_are_taken(name: str, tmp_path: Path) -> None:
    assert file_records(tmp_path, [name], [0], ["a"], {}, None).name(0) == name


def test_a_list_cannot_name_images_elsewhere(tmp_path: Path) -> None:
    root = write_listed(tmp_path / "listed", {"train": 4, "val": 2})
    (tmp_path / "private.png").write_bytes((root / "train" / "image 0, x.png").read_bytes())
    for file in ("image_ids.txt", "class_labels.txt"):
        path = root / "metadata" / "train" / file
        path.write_text(path.read_text().replace("train/image 0, x.png", "../private.png"))
    with pytest.raises(DataError, match=r"'../private.png' leads out of its folder"):
        listed_records("train", str(root), {"train": "train", "val": "val", "test": "val"}, None)
