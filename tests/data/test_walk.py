"""Which files of a folder are images: the same for every reader and command."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest

from tests.data.test_folder import read as read_folder
from wsolkit.dashboard import logged_keys
from wsolkit.data.files import IMAGE_SUFFIXES, images_below, list_folders, list_images, walk
from wsolkit.data.preparing.index import read_index, write_index
from wsolkit.data.records import FileRecords, read_image
from wsolkit.errors import DataError
from wsolkit.predict import find_images
from wsolkit.sweep_report import gather

LEFT_BEHIND = ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "#recycle", "$RECYCLE.BIN", "System Volume Information")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def trained_on(root: Path) -> list[str]:
    """Images that dataset=folder trains on, of a folder that has one for each class."""
    records = read_folder(root, "train", splits={"train": "", "val": "", "test": ""})
    return sorted(records.name(index) for index in range(len(records.labels)))


def predicted(root: Path, pattern: str = "") -> list[str]:
    return find_images(str(root / pattern), root.parent / "out")[1]


def test_what_systems_leave_behind_is_not_data(tmp_path: Path) -> None:
    root = touch(tmp_path / "x", "cat/a.jpg", "cat/more/b.jpg", "dog/c.jpg", "dog/Thumbs.db", "dog/desktop.ini")
    for name in LEFT_BEHIND:
        touch(root, f"{name}/a.jpg", f"cat/{name}/a.jpg", f"cat/more/{name}/deep/a.jpg")
    touch(root, "cat/._a.jpg", "._b.jpg", "cat/more/.c.jpg", "cat/.DS_Store")
    expected = ["cat/a.jpg", "cat/more/b.jpg", "dog/c.jpg"]
    assert trained_on(root) == predicted(root) == predicted(root, "**") == expected
    assert list_folders(root) == ["cat", "dog"]
    assert list_images(root / "cat") == predicted(root, "cat/*.jpg") == ["a.jpg"]


def test_links_are_followed_unless_they_never_end(tmp_path: Path) -> None:
    root = touch(tmp_path / "x", "cat/a.jpg", "cat/more/b.jpg", "dog/c.jpg")
    elsewhere = touch(tmp_path / "elsewhere", "d.jpg", "deep/e.jpg", "other.jpg")
    links = {
        "cat/file.jpg": elsewhere / "other.jpg",
        "cat/folder": elsewhere,
        "cat/link of a link": root / "cat" / "folder",
        "cat/gone.jpg": elsewhere / "gone.jpg",
        "cat/itself.jpg": root / "cat" / "itself.jpg",
        "cat/here": Path(),
        "cat/more/up": root,
        "cat/more/above": tmp_path,
        "cat/beside": root / "dog",
        "dog/beside": root / "cat",  # not through cat/beside
        "bird": elsewhere / "deep",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    (elsewhere / "deep" / "back").symlink_to(root / "cat")
    with pytest.warns(UserWarning, match=r"left out: broken links \(\d+\)"):
        found = predicted(root)
    with pytest.warns(UserWarning, match=r"left out: broken links \(\d+\)"):
        assert trained_on(root) == found
    expected = ["a.jpg", "beside/c.jpg", "file.jpg", "folder/d.jpg", "folder/deep/e.jpg", "folder/other.jpg"]
    expected += [f"link of a link/{name}" for name in ("d.jpg", "deep/e.jpg", "other.jpg")] + ["more/b.jpg"]
    assert [name for name in found if name.startswith("cat/")] == [f"cat/{name}" for name in expected]
    assert [name for name in found if name.startswith("dog/") and "folder" not in name][:3] == [
        *("dog/beside/a.jpg", "dog/beside/file.jpg", "dog/beside/link of a link/d.jpg")
    ]
    assert {"bird/e.jpg", "bird/back/a.jpg", "dog/beside/folder/deep/e.jpg"} < set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_ending_of_images_can_be_decoded(tmp_path: Path, suffix: str) -> None:
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".pjpeg": "JPEG", ".pjp": "JPEG", ".pgm": "PPM"}.get(suffix)
    path = tmp_path / f"X{suffix.upper()}"
    PIL.Image.new("RGB", (6, 4), (9, 8, 7)).save(path, kind)
    assert list_images(tmp_path) == [path.name]
    assert read_image(path).shape == (4, 6, 3)


def test_what_is_left_out_for_its_ending_is_said_in_one_line(tmp_path: Path) -> None:
    names = ("a.jpg", "b.gif", "c.GIF", "notes.txt", "more/d.gif", "more/README", "more/x.jpg/e.png", ".hidden.gif")
    root = touch(tmp_path / "x", *(f"cat/{name}" for name in names))
    line = r"x.*': 5 files are left out: .gif \(3\), .txt \(1\), no ending \(1\)\. Images end in .jpeg, .jpg, .*"
    with pytest.warns(UserWarning, match=line) as said:
        assert predicted(root) == ["cat/a.jpg", "cat/more/x.jpg/e.png"]
    assert len(said) == 1
    with pytest.warns(UserWarning, match=line) as said:
        assert trained_on(root) == ["cat/a.jpg", "cat/more/x.jpg/e.png"]
    assert len(said) == 1
    with pytest.warns(UserWarning, match=r"cat/\*': 3 files are left out: .gif \(2\), .txt \(1\)"):
        assert predicted(root, "cat/*") == ["a.jpg"]
    assert predicted(root, "cat/**/*.gif") == ["b.gif", "more/d.gif"]  # asked for


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", ["a/1.jpg", "a/b/2.jpg", "a/b/c/3.png", "x [1]/4.jpg"]),
        ("*/*.jpg", ["a/1.jpg", "x [1]/4.jpg"]),
        ("a/**/*.jpg", ["1.jpg", "b/2.jpg"]),
        ("**/b/**", ["a/b/2.jpg", "a/b/c/3.png"]),
        ("**/[13].*", ["a/1.jpg", "a/b/c/3.png"]),
        ("x [1]/*", ["4.jpg"]),
        ("a/b/?/3.png", ["c/3.png"]),
    ],
)
def test_patterns_choose_among_the_same_files(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    root = touch(tmp_path / "x", "a/1.jpg", "a/b/2.jpg", "a/b/c/3.png", "x [1]/4.jpg", "a/@eaDir/5.jpg")
    assert predicted(root, pattern) == expected


def test_predictions_are_not_predicted_again(tmp_path: Path) -> None:
    root = touch(tmp_path / "x", "a.jpg", "overlays/a.jpg.jpg", "out/overlays/a.jpg.jpg")
    assert find_images(str(root), root / "out")[1] == ["a.jpg", "overlays/a.jpg.jpg"]
    assert find_images(str(root), root)[1] == ["a.jpg", "out/overlays/a.jpg.jpg"]
    assert len(find_images(str(root), tmp_path)[1]) == 3  # the output is around the source


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to the administrator")
def test_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    root = touch(tmp_path / "x", "closed/a.jpg")
    (root / "closed").chmod(0)
    with pytest.raises(DataError, match=r"the folder '.*closed' cannot be read \(Permission denied\)"):
        images_below(root, Counter())
    (root / "closed").chmod(0o700)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder '.*gone' cannot be read \(No such file or directory\)"):
        list(walk(tmp_path / "gone"))


def test_runs_are_found_in_the_same_way(tmp_path: Path) -> None:
    root = touch(tmp_path / "sweep", "a/job.json", "#recycle/b/job.json", ".old/c/job.json", "a/checkpoints/job.json")
    touch(tmp_path / "elsewhere", "job.json")
    (root / "d").symlink_to(tmp_path / "elsewhere")
    assert [run.name for run in gather(root)] == ["a", "d"]
    for name in ("a/metrics.csv", "#recycle/b/metrics.csv"):
        (root / name).write_text("\ufefftrain/loss,step\n", encoding="utf-8")
    (root / "a" / "config.yaml").write_text("num_examples: 0\n")
    assert "train/loss" in logged_keys(root)


@pytest.mark.parametrize("place", ["cat", "cat/empty", "cat/x.jpg", "cat/linked", "cat/linked/deep", "dog/new"])
def test_an_index_is_old_where_files_are_added_anywhere(tmp_path: Path, place: str) -> None:
    root = touch(tmp_path / "x", *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(3)))
    for folder in ("cat/empty", "cat/x.jpg"):
        (root / folder).mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    index = root / ".wsolkit" / "index.arrow"
    write_index(index, ("train",), lambda split: read_folder(root, split, splits=None), {}, root)
    assert isinstance(read_index(index, "train", {}, root), FileRecords)
    touch(root / place, "new.jpg")
    assert "has changed since" in str(read_index(index, "train", {}, root))
