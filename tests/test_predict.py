"""python -m wsolkit.predict: a folder of images in, COCO's files and a table out."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import wsolkit
from tests.fresh import Running
from wsolkit.data.benchmarks.folder import folder_records
from wsolkit.data.records import read_image
from wsolkit.errors import DataError
from wsolkit.interop import coco as files
from wsolkit.predict import find_images, given_labels, main
from wsolkit.types import Exif

CLASSES = ("black spots", "blue spots", "cyan spots")
FINAL = ("predictions.json", "pseudo_labels.json", "predictions.csv")


def predict(*arguments: str, cwd: Path) -> int:
    """The command in this process, since starting one takes seconds; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["wsolkit.predict", *arguments, "progress=false", "device=cpu"])
        patch.setenv("HYDRA_FULL_ERROR", "0")  # put back afterwards: the command changes it
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return 0


def save(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> None:
    """Write noise as an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name) + size[0])
    width, height = size
    if mode == "I;16":
        image = PIL.Image.fromarray(rng.integers(0, 65535, (height, width), dtype=np.uint16))
    elif mode == "F":
        image = PIL.Image.fromarray(rng.random((height, width), dtype=np.float32))
    else:
        image = PIL.Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)
    image.save(path, **options)


@pytest.fixture(scope="module")
def trained(shapes_checkpoint: Path) -> Path:
    """A checkpoint that knows the eight classes of the built-in data set."""
    return shapes_checkpoint


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders named after classes; the same names in both of the first."""
    for name in CLASSES[:2]:
        for number in range(3):
            save(tmp_path / "images" / name / f"{number}.png", (40 + number, 30))
    save(tmp_path / "images" / CLASSES[2] / "deeper" / "a, b.jpg", (300, 200))
    return tmp_path / "images"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quietly(call: Any, *arguments: Any) -> Any:
    """pycocotools prints what it does."""
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*arguments)


def test_every_image_gets_a_box_a_mask_a_class_and_a_score(trained: Path, images: Path, tmp_path: Path) -> None:
    assert predict(f"checkpoint={trained}", "source=images", "output=out", "batch_size=3", cwd=tmp_path) == 0
    labels, results = read(tmp_path / "out" / "pseudo_labels.json"), read(tmp_path / "out" / "predictions.json")
    names = [f"{name}/{number}.png" for name in CLASSES[:2] for number in range(3)] + [f"{CLASSES[2]}/deeper/a, b.jpg"]
    assert [image["file_name"] for image in labels["images"]] == names
    assert [entry["name"] for entry in labels["categories"]][:2] == ["red spots", "green spots"]
    assert [entry["id"] for entry in labels["categories"]] == list(range(1, 9))
    localizer = wsolkit.Localizer.from_checkpoint(trained, device="cpu")
    truth = quietly(COCO, str(tmp_path / "out" / "pseudo_labels.json"))
    for image, result, row in zip(labels["images"], results, table(tmp_path / "out" / "predictions.csv"), strict=True):
        found = localizer(images / image["file_name"])
        assert found.mask.shape == (image["height"], image["width"])
        (x0, y0, x1, y1) = found.boxes[0].tolist()
        assert result["bbox"] == [x0, y0, x1 - x0 + 1, y1 - y0 + 1]
        assert result["category_id"] == found.label_index + 1
        assert result["score"] == pytest.approx(found.score, abs=1e-5)
        assert result["image_id"] == image["id"]
        np.testing.assert_array_equal(truth.annToMask(result), found.mask)
        (annotation,) = truth.loadAnns(truth.getAnnIds(imgIds=image["id"]))
        assert annotation["segmentation"] == result["segmentation"]
        assert annotation["area"] == found.mask.sum()
        assert annotation["iscrowd"] == 0
        assert row["file_name"] == image["file_name"]
        assert row["label"] == found.label
        assert [int(row[key]) for key in ("x", "y", "width", "height")] == result["bbox"]
    assert not (tmp_path / "out" / "failed.csv").exists()


