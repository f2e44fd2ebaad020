"""Wrong calls and broken data sets, each with the message it must give and an exit code that is not 0."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from tests.conftest import METHODS
from tests.fresh import command
from wsolkit.checkpoint import read_checkpoint
from wsolkit.data.benchmarks.imagenet import imagenet_records
from wsolkit.data.benchmarks.listed import listed_records
from wsolkit.data.files import IMAGE_SUFFIXES
from wsolkit.errors import CheckpointError, DataError, WsolkitError
from wsolkit.settings.compose import load_config
from wsolkit.train import train

SPLITS = {"train": "train", "val": "val", "test": "val"}
IMAGES = ", ".join(IMAGE_SUFFIXES)
BOX_FOLDERS = ["Annotations/CLS-LOC/val"]


# What is seen at the command line: one message, no traceback. One process each, so only the kinds that differ.
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "train",
            ["method=satt"],
            f"there is no method 'satt' (did you mean 'sat'?); choose from: {', '.join(METHODS)}",
        ),
        (
            "train",
            ["metod=sat"],
            "there is no setting 'metod' (did you mean 'method'?); choose from: ",
        ),
        ("train", ["dataset=listed"], "required and not given: dataset.root. Add dataset.root=…"),
        ("evaluate", [], "required and not given: checkpoint. Add checkpoint=…"),
        ("evaluate", ["checkpoint=none.ckpt"], "there is no checkpoint 'none.ckpt'"),
        (
            "train",
            ["method="],
            f"there is no method ''; choose from: {', '.join(METHODS)}",
        ),
        ("train", ["seed=[1"], "'seed=[1' cannot be read as a setting"),
    ],
)
def test_commands_say_it_in_one_message(name: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    done = command(name, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["dataset=imagnet"],
            "there is no dataset 'imagnet' (did you mean 'imagenet'?); choose from: ",
        ),
        (["backbone=deit"], "there is no backbone 'deit'"),
        (
            ["trainer=tpu"],
            "there is no trainer 'tpu' (did you mean 'gpu'?); choose from: auto, cpu, ddp, ddp_multinode, gpu",
        ),
        (["protocol=[maxbox]"], "there is no protocol 'maxbox' (did you mean 'maxboxacc'?)"),
        (["method.area_priors=0.3"], "there is no setting 'method.area_priors' (did you mean 'area_prior'?)"),
        (["method=ts_cam", "method.area_prior=0.3"], "there is no setting 'method.area_prior'; choose from: "),
        (["trainer.max_epoch=3"], "there is no setting 'trainer.max_epoch' (did you mean 'max_epochs'?)"),
        (["+method.colour=red"], "there is no setting 'method.colour'"),
        (["method.area_prior=much"], "method.area_prior='much': Input should be a valid number"),
        (["method.area_prior=1.5"], "method.area_prior=1.5: expected a share of the image between 0 and 1"),
        (["method.num_blocks=2.5"], "method.num_blocks=2.5: Input should be a valid integer"),
        (["method.num_blocks=7"], "method.num_blocks=7: expected 1 to 6"),
        (["method.filter=median"], "method.filter='median': Input should be 'released', 'gaussian' or 'none'"),
        (["dataset.batch_size=many"], "dataset.batch_size='many': Input should be a valid integer"),
        (["dataset.batch_size=0"], "dataset.batch_size=0: expected 1 or more"),
        (["dataset.image_size=60"], "image_size=60 is not a multiple of the patch size 8"),
        (["dataset.resize=32"], "cannot cut 64 pixels out of an image resized to 32"),
        (["dataset.records.sizes.train=0"], "dataset.sizes.train=0: expected 1 or more images"),
        (["seed=one"], "seed='one': Input should be a valid integer"),
        (["selection=best"], "selection='best': Input should be 'val', 'test', 'pseudo' or 'classification'"),
        (["schedule.name=linear"], "schedule.name='linear': Input should be 'constant', 'step' or 'cosine'"),
        (["trainer.precision=8"], "trainer.precision=8: Input should be"),
        (["trainer.max_epochs=soon"], "trainer.max_epochs='soon': Input should be a valid integer"),
        (["optimizer.lr=fast"], "optimizer.lr='fast': Input should be a valid number"),
        (["resume=gone.ckpt"], "there is no checkpoint 'gone.ckpt'"),
        (["monitor=nothing"], "monitor=nothing: expected one of top1_cls, top5_cls, maxboxacc/"),
        (["backbone=vit_tiny", "backbone.weights=gone.pth"], "no weight file at 'gone.pth'"),
        (["backbone.model=vit_huge_patch3"], "timm has no model 'vit_huge_patch3'"),
        (
            ["method._target_=wsolkit.methods.cam2.CAM"],
            "method._target_=wsolkit.methods.cam2.CAM: wsolkit runs only what its own YAML files or those of "
            "--config-dir=FOLDER name as a _target_ (did you mean 'wsolkit.methods.cam.CAM'?)",
        ),
        (["dataset=listed", "dataset.root=gone"], "dataset.root: there is no folder 'gone'"),
        (["trainer.accelerator=gpu", "trainer.devices=64"], "trainer: "),
        (["dataset.batch_size=9", "trainer.accumulate_grad_batches=2"], "dataset.batch_size=9 is the global batch"),
    ],
)
def test_wrong_settings(overrides: list[str], message: str, in_tmp: Path) -> None:
    small = ["dataset.records.sizes={train: 8, val: 2, test: 2}"] if "dataset=" not in overrides[0] else []
    with pytest.raises(WsolkitError) as caught:
        train(load_config(*small, "trainer=smoke", "trainer.enable_progress_bar=false", *overrides), in_tmp)
    assert message in str(caught.value)


def replace_line(path: Path, number: int, line: str | None) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "line", "new", "message"),
    [
        (
            "train/class_labels.txt",
            2,
            "train/image 1, x.png,two",
            "class_labels.txt:2: 'two' should be 1 whole numbers",
        ),
        ("train/class_labels.txt", 2, "train/image 1, x.png,-1", "class_labels.txt:2: label -1 of"),
        (
            "val/class_labels.txt",
            2,
            "val/image 1, x.png,2",
            "class_labels.txt:2: label 2 of 'val/image 1, x.png' is out",
        ),
        ("val/class_labels.txt", 2, None, "has no label for 1 images, such as 'val/image 1, x.png'"),
        ("val/class_labels.txt", 2, "val/other.png,0", "class_labels.txt:2: 'val/other.png' is not in image_ids.txt"),
        (
            "val/class_labels.txt",
            2,
            "nothing",
            "class_labels.txt:2: 'nothing' has 1 fields separated by commas, expected 2",
        ),
        ("val/image_ids.txt", 2, "val/gone.png", "image_ids.txt:2: image '"),
        (
            "val/image_ids.txt",
            2,
            "val/image 0, x.png",
            "image_ids.txt:2: 'val/image 0, x.png' is listed twice, first in line 1",
        ),
        ("val/image_sizes.txt", 1, None, "image_sizes.txt has no line for 'val/image 0, x.png'"),
        (
            "val/localization.txt",
            1,
            "val/image 0, x.png,40,0,41,9",
            "localization.txt:1: box 40,0,41,9 does not lie in its image of 40×30",
        ),
        (
            "val/localization.txt",
            1,
            "val/image 0, x.png,9,0,4,9",
            "localization.txt:1: box 9,0,4,9 ends before it begins",
        ),
        ("val/localization.txt", 2, None, "has no box for 1 of 5 images, such as 'val/image 1, x.png'"),
        ("val/localization.txt", 2, "val/image 1, x.png,1,2,3", "localization.txt:2: "),
    ],
)
def test_broken_lists(listed: Path, file: str, line: int, new: str | None, message: str) -> None:
    replace_line(listed / "metadata" / file, line, new)
    with pytest.raises(DataError) as caught:
        for split in ("train", "val"):
            listed_records(split, str(listed), SPLITS, None)
    assert message in str(caught.value)


def add_line(file: str, line: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (root / file).open("a", encoding="utf-8") as text:
            text.write(f"{line}\n")

    return change


def shift_labels(*splits: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for split in splits:
            path = root / "metadata" / split / "class_labels.txt"
            path.write_text(path.read_text().replace(",1", ",2").replace(",0", ",1"))

    return change


@pytest.mark.parametrize(
    ("change", "num_classes", "message"),
    [
        (
            add_line("metadata/val/class_labels.txt", "val/image 1, x.png,0"),
            None,
            "val/class_labels.txt:6: 'val/image 1, x.png' has 0, but 1 in line 2: keep one",
        ),
        (
            add_line("metadata/val/image_sizes.txt", "val/image 1, x.png,30,40"),
            None,
            "val/image_sizes.txt:6: 'val/image 1, x.png' has 30,40, but 40,30 in line 2: keep one",
        ),
        (
            lambda root: (root / "classes.txt").write_text("a,0\nb,1\nc,1\n"),
            None,
            "classes.txt:3: class 1 is 'c', but 'b' in a line before",
        ),
        (add_line("metadata/val/image_sizes.txt", "val/image 1, x.png,0,40"), None, "has 0,40, but 40,30 in line 2"),
        (
            lambda root: replace_line(root / "metadata/val/image_sizes.txt", 1, "val/image 0, x.png,0,30"),
            None,
            "image_sizes.txt' gives 'val/image 0, x.png' 0×30 pixels: expected width and height, above 0",
        ),
        (shift_labels("train", "val"), None, "train/class_labels.txt' begin at 1: expected 0 for the first class"),
        (shift_labels("train", "val"), 3, "train/class_labels.txt' begin at 1: expected 0 for the first class"),
        (
            shift_labels("val"),
            None,
            "label 2 of 'val/image 1, x.png' is out of range: expected 0 to 1; the labels begin",
        ),
        (
            lambda root: replace_line(root / "metadata/train/class_labels.txt", 1, "train/image 0, x.png,3"),
            None,
            "train/class_labels.txt' go up to 3, and none is 2: number the classes without gaps, or set dataset.num_cl",
        ),
        (
            lambda root: replace_line(root / "metadata/train/class_labels.txt", 1, f"train/image 0, x.png,{10**30}"),
            None,
            "class_labels.txt:1: '1000000000000000000000000000000' should be 1 whole numbers",
        ),
    ],
)
def test_contradictory_lists(
    listed: Path, change: Callable[[Path], Any], num_classes: int | None, message: str
) -> None:
    change(listed)
    with pytest.raises(DataError) as caught:
        for split in ("train", "val"):
            listed_records(split, str(listed), SPLITS, num_classes)
    assert message in str(caught.value)


def rewrite_lists(change: Callable[[str], str], encoding: str = "utf-8") -> Callable[[Path], None]:
    def rewritten(root: Path) -> None:
        for path in root.glob("metadata/*/*.txt"):
            path.write_bytes(change(path.read_text()).encode(encoding))

    return rewritten


@pytest.mark.parametrize(
    "change",
    [
        rewrite_lists(str, "utf-8-sig"),
        rewrite_lists(lambda text: text.replace("\n", "\r\n")),
        rewrite_lists(lambda text: text.replace("\n", " \t\n\n")),
        rewrite_lists(lambda text: text.replace("train/", "train\\").replace("val/", "val\\")),
        rewrite_lists(lambda text: text.replace(",40,30", ", 40.0,30.")),
        add_line("metadata/val/class_labels.txt", "val/image 1, x.png,1"),
        add_line("metadata/val/localization.txt", "val/image 0, x.png,0,0,3,3"),
    ],
)
def test_lists_may_be_written_in_many_ways(listed: Path, change: Callable[[Path], Any]) -> None:
    before = [listed_records(split, str(listed), SPLITS, None) for split in ("train", "val")]
    change(listed)
    after = [listed_records(split, str(listed), SPLITS, None) for split in ("train", "val")]
    for old, new in zip(before, after, strict=True):
        assert [new.name(index) for index in range(len(new.labels))] == [
            old.name(index) for index in range(len(old.labels))
        ]
        assert new.labels.tolist() == old.labels.tolist()
        assert new.box_table.tolist() == old.box_table.tolist()
        assert new.box_starts.tolist() == old.box_starts.tolist()


def test_backslashes_in_names_of_files_stay(listed: Path) -> None:
    (listed / "val/image 1, x.png").rename(listed / "val/back\\slash.png")
    rewrite_lists(lambda text: text.replace("image 1, x", "back\\slash"))(listed / "metadata" / "..")
    replace_line(listed / "metadata/train/image_ids.txt", 2, "train/image 1, x.png")
    assert listed_records("val", str(listed), SPLITS, None).name(1) == "val/back\\slash.png"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_lists_in_another_encoding_are_named(listed: Path, encoding: str) -> None:
    rewrite_lists(str, encoding)(listed)
    with pytest.raises(
        DataError, match=r"txt' is not a text file in UTF-8, but in UTF-16 or no text .* save it as UTF-8"
    ):
        listed_records("val", str(listed), SPLITS, 2)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "metadata/val/localization.txt").unlink(), "localization.txt' does not exist"),
        (lambda root: (root / "metadata/val/image_ids.txt").write_text("\n"), "is empty: the val split has no images"),
        (
            lambda root: (root / "metadata/val/image_ids.txt").write_bytes(b"\xff\xfe\x00"),
            "is not a text file in UTF-8",
        ),
        (lambda root: (root / "classes.txt").write_text("a,0\nb,2\n"), "must number its 2 classes from 0 to 1"),
    ],
)
def test_broken_listed_data_sets(listed: Path, break_it: Callable[[Path], Any], message: str) -> None:
    break_it(listed)
    with pytest.raises(DataError, match=re.escape(message)):
        listed_records("val", str(listed), SPLITS, None)


def empty_class(root: Path) -> None:
    (root / "train" / "n09999999").mkdir()


def drop(pattern: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for path in list(root.glob(pattern)):
            path.unlink()

    return change


def rewrite(old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = next(root.glob("Annotations/CLS-LOC/val/*2.xml"))
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (empty_class, "holds 3 class folders, dataset.num_classes says 2"),
        (drop("train/*/*"), f"holds no images ({IMAGES}): the split is empty"),
        (drop("val/*"), f"holds no images ({IMAGES}): the split is empty"),
        (drop("Annotations/*/*/*"), "no box annotations (*.xml) under"),
        (drop("Annotations/*/*/*1.xml"), "there are no boxes for image 'ILSVRC2012_val_00000001'"),
        (rewrite("<bndbox>", "<"), "is not an annotation in the official XML"),
        (rewrite("<xmin>1<", "<xmin>one<"), "is not an annotation in the official XML"),
        (rewrite("n01440764", "n00000000"), "names class 'n00000000', which has no folder in train/"),
        (rewrite("<xmin>1<", "<xmin>32<"), "2.xml: box 32,2,20,24 ends before it begins"),
        (rewrite("object>", "thing>"), "holds no object"),
    ],
)
def test_broken_imagenet(imagenet: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(imagenet)
    with pytest.raises(DataError, match=re.escape(message)):
        for split in ("train", "test"):
            imagenet_records(split, str(imagenet), BOX_FOLDERS, str(imagenet / "metadata"), None, 2, None)


def test_corrupt_image_is_named_when_it_is_reached(listed: Path, in_tmp: Path) -> None:
    (listed / "train" / "image 3, x.png").write_bytes(b"not an image")
    overrides = ["backbone=vit_micro", "dataset.image_size=32", "dataset.resize=36", "dataset.batch_size=4"]
    cfg = load_config(
        "dataset=listed", f"dataset.root={listed}", "dataset.num_workers=2", "trainer.max_epochs=1", *overrides
    )
    with pytest.raises(DataError, match=r"train/image 3, x\.png' cannot be decoded"):
        train(cfg, in_tmp)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 cut short", "cannot be read, perhaps it was cut short"),
        (b"junk\n", r"cannot be read, perhaps it was cut short \(KeyError\)"),
        (b"no checkpoint", "holds something else than tensors and plain containers, or is damaged"),
        ({"state_dict": {}}, "is not a checkpoint of wsolkit"),
        ({"state_dict": Evil()}, r"holds pickled code \(posix.system\), or is damaged. It is not read"),
    ],
)
def test_broken_checkpoints(content: Any, message: str, in_tmp: Path) -> None:
    if isinstance(content, bytes):
        Path("x.ckpt").write_bytes(content)
    else:
        torch.save(content, "x.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint("x.ckpt")
    assert not Path("evil").exists()


def test_checkpoint_with_a_wrong_byte_among_its_weights_is_damaged(shapes_checkpoint: Path, tmp_path: Path) -> None:
    content = bytearray(shapes_checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.ckpt' is damaged: a part of it does not have the checksum"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_weights_with_code_are_refused(in_tmp: Path) -> None:
    from wsolkit.backbones.weights import load_weights

    torch.save({"state_dict": Evil()}, "x.pth")
    with pytest.raises(CheckpointError, match="reading it would run code"):
        load_weights("x.pth")
    Path("x.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_weights("x.safetensors")
    torch.save([1, 2], "x.pth")
    with pytest.raises(CheckpointError, match="holds a list, expected a state dict"):
        load_weights("x.pth")
    torch.save({"epoch": 3}, "x.pth")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_weights("x.pth")


def test_mask_of_another_shape_is_named() -> None:
    import numpy as np

    from wsolkit.data.benchmarks.shapes import ShapesRecords
    from wsolkit.data.dataset import WSOLDataset
    from wsolkit.data.transforms import Transform

    class Wrong(ShapesRecords):
        def mask(self, index: int) -> Any:
            return np.zeros((3, 9), np.uint8)

        def boxes(self, index: int) -> Any:
            return np.zeros((0, 4), np.int64)

    dataset = WSOLDataset(Wrong("val", {"val": 1}, 64, 0), Transform(64, 64, False, (0.5,) * 3, (0.5,) * 3), 0)
    with pytest.raises(DataError, match="mask of 'val/00000' is 9×3, its image 64×64: expected the same proportions"):
        dataset[0, 0]


def test_images_may_be_huge_in_one_direction(tmp_path: Path) -> None:
    from wsolkit.data.records import read_image

    PIL.Image.new("L", (3000, 1)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (1, 3000, 3)