def test_results_are_evaluated_by_cocos_own_code(trained: Path, images: Path, tmp_path: Path) -> None:
    """Judged against the pseudo-labels of the same images, they are all right."""
    assert predict(f"checkpoint={trained}", "source=images", "output=out", cwd=tmp_path) == 0
    truth = quietly(COCO, str(tmp_path / "out" / "pseudo_labels.json"))
    results = quietly(truth.loadRes, str(tmp_path / "out" / "predictions.json"))
    for kind in ("bbox", "segm"):
        judged = COCOeval(truth, results, kind)
        for step in (judged.evaluate, judged.accumulate, judged.summarize):
            quietly(step)
        assert judged.stats[0] == pytest.approx(1)


def test_settings_of_the_command(trained: Path, images: Path, tmp_path: Path) -> None:
    common = (f"checkpoint={trained}", "source=images")
    assert predict(*common, "output=top", "top_k=3", cwd=tmp_path) == 0
    scores = [result["score"] for result in read(tmp_path / "top" / "predictions.json")]
    assert len(scores) == 21
    assert scores[:3] == sorted(scores[:3], reverse=True)
    assert len(read(tmp_path / "top" / "pseudo_labels.json")["annotations"]) == 7  # of the most probable class
    assert predict(*common, "output=all", "select=all", "threshold=0.7", cwd=tmp_path) == 0
    assert len(read(tmp_path / "all" / "predictions.json")) > 7
    assert predict(*common, "output=spa", "protocol=spa", "classes=3", "precision=bf16-mixed", cwd=tmp_path) == 0
    assert {result["category_id"] for result in read(tmp_path / "spa" / "predictions.json")} == {4}
    assert predict(*common, "output=name", "classes=cyan spots", cwd=tmp_path) == 0
    assert {row["label"] for row in table(tmp_path / "name" / "predictions.csv")} == {"cyan spots"}


def test_overlays_show_each_image_with_its_box(trained: Path, images: Path, tmp_path: Path) -> None:
    save(images / "large.jpg", (2500, 1000))
    common = (f"checkpoint={trained}", "source=images", "output=out")
    assert predict(*common, cwd=tmp_path) == 0
    assert predict(*common, "overlays=true", cwd=tmp_path) == 0
    drawn = sorted((tmp_path / "out" / "overlays").rglob("*.jpg"))
    assert len(drawn) == 8
    assert PIL.Image.open(tmp_path / "out" / "overlays" / CLASSES[0] / "0.png.jpg").size == (256, 192)
    assert PIL.Image.open(tmp_path / "out" / "overlays" / "large.jpg.jpg").size == (1024, 410)
    for name in FINAL:
        assert (tmp_path / "out" / name).is_file()


MODES = {
    "grey.png": "L",
    "cmyk.jpg": "CMYK",
    "palette.png": "P",
    "alpha.png": "RGBA",
    "grey_alpha.png": "LA",
    "bits.png": "1",
    "sixteen.png": "I;16",
    "sixteen.tif": "I;16",
    "float.tiff": "F",
    "web.webp": "RGB",
    "bitmap.bmp": "RGB",
}


def test_images_of_any_mode_and_size(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "images"
    for name, mode in MODES.items():
        save(source / name, mode=mode)
    save(source / "pixel.png", (1, 1))
    save(source / "line.png", (700, 1))
    save(source / "large.jpg", (6000, 4000))
    assert predict(f"checkpoint={trained}", "source=images", "output=out", "select=all", cwd=tmp_path) == 0
    coco = quietly(COCO, str(tmp_path / "out" / "pseudo_labels.json"))
    assert len(coco.imgs) == len(MODES) + 3
    for image in coco.imgs.values():
        with PIL.Image.open(source / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            x, y, width, height = annotation["bbox"]
            assert 0 <= x < x + width <= image["width"]
            assert 0 <= y < y + height <= image["height"]
            assert annotation["area"] == coco.annToMask(annotation).sum() > 0


@pytest.mark.parametrize(("setting", "exif"), [("exif=null", "apply"), ("exif=ignore", "ignore")])
def test_boxes_of_photos_are_in_the_pixels_that_the_files_name(
    setting: str, exif: Exif, trained: Path, tmp_path: Path
) -> None:
    """In those that people see, or in those that are stored; either way the files say so and are ground truth again."""
    source = tmp_path / "photos" / CLASSES[0]
    for name, orientation, size in (("a.jpg", 6, (40, 30)), ("b.png", 8, (40, 30)), ("c.tif", 3, (40, 30))):
        noted = PIL.Image.Exif()
        noted[0x0112] = orientation
        save(source / name, size, exif=noted)
    given = (f"checkpoint={trained}", "source=photos", "output=out", "overlays=true", f"classes={CLASSES[0]}", setting)
    assert predict(*given, cwd=tmp_path) == 0
    content = read(tmp_path / "out" / "pseudo_labels.json")
    expected = [(30, 40), (30, 40), (40, 30)] if exif == "apply" else [(40, 30)] * 3
    assert [(image["width"], image["height"]) for image in content["images"]] == expected
    assert content["info"]["exif"] == read(tmp_path / "out" / "settings.json")["exif"] == exif
    with PIL.Image.open(tmp_path / "out" / "overlays" / CLASSES[0] / "a.jpg.jpg") as drawn:
        assert (drawn.width < drawn.height) == (exif == "apply")
    splits = {"train": "photos", "val": "photos", "test": "photos"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records = folder_records("test", str(tmp_path), splits, 0.2, "out/pseudo_labels.json", None)
    assert records.upright.tolist() == [exif == "apply"] * 3
    localizer = wsolkit.Localizer.from_checkpoint(trained, device="cpu", exif=exif)
    for index in range(3):
        found = localizer(tmp_path / records.name(index), CLASSES[0])
        np.testing.assert_array_equal(records.image(index), read_image(tmp_path / records.name(index), exif))
        np.testing.assert_array_equal(records.boxes(index), found.boxes)
        np.testing.assert_array_equal(records.mask(index), found.mask)


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    PIL.Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[..., 1], grey)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_listed_and_do_not_stop_the_rest(
    workers: int, trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / CLASSES[0] / "0.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "text.jpg").write_text("no picture")
    (images / "empty.png").write_bytes(b"")
    (images / "broken.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(30))
    PIL.Image.new("F", (4, 3), 7).save(images / "depth.tif")
    given = (f"checkpoint={trained}", "source=images", "output=out", "batch_size=2", f"num_workers={workers}")
    assert predict(*given, cwd=tmp_path) == 3
    captured = capsys.readouterr()
    assert "7 images, 7 of them new" in captured.out
    assert f"5 images have no predictions, see {Path('out') / 'failed.csv'}" in captured.err
    failed = {row["file_name"]: row["reason"] for row in table(tmp_path / "out" / "failed.csv")}
    assert failed.keys() == {"cut.png", "text.jpg", "empty.png", "broken.tif", "depth.tif"}
    assert "depth.tif' is of mode F and holds float32 with values from 7.0 to 7.0: expected" in failed["depth.tif"]
    assert "cannot identify image file" in failed["text.jpg"]
    assert len(read(tmp_path / "out" / "pseudo_labels.json")["images"]) == 7
    for name in failed:
        (images / name).unlink()
    save(images / "cut.png")
    assert predict(*given, cwd=tmp_path) == 0
    assert "8 images, 1 of them new" in capsys.readouterr().out
    assert not (tmp_path / "out" / "failed.csv").exists()


def lines(folder: Path) -> list[str]:
    return (folder / files.PROGRESS).read_text().splitlines()


def test_run_again_it_does_what_is_missing(trained: Path, images: Path, tmp_path: Path) -> None:
    given = (f"checkpoint={trained}", "source=images", "output=out")
    assert predict(*given, cwd=tmp_path) == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FINAL}
    assert predict(*given, cwd=tmp_path) == 0
    assert len(lines(tmp_path / "out")) == 7
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FINAL} == before
    save(images / "new.png")
    save(images / CLASSES[0] / "0.png", (70, 70))  # changed
    (images / CLASSES[0] / "1.png").unlink()
    assert predict(*given, cwd=tmp_path) == 0
    assert len(lines(tmp_path / "out")) == 9
    found = {image["file_name"]: image["width"] for image in read(tmp_path / "out" / "pseudo_labels.json")["images"]}
    assert len(found) == 7
    assert found[f"{CLASSES[0]}/0.png"] == 70
    assert found["new.png"] == 40


def test_other_settings_need_another_output(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (f"checkpoint={trained}", "source=images", "output=out")
    assert predict(*given, cwd=tmp_path) == 0
    settings = read(tmp_path / "out" / "settings.json")
    other = tmp_path / "other.ckpt"
    content = torch.load(trained, weights_only=True)
    content["epoch"] = 77
    torch.save(content, other)
    for change, message in {
        "top_k=2": "(top_k: 1 there, 2 here)",
        "threshold=0.75": f"(threshold: {settings['threshold']} there, 0.75 here)",
        "select=all": "(select: largest there, all here)",
        "protocol=maxboxacc_v2": "(protocol: maxboxacc there, maxboxacc_v2 here; ",
        "source=images/*/*.png": "(source: ",
        "method.head_init=he": "(method.head_init: default there, he here)",
        f"checkpoint={other}": "(checkpoint: ",
    }.items():
        assert predict(*given, change, cwd=tmp_path) == 1, change
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "holds predictions under other settings" in error
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert predict(*given, "batch_size=2", "num_workers=1", cwd=tmp_path) == 0  # how, not what


def test_line_that_was_not_finished_is_done_again(trained: Path, images: Path, tmp_path: Path) -> None:
    given = (f"checkpoint={trained}", "source=images", "output=out")
    assert predict(*given, cwd=tmp_path) == 0
    whole, before = lines(tmp_path / "out"), (tmp_path / "out" / FINAL[0]).read_bytes()
    (tmp_path / "out" / files.PROGRESS).write_text("\n".join(whole[:4]) + "\n" + whole[4][:50])
    assert predict(*given, cwd=tmp_path) == 0
    assert sorted(lines(tmp_path / "out")) == sorted(whole)
    assert (tmp_path / "out" / FINAL[0]).read_bytes() == before


def test_killed_it_loses_no_more_than_a_batch(trained: Path, tmp_path: Path) -> None:
    for number in range(60):
        save(tmp_path / "images" / f"{number:02d}.png", (500, 400))
    given = [f"checkpoint={trained}", "source=images", "output=out", "batch_size=2", "progress=false", "device=cpu"]
    running = Running("predict", *given, "num_workers=0", cwd=tmp_path, folder=tmp_path / "printed")
    progress = tmp_path / "out" / files.PROGRESS
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (progress.is_file() and len(lines(tmp_path / "out")) >= 6):
        time.sleep(0.01)
    running.kill()
    assert 6 <= len(lines(tmp_path / "out")) < 60
    assert not any((tmp_path / "out" / name).exists() for name in FINAL)
    assert predict(*given, "num_workers=0", cwd=tmp_path) == 0
    assert len(lines(tmp_path / "out")) == len(set(lines(tmp_path / "out"))) == 60
    assert len(read(tmp_path / "out" / "predictions.json")) == 60
    assert predict(*given[:2], "output=unbroken", "batch_size=2", cwd=tmp_path) == 0
    for name in FINAL:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_failing_while_it_writes_leaves_the_earlier_files(
    trained: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"checkpoint={trained}", "source=images", "output=out")
    assert predict(*given, cwd=tmp_path) == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in FINAL}
    save(images / "new.png")

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_write_list", broken)
    assert predict(*given, cwd=tmp_path) == 130
    assert {name: (tmp_path / "out" / name).read_bytes() for name in FINAL} == before


def test_two_processes_do_not_write_into_one_folder(trained: Path, images: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / files.LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert predict(f"checkpoint={trained}", "source=images", "output=out", cwd=tmp_path) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(trained: Path, tmp_path: Path) -> None:
    """Masks of 40 large images would take 240 MB and more."""
    code = (
        "import resource, sys; sys.argv[0] = 'wsolkit.predict'; from wsolkit.predict import main; main()\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for count in (4, 40):
        source = tmp_path / f"images{count}"
        save(source / "0.jpg", (3000, 2000))
        for number in range(1, count):
            (source / f"{number}.jpg").symlink_to(source / "0.jpg")
        given = [f"checkpoint={trained}", f"source={source}", f"output=out{count}", "batch_size=4", "num_workers=0"]
        done = subprocess.run(
            [sys.executable, "-c", code, *given, "device=cpu", "progress=false"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.rpartition("peak")[2]))
    assert peaks[1] < peaks[0] + 150


def test_sources_are_files_folders_and_patterns(images: Path, tmp_path: Path) -> None:
    save(images / ".hidden.png")
    save(images / ".thumbnails" / "x.png")
    (images / "notes.txt").write_text("no image")
    output = images / "out"
    save(output / "overlays" / "x.png")
    names = [f"{name}/{number}.png" for name in CLASSES[:2] for number in range(3)]
    assert find_images(str(images), output) == (images, [*names, f"{CLASSES[2]}/deeper/a, b.jpg"])
    assert find_images(f"{images}/*/[01].png", output) == (images, [n for n in names if "2" not in n])
    assert find_images(f"{images}/**/*.jpg", output) == (images, [f"{CLASSES[2]}/deeper/a, b.jpg"])
    assert find_images(f"{images}/{names[0]}", output) == (images / CLASSES[0], ["0.png"])


def test_classes_are_those_of_the_folders(trained: Path, images: Path, tmp_path: Path) -> None:
    common = (f"checkpoint={trained}", "classes=folder")
    assert predict(*common, "source=images", "output=out", cwd=tmp_path) == 0
    for row in table(tmp_path / "out" / "predictions.csv"):
        assert row["label"] == row["file_name"].split("/")[0]
    assert predict(*common, f"source=images/{CLASSES[1]}", "output=one", cwd=tmp_path) == 0
    assert {row["label"] for row in table(tmp_path / "one" / "predictions.csv")} == {CLASSES[1]}


def test_classes_are_read_from_a_table(trained: Path, images: Path, tmp_path: Path) -> None:
    names = find_images(str(images), tmp_path / "out")[1]
    with (tmp_path / "classes.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "class"), ("other.png", "unknown"), *((n, "red spots") for n in names[1:])]
        )
        csv.writer(file).writerow((names[0], 4))
    given = (f"checkpoint={trained}", "source=images", "output=out", "classes=classes.csv")
    assert predict(*given, cwd=tmp_path) == 0
    assert [result["category_id"] for result in read(tmp_path / "out" / "predictions.json")] == [5] + [1] * 6
    text = (tmp_path / "classes.csv").read_text()
    (tmp_path / "classes.csv").write_text(text.replace("0.png,4", "0.png,2"))  # only this image is done again
    assert predict(*given, cwd=tmp_path) == 0
    assert [result["category_id"] for result in read(tmp_path / "out" / "predictions.json")] == [3] + [1] * 6
    assert len(lines(tmp_path / "out")) == 8


@pytest.mark.parametrize(
    "content",
    [
        "a/0.png,red\nb/1.png,blue\n",
        "\ufeffa/0.png,red\r\n\r\nb/1.png,blue",
        "path,class\na/0.png , red \n , \nb/1.png,blue\t\n\n",
        '"a\\0.png","red"\nb\\1.png,blue\n',
        "a/0.png,red\nb/1.png,blue\na/0.png,red\nother.png,green\n",
    ],
)
def test_tables_of_classes_may_be_written_in_many_ways(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(content, encoding="utf-8", newline="")
    assert given_labels(str(tmp_path / "c.csv"), tmp_path, ["a/0.png", "b/1.png"], ("red", "blue")) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a/0.png,red\n\na/0.png,blue\n", r"c.csv:3: 'a/0.png' has another class than in line 1: keep one"),
        (b"a/0.png,red\na\\0.png,blue\n", r"c.csv:2: 'a/0.png' has another class than in line 1: keep one"),
        ("a/0.png,red\n".encode("utf-16"), r"c.csv' is not a text file in UTF-8, but in UTF-16 or no text at all"),
        (b"a/0.png," + b"x" * 200_000, r"c.csv' cannot be read as a CSV file \(field larger than field limit"),
    ],
)
def test_wrong_tables_of_classes_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        given_labels(str(tmp_path / "c.csv"), tmp_path, ["a/0.png", "b/1.png"], ("red", "blue"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=out"], "required and not given: checkpoint. Add checkpoint=…"),
        (["checkpoint=CHECKPOINT", "output=out"], "required and not given: source. Add source=…"),
        (["checkpoint=CHECKPOINT", "source=images"], "required and not given: output. Add output=…"),
        (["checkpoint=gone.ckpt", "source=images", "output=out"], "there is no checkpoint 'gone.ckpt'"),
        (["checkpoint=CHECKPOINT", "source=gone", "output=out"], "source: there is no file or folder 'gone'"),
        (["checkpoint=CHECKPOINT", "source=images/*.gif", "output=out"], "source: 'images/*.gif' matches no image"),
        (["checkpoint=CHECKPOINT", "source=images/*/../x.png", "output=out"], "goes up after a pattern"),
        (["checkpoint=CHECKPOINT", "source=empty", "output=out"], "source: 'empty' holds no images (.jpeg, .jpg"),
        (["WHOLE", "classes=bird"], "there is no class 'bird'; there are 8, by name or from 0 to 7: red spots"),
        (["WHOLE", "classes=red spot"], "there is no class 'red spot' (did you mean 'red spots'?)"),
        (["WHOLE", "source=others", "classes=folder"], "classes=folder: there is no class 'others'"),
        (["WHOLE", "classes=gone.csv"], "classes: 'gone.csv' cannot be read"),
        (["WHOLE", "classes=short.csv"], "'short.csv' has no line for 6 of 7 images, such as 'black spots/1.png'"),
        (["WHOLE", "classes=twice.csv"], "twice.csv:2: 'black spots/0.png' has another class than in line 1"),
        (["WHOLE", "classes=wide.csv"], "wide.csv:1: ['black spots/0.png', '0', '1'] has 3 fields, expected 2"),
        (["WHOLE", "classes=0", "top_k=2"], "top_k=2 chooses classes by their probability"),
        (["WHOLE", "top_k=9"], "top_k=9: expected 1 to 8"),
        (["WHOLE", "top_k=many"], "top_k='many': Input should be a valid integer"),
        (["WHOLE", "threshold=2"], "threshold=2: expected a number from 0 to less than 1"),
        (["WHOLE", "select=some"], "select='some': Input should be 'largest' or 'all'"),
        (["WHOLE", "batch_size=0"], "batch_size=0: expected 1 or more"),
        (["WHOLE", "device=abacus"], "device=abacus: not available here"),
        (["WHOLE", "precision=8"], "precision=8: Input should be"),
        (["WHOLE", "protocol=mine"], "there is no protocol 'mine'; choose from: maxboxacc"),
        (["WHOLE", "protocol.maxboxacc.component=round"], "component='round': Input should be"),
        (["WHOLE", "method=sat"], "method=sat: the checkpoint's method is ts_cam. Leave the setting out"),
        (["WHOLE", "tresholds=1"], "there is no setting 'tresholds' (did you mean 'threshold'?)"),
    ],
)
def test_wrong_calls(
    arguments: list[str], message: str, trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "others" / "x.png")
    (tmp_path / "short.csv").write_text("black spots/0.png,0\n")
    (tmp_path / "twice.csv").write_text("black spots/0.png,0\nblack spots/0.png,1\n")
    (tmp_path / "wide.csv").write_text("black spots/0.png,0,1\n")
    whole = [f"checkpoint={trained}", "source=images", "output=out"]
    given = [part for name in arguments for part in (whole if name == "WHOLE" else [name])]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", ["wsolkit.predict", *(part.replace("CHECKPOINT", str(trained)) for part in given)])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as stopped:
            main()
    error = capsys.readouterr().err or f"{stopped.value.code}\n"
    assert stopped.value.code not in (0, 3)
    assert message in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "out" / "settings.json").exists()


def test_detectors_train_on_pseudo_labels(trained: Path, images: Path, tmp_path: Path) -> None:
    """Read as torchvision's detection references do, and one step of a detector and of a segmenter."""
    given = (f"checkpoint={trained}", "source=images", "output=out", "classes=folder", "select=all")
    assert predict(*given, cwd=tmp_path) == 0
    dataset = torchvision.datasets.CocoDetection(str(images), str(tmp_path / "out" / "pseudo_labels.json"))
    assert len(dataset) == 7
    pictures, targets = zip(*(convert(dataset, index) for index in range(len(dataset))), strict=True)
    for picture, target in zip(pictures, targets, strict=True):
        height, width = picture.shape[-2:]
        boxes = target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height] * 2)).all()
        assert target["masks"].shape == (len(boxes), height, width)
        assert target["masks"].flatten(1).any(1).all()
        assert target["labels"].min() >= 1  # 0 is the background
    names = {entry["id"]: entry["name"] for entry in dataset.coco.dataset["categories"]}
    for image, target in zip(dataset.coco.dataset["images"], targets, strict=True):
        assert {names[label] for label in target["labels"].tolist()} == {image["file_name"].split("/")[0]}
    torch.manual_seed(0)
    size = {"weights": None, "weights_backbone": None, "num_classes": 9, "min_size": 64, "max_size": 64}
    detection = torchvision.models.detection
    for network in (detection.fasterrcnn_mobilenet_v3_large_320_fpn(**size), detection.maskrcnn_resnet50_fpn(**size)):
        before = next(network.roi_heads.parameters()).clone()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        losses = network(list(pictures[:2]), [dict(target) for target in targets[:2]])
        total = sum(losses.values())
        assert torch.isfinite(total)
        total.backward()
        optimizer.step()
        assert not torch.equal(before, next(network.roi_heads.parameters()))


def convert(dataset: Any, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image and its target, by the steps of torchvision's references/detection/coco_utils.py."""
    picture, annotations = dataset[index]
    width, height = picture.size
    annotations = [annotation for annotation in annotations if annotation["iscrowd"] == 0]
    boxes = torch.as_tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2].clamp_(min=0, max=width)
    boxes[:, 1::2].clamp_(min=0, max=height)
    masks = torch.as_tensor(np.stack([dataset.coco.annToMask(annotation) for annotation in annotations]))
    labels = torch.tensor([annotation["category_id"] for annotation in annotations])
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    assert keep.all()
    target = {
        "boxes": boxes,
        "labels": labels,
        "masks": masks,
        "image_id": torch.tensor([dataset.ids[index]]),
        "area": torch.tensor([float(annotation["area"]) for annotation in annotations]),
        "iscrowd": torch.tensor([annotation["iscrowd"] for annotation in annotations]),
    }
    return torchvision.transforms.functional.to_tensor(picture), target


def test_pseudo_labels_are_read_again_as_a_data_set(trained: Path, images: Path, tmp_path: Path) -> None:
    """Their boxes and masks are ground truth for `dataset=folder`, unchanged."""
    save(images / CLASSES[2] / "0.png")
    given = (f"checkpoint={trained}", "source=images", "output=out", "classes=folder")
    assert predict(*given, cwd=tmp_path) == 0
    records = folder_records("test", str(images), None, 0.99, str(tmp_path / "out" / "pseudo_labels.json"), None)
    localizer = wsolkit.Localizer.from_checkpoint(trained, device="cpu")
    for index in range(len(records.labels)):
        found = localizer(images / records.name(index), records.classes[records.labels[index]])
        np.testing.assert_array_equal(records.boxes(index), found.boxes)
        np.testing.assert_array_equal(records.mask(index), found.mask)
