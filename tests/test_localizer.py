"""From a checkpoint to boxes in Python: the boxes of an evaluation, whatever an image comes as."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure

import wsolkit
from tests.conftest import METHODS, learned, write_listed
from wsolkit import Localizer, Prediction, build_datamodule, build_module, load_config
from wsolkit.checkpoint import read_checkpoint
from wsolkit.errors import CheckpointError, ConfigError, DataError
from wsolkit.export import describe, exported_size
from wsolkit.localization.boxes import matched_boxes
from wsolkit.localization.protocol import Protocol
from wsolkit.localizer import as_rgb
from wsolkit.metrics.workers import BoxWorkers
from wsolkit.settings.restore import restore
from wsolkit.train import train
from wsolkit.training.evaluator import Evaluator
from wsolkit.types import Boxes, Exif, Select

PROTOCOLS = ("maxboxacc", "maxboxacc_v2", "ts_cam", "scm", "sat", "spa")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of 100×80 pixels, of which the network sees 64×64."""
    folder = tmp_path_factory.mktemp("localizer")
    write_listed(folder / "data", {"train": 12, "val": 7}, (100, 80))
    cfg = load_config(
        *("method=ts_cam", "dataset=listed", f"dataset.root={folder / 'data'}", "backbone=vit_micro", "logger=none"),
        *("dataset.image_size=64", "dataset.resize=72", "dataset.batch_size=4", "dataset.num_workers=0"),
        *("trainer=smoke", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "num_examples=0"),
        "protocol=[" + ",".join(PROTOCOLS) + "]",
        "dataset.eval_batch_size=7",
    )
    train(cfg, folder / "run")
    return folder


@pytest.fixture(scope="module")
def checkpoint(run: Path) -> Path:
    return run / "run" / "checkpoints" / "best.ckpt"


@pytest.fixture(scope="module")
def localizers(checkpoint: Path) -> Callable[[str], Localizer]:
    """Under each protocol's rules, read once."""
    return functools.cache(lambda name: Localizer.from_checkpoint(checkpoint, device="cpu", protocol=name))


@pytest.fixture(scope="module")
def localizer(checkpoint: Path) -> Localizer:
    return Localizer.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def paths(run: Path) -> list[Path]:
    return [run / "data" / "val" / f"image {number}, x.png" for number in range(7)]


def evaluated(run: Path, protocol: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Protocol, list[Boxes], Any]:
    """The rules of an evaluation of the test split, the label's boxes it draws [T, 4], and the images' sizes."""
    saved = read_checkpoint(run / "run" / "checkpoints" / "best.ckpt")
    cfg = restore(
        load_config("method=ts_cam", "dataset=listed", "backbone=vit_micro", f"protocol=[{protocol}]"), saved, []
    )
    datamodule = build_datamodule(cfg)
    datamodule.setup("test")
    module = build_module(cfg, saved.class_names).eval()
    module.load_state_dict(saved.state_dict)
    boxes: list[Boxes] = []
    draw = BoxWorkers.draw

    def remember(self: BoxWorkers, metric: Any, batch: Any, rows: Any, levels: Any, *rest: Any) -> Any:
        truths = metric.truths(batch, rows)
        boxes.extend(matched_boxes(a, metric.protocol.box_rule, b)[0] for a, b in zip(levels, truths, strict=True))
        return draw(self, metric, batch, rows, levels, *rest)

    monkeypatch.setattr(BoxWorkers, "draw", remember)
    (batch,) = list(datamodule.test_dataloader())
    judged = module.attached(Evaluator).evaluation
    with torch.inference_mode():
        judged.update(batch, module.localize, module)
    return judged.protocols[protocol].protocol, boxes, batch["size"].tolist()


def test_model_can_be_looked_into(checkpoint: Path) -> None:
    localizer = Localizer.from_checkpoint(checkpoint, device="cpu")
    side = localizer.image_size
    logits, maps = localizer.module.localize(torch.zeros(1, 3, side, side))
    assert logits.shape == (1, len(localizer.class_names))
    assert maps.shape[:2] == (1, 1)
    assert not localizer.module.training


@pytest.mark.parametrize("threshold", [None, 0.7, 0.9])
@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "maxboxacc_v2"])
def test_boxes_are_those_of_the_evaluation(
    name: str,
    threshold: float | None,
    run: Path,
    localizers: Callable[[str], Localizer],
    paths: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the test threshold, and others, exactly; where boxes meet at the network's input, once scaled back to it."""
    localizer = localizers(name)
    rules, expected, sizes = evaluated(run, name, monkeypatch)
    found = localizer(paths, [number % 2 for number in range(7)], threshold=threshold)
    place = rules.index_of(found[0].threshold)
    assert place is not None
    for prediction, drawn, (width, height) in zip(found, expected, sizes, strict=True):
        box, (own,) = drawn[place], prediction.boxes
        assert prediction.score_map.shape == prediction.mask.shape == (height, width)
        if rules.frame == "input":
            side, shift = (72, 4) if rules.input == "center_crop" else (64, 0)
            corners = np.array([0, 0, 1, 1])
            edges = (own + corners) * side / np.array([width, height, width, height])
            own = np.round(edges).astype(int) - corners - shift
            box = np.minimum(box, side - 1 - shift)  # ts_cam's may end past the last pixel
        np.testing.assert_array_equal(own, box)
    if threshold:
        assert len({tuple(drawn[place].tolist()) for drawn in expected}) > 2


def test_images_of_the_network_s_size_have_the_boxes_of_the_maps(localizer: Localizer) -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for threshold in (0.2, 0.5, 0.8):
        found = localizer(image, threshold=threshold)
        expected = wsolkit.localization.boxes_at_thresholds(found.score_map, np.array([threshold]), "largest")
        np.testing.assert_array_equal(found.boxes, expected)
        grey = (found.score_map * 255).astype(np.uint8)
        everything = localizer(image, threshold=threshold, select="all")
        np.testing.assert_array_equal(everything.mask, grey > int(threshold * grey.max()))
        assert found.mask.sum() == max(np.bincount(everything.regions.ravel())[1:])


def picture() -> Any:
    return np.random.default_rng(1).integers(0, 255, (50, 90, 3), dtype=np.uint8)


def same(a: Prediction, b: Prediction) -> None:
    assert (a.label, a.label_index, a.score) == (b.label, b.label_index, b.score)
    np.testing.assert_array_equal(a.boxes, b.boxes)
    np.testing.assert_array_equal(a.score_map, b.score_map)


def test_an_image_may_come_in_any_form(localizer: Localizer, tmp_path: Path) -> None:
    pixels = picture()
    PIL.Image.fromarray(pixels).save(tmp_path / "x.png")
    opaque = np.concatenate([pixels, np.full((50, 90, 1), 255, np.uint8)], axis=2)
    expected = localizer(pixels)
    for form in (
        tmp_path / "x.png",
        str(tmp_path / "x.png"),
        PIL.Image.fromarray(pixels),
        pixels.astype(np.float32) / 255,
        opaque,
        PIL.Image.fromarray(opaque),
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1) / 255,
    ):
        same(localizer(form), expected)
    grey = pixels[..., 0]
    expected = localizer(np.stack([grey] * 3, axis=2))
    for form in (
        grey,
        grey[..., None],
        grey / 255,
        grey.astype(np.uint16) * 257,
        torch.from_numpy(grey),
        torch.from_numpy(grey)[None],
        PIL.Image.fromarray(grey),
        PIL.Image.fromarray(grey.astype(np.uint16) * 257),
        PIL.Image.fromarray(grey).convert("P"),
    ):
        same(localizer(form), expected)


def test_a_list_gives_a_list(localizer: Localizer, paths: list[Path]) -> None:
    found = localizer(paths)
    assert [type(each) for each in found] == [Prediction] * 7
    assert localizer([]) == []
    ranked = localizer(paths, top_k=2)
    assert [len(each) for each in ranked] == [2] * 7
    for best, (first, second) in zip(found, ranked, strict=True):
        assert first.label == best.label != second.label
        assert first.score >= second.score
        assert first.score + second.score == pytest.approx(1)
    first, second = localizer(paths[0], top_k=2)
    assert first.label == found[0].label


def test_classes_are_given_by_name_or_number(localizer: Localizer, paths: list[Path]) -> None:
    names = localizer.class_names
    assert localizer(paths[0], names[1]).label_index == localizer(paths[0], 1).label_index == 1
    found = localizer(paths[:2], [names[1], 0])
    assert [each.label for each in found] == [names[1], names[0]]


@pytest.mark.parametrize("name", ["maxboxacc", "sat", "spa"])
def test_boxes_at_any_threshold_need_the_network_once(
    name: str, localizers: Callable[[str], Localizer], paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    localizer = localizers(name)
    ranked = localizer.raw_maps(paths[0], top_k=2)
    (given,) = localizer.raw_maps(paths[0], [localizer.class_names[1]])
    expected = {
        (threshold, select): [
            *localizer(paths[0], top_k=2, threshold=threshold, select=select),
            localizer(paths[0], 1, threshold=threshold, select=select),
        ]
        for threshold in (None, 0.2, 0.7)
        for select in get_args(Select)
    }
    monkeypatch.setattr(localizer, "_forward", None)
    for (threshold, select), predictions in expected.items():
        for raw, prediction in zip([*ranked, given], predictions, strict=True):
            same(localizer.at_threshold(raw, threshold, select), prediction)


def test_result_is_small_frozen_and_can_be_drawn(localizer: Localizer, paths: list[Path], tmp_path: Path) -> None:
    found = localizer(paths[0])
    assert found.boxes.shape == (1, 4)
    assert found.boxes.dtype == np.int64
    assert found.score_map.dtype == np.float32
    assert 0 <= found.score_map.min() <= found.score_map.max() <= 1
    assert found.mask.dtype == bool
    assert found.mask.any()
    figure = found.plot()
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "x.png")
    with pytest.raises(AttributeError):
        found.label = "other"  # type: ignore[misc]
    assert repr(found).startswith(f"Prediction(label='{found.label}', score=0.")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (3000, 2), (5, 7), (64, 64), (3000, 2000)])
@pytest.mark.parametrize("name", ["maxboxacc", "sat", "spa"])
def test_boxes_and_masks_lie_in_images_of_any_size(
    size: tuple[int, int], name: str, localizers: Callable[[str], Localizer]
) -> None:
    localizer = localizers(name)
    height, width = size
    image = np.random.default_rng(2).integers(0, 255, (height, width, 3), dtype=np.uint8)
    found = localizer(image, select="all", threshold=0.3)
    assert found.score_map.shape == found.regions.shape == size
    for number, (x0, y0, x1, y1) in enumerate(found.boxes.tolist(), start=1):
        assert 0 <= x0 <= x1 < width
        assert 0 <= y0 <= y1 < height
        rows, columns = np.nonzero(found.regions == number)
        assert len(rows)
        if min(size) < 64:  # the map shrinks: what covers less than half a pixel is lost
            assert x0 - 1 <= columns.min() <= columns.max() <= x1 + 1
            assert y0 - 1 <= rows.min() <= rows.max() <= y1 + 1
            continue
        near = 1 + np.ceil(np.array([width, height]) / 64)  # of a map's pixel
        assert (np.abs([columns.min() - x0, columns.max() - x1]) <= near[0]).all()
        assert (np.abs([rows.min() - y0, rows.max() - y1]) <= near[1]).all()


@pytest.fixture
def turned(tmp_path: Path) -> Path:
    """A photo of 90×50 pixels that is to be seen upright, 50×90."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(picture()).save(tmp_path / "turned.png", exif=exif)
    return tmp_path / "turned.png"


def test_photos_are_seen_upright_unless_told_otherwise(checkpoint: Path, localizer: Localizer, turned: Path) -> None:
    assert localizer.exif == "apply"
    upright = np.rot90(picture(), -1)
    for form in (turned, PIL.Image.open(turned)):
        same(localizer(form), localizer(upright))
        assert localizer(form).mask.shape == (90, 50)
        assert np.array_equal(localizer.raw_maps(form)[0].image, upright)
    localizer = Localizer.from_checkpoint(checkpoint, device="cpu", exif="ignore")
    for form in (turned, PIL.Image.open(turned)):
        same(localizer(form), localizer(picture()))
    localizer.exif = "apply"
    assert localizer(turned).mask.shape == (90, 50)
    with pytest.raises(ConfigError, match="exif='upright': expected one of apply, ignore"):
        Localizer.from_checkpoint(checkpoint, device="cpu", exif="upright")  # type: ignore[arg-type]


@pytest.mark.parametrize(("trained", "expected"), [("ignore", "ignore"), ("apply", "apply"), (None, "apply")])
def test_photos_are_seen_as_in_training(checkpoint: Path, tmp_path: Path, trained: str | None, expected: str) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["wsolkit"]["config"]["dataset"]["exif"] = trained
    torch.save(content, tmp_path / "x.ckpt")
    assert Localizer.from_checkpoint(tmp_path / "x.ckpt", device="cpu").exif == expected
    assert Localizer.from_checkpoint(tmp_path / "x.ckpt", device="cpu", exif="apply").exif == "apply"


def forms(pixels: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """The same picture as arrays and tensors of other kinds."""
    tensor, levels = torch.from_numpy(pixels).permute(2, 0, 1), pixels / 255
    locked, wide = pixels.copy(), np.zeros((100, 90, 4), np.uint8)
    locked.flags.writeable = False
    wide[::2, :, :3] = pixels
    return {
        "float64": levels,
        "float16": levels.astype(np.float16),
        "longdouble": levels.astype(np.longdouble),
        "big-endian float32": levels.astype(">f4"),
        "big-endian uint16": (pixels.astype(np.uint16) * 257).astype(">u2"),
        "read-only": locked,
        "not contiguous": wide[::2, :, :3],
        "Fortran's order": np.asfortranarray(pixels),
        "negative strides": pixels[::-1, ::-1].copy()[::-1, ::-1],
        "tensor of bfloat16": (tensor / 255).bfloat16(),
        "tensor of float16": (tensor / 255).half(),
        "tensor of float64": tensor.double() / 255,
        "tensor of uint16": torch.from_numpy(pixels.astype(np.uint16) * 257).permute(2, 0, 1),
        "tensor with a gradient": (tensor / 255).requires_grad_(),
        "result of a network": torch.nn.Identity()((tensor / 255).requires_grad_()) * 1,
        "view": torch.from_numpy(wide)[::2].permute(2, 0, 1)[:3],
        "with opacity": torch.cat([tensor, tensor[:1] // 2]),
        "with opacity in float": torch.cat([tensor / 255, torch.full((1, 50, 90), 7.0)]).bfloat16(),
    }


@pytest.mark.parametrize("name", forms(np.zeros((50, 90, 3), np.uint8)))
def test_arrays_and_tensors_of_any_kind_hold_the_same_pixels(name: str) -> None:
    found = as_rgb(forms(picture())[name], "apply")
    assert np.array_equal(found, picture())
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous


def encoded(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    """What an image file of some format holds."""
    file = io.BytesIO()
    PIL.Image.fromarray(picture()).convert(mode).save(file, kind, **options)
    return file.getvalue()


def turned_left() -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return exif


FILES = {
    "jpeg": encoded("jpeg"),
    "turned jpeg": encoded("jpeg", exif=turned_left()),
    "turned png": encoded("png", exif=turned_left()),
    "16 bits": cv2.imencode(".png", picture().astype(np.uint16) * 257)[1].tobytes(),
    "cmyk": encoded("jpeg", "CMYK"),
}


@pytest.mark.parametrize("name", FILES)
def test_bytes_and_open_files_give_the_pixels_of_the_file(name: str, tmp_path: Path) -> None:
    content, path = FILES[name], tmp_path / "x"
    path.write_bytes(content)
    for exif in get_args(Exif):
        expected = as_rgb(path, exif)
        for form in (content, bytearray(content), memoryview(content), io.BytesIO(content)):
            np.testing.assert_array_equal(as_rgb(form, exif), expected)
        with path.open("rb") as file:
            np.testing.assert_array_equal(as_rgb(file, exif), expected)


def test_bytes_and_open_files_stand_alone_or_in_a_list(localizer: Localizer) -> None:
    content = encoded("png")
    expected = localizer(picture())
    for form in (content, bytearray(content), memoryview(content)):
        same(localizer(form), expected)
    same(localizer(io.BytesIO(content)), expected)
    several = localizer([content, io.BytesIO(content), picture()])
    for found, pixels in zip(several, localizer([picture()] * 3), strict=True):
        same(found, pixels)
    (raw,) = localizer.raw_maps(content)
    same(localizer.at_threshold(raw), expected)


def test_bytes_that_would_fill_the_memory_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"an image cannot be decoded \(Image size \(4500 pixels\) exceeds limit"):
        as_rgb(encoded("jpeg"), "apply")


@pytest.mark.parametrize("form", [np.array([[True, False]]), torch.tensor([[True, False]]), torch.eye(2)[None] > 2])
def test_of_bool_true_is_white(form: Any) -> None:
    found = as_rgb(form, "apply")
    assert found[..., 0].tolist() == (255 * np.asarray(form).reshape(found.shape[:2])).tolist()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            "gone.png",
            "image 'gone.png' does not exist: expected the path of an image file. A relative path starts in '/",
        ),
        ("iVBORw0KGgo" * 1000, "iVBORw0KGgo' does not exist"),
        (Path(__file__).parent, "/tests' is a folder: expected an image file. Pass its images as a list of paths"),
        (__file__, "cannot be decoded"),
        (b"<html>", "an image came as 6 bytes in no format that Pillow knows: expected what an image file holds"),
        (encoded("png")[:200], "an image cannot be decoded ("),
        (io.BytesIO(), "an image came as a file with nothing left to read: go back to its beginning with seek(0)"),
        (
            io.StringIO("P3"),
            "an image came as a file whose read() gives str: expected bytes. Open a file with mode 'rb'",
        ),
        (None, "an image came as NoneType: expected a path, bytes, a file that is open in binary mode, a PIL image"),
        ({"image": "a.png"}, "an image came as dict: expected a path"),
        ([[[0.5, 0.5]]], "image 0 of those given came as list: expected a path"),
        ([picture(), 7], "image 1 of those given came as int: expected a path"),
        ([picture(), b"x"], "image 1 of those given came as 1 bytes in no format"),
        (np.zeros((2, 3, 8, 8), np.uint8), "array of shape (2, 3, 8, 8): expected [H, W] or [H, W, C] with C = 1, 3"),
        (np.zeros((3, 8, 8), np.uint8), "array of shape (3, 8, 8)"),
        (torch.zeros(8, 8, 3), "tensor of shape (8, 8, 3): expected [H, W] or [C, H, W]"),
        (np.zeros((0, 8, 3), np.uint8), "array of shape (0, 8, 3)"),
        (np.full((8, 8, 3), 2.0), "float64 with values from 2.0 to 2.0: expected uint8"),
        (np.full((8, 8, 3), np.nan), "float64 with values from nan"),
        (np.zeros((8, 8), np.int64), "int64 with values from 0 to 0"),
        (np.full((8, 8), 255, ">i4"), "an image came as int32 with values from 255 to 255: expected uint8 from 0 to"),
        (
            torch.full((3, 8, 8), 200),
            "int64 with values from 200 to 200: expected uint8 from 0 to 255, uint16 from 0 to",
        ),
        (torch.full((3, 8, 8), -1, dtype=torch.int8), "int8 with values from -1 to -1"),
        (torch.full((3, 8, 8), 1.5, dtype=torch.bfloat16), "float32 with values from 1.5 to 1.5"),
        (torch.zeros((2, 3, 8, 8), dtype=torch.bfloat16), "tensor of shape (2, 3, 8, 8): expected [H, W] or [C, H, W]"),
        (torch.zeros((3, 8, 8), dtype=torch.complex64), "an image came as complex64: expected uint8"),
        (torch.zeros((3, 8, 8)).to_sparse(), "an image cannot be decoded ("),
        (torch.zeros((3, 8, 8), device="meta"), "an image cannot be decoded ("),
        (np.full((8, 8), "x"), "an image came as str"),
        (np.full((8, 8), None), "an image came as object: expected uint8"),
        (PIL.Image.new("RGB", (0, 5)), "an image has 0×5 pixels"),
        (PIL.Image.new("I", (4, 5), 70000), "an image is of mode I and holds int32 with values from 70000 to 70000"),
        (PIL.Image.new("F", (4, 5), 2.5), "an image is of mode F and holds float32 with values from 2.5 to 2.5"),
    ],
)
def test_what_is_no_image_is_named(image: Any, message: str, localizer: Localizer) -> None:
    with pytest.raises(DataError) as caught:
        localizer(image)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": "bird"}, "there is no class 'bird'; there are 2, by name or from 0 to 1: 0, 1"),
        ({"classes": 2}, "there is no class '2'"),
        ({"classes": -1}, "there is no class '-1'"),
        ({"classes": [0, 1]}, "2 classes for 1 images"),
        ({"classes": 0, "top_k": 2}, "it does not go with given classes"),
        ({"top_k": 3}, "top_k=3: expected 1 to 2"),
        ({"threshold": 1.0}, "threshold=1.0: expected a number from 0 to less than 1"),
        ({"select": "some"}, "select='some': expected 'largest' or 'all'"),
    ],
)
def test_wrong_calls_are_named(settings: dict[str, Any], message: str, localizer: Localizer) -> None:
    with pytest.raises(ConfigError) as caught:
        localizer([picture()], **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:77"}, "device=cuda:77: not available here"),
        ({"device": "abacus"}, "device=abacus: not available here"),
        ({"precision": "8"}, "precision='8': expected one of 32-true, bf16-mixed, 16-mixed"),
        ({"protocol": "mine"}, "there is no protocol 'mine'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Localizer.from_checkpoint(checkpoint, **settings)
    assert message in str(caught.value)


def test_checkpoint_says_all_that_a_user_needs(checkpoint: Path, localizer: Localizer, run: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)["wsolkit"]
    assert content["version"] == wsolkit.__version__ == localizer.version
    assert content["class_names"] == localizer.class_names
    assert (localizer.method, localizer.backbone, localizer.image_size) == ("ts_cam", "vit_micro", 64)
    assert (localizer.mean, localizer.std) == ((0.5, 0.5, 0.5),) * 2
    assert content["metrics"]["maxboxacc/max_box_acc"] == localizer.metrics["maxboxacc/max_box_acc"]
    assert localizer.threshold == content["thresholds"]["maxboxacc/gt_known_loc_predicted_class"]
    assert "method=ts_cam, backbone=vit_micro, classes=2, protocol=maxboxacc" in repr(localizer)


def edited(checkpoint: Path, path: Path, **changes: Any) -> Path:
    """A copy of a checkpoint that says something else of itself."""
    content = torch.load(checkpoint, weights_only=True)
    content["wsolkit"] |= changes
    torch.save(content, path)
    return path


def test_another_version_is_said_to_be_one(checkpoint: Path, tmp_path: Path) -> None:
    path = edited(checkpoint, tmp_path / "x.ckpt", version="0.0.3")
    with pytest.warns(UserWarning, match=f"was written by wsolkit 0.0.3, and this is {wsolkit.__version__}"):
        Localizer.from_checkpoint(path, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Localizer.from_checkpoint(checkpoint, device="cpu")


def test_checkpoints_without_the_later_entries_are_read(checkpoint: Path, localizer: Localizer, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for key in ("metrics", "mean", "std"):
        del content["wsolkit"][key]
    torch.save(content, tmp_path / "early.ckpt")
    early = Localizer.from_checkpoint(tmp_path / "early.ckpt", device="cpu")
    assert early.metrics == {}
    same(early(picture()), localizer(picture()))


def test_data_set_of_one_s_own_is_not_needed(checkpoint: Path, localizer: Localizer, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["wsolkit"]["config"]["dataset"]["name"] = "mine"
    torch.save(content, tmp_path / "x.ckpt")
    same(Localizer.from_checkpoint(tmp_path / "x.ckpt", device="cpu")(picture()), localizer(picture()))


@pytest.mark.parametrize(
    ("fixed", "selected", "expected", "origin"),
    [
        (None, {}, 0.3, "default"),
        (None, {"maxboxacc/by_maps": 0.44}, 0.44, "maps"),
        (None, {"maxboxacc/gt_known_loc_predicted_class": 0.61}, 0.61, "validation"),
        (0.12, {"maxboxacc/gt_known_loc_predicted_class": 0.61}, 0.12, "protocol"),
    ],
)
def test_threshold_is_that_of_the_boxes_and_of_exported_files(
    fixed: float | None, selected: dict[str, float], expected: float, origin: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = edited(checkpoint, tmp_path / "x.ckpt", thresholds=selected)
    content = torch.load(path, weights_only=True)
    content["wsolkit"]["config"]["protocol"]["maxboxacc"]["threshold"] = fixed
    torch.save(content, path)
    localizer = Localizer.from_checkpoint(path, device="cpu")
    assert (localizer.threshold, localizer.threshold_origin) == (expected, origin)
    assert localizer(picture()).threshold == localizer.threshold
    assert describe(load_config("method=ts_cam"), localizer)["threshold"] == localizer.threshold


def test_only_what_people_call_is_public() -> None:
    assert {name for name in dir(Localizer) if not name.startswith("_")} == {
        "from_checkpoint",
        "raw_maps",
        "at_threshold",
        "module",
        "threshold",
        "threshold_origin",
    }


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"wsolkit": Evil()}, "holds pickled code (exec), or is damaged. It is not read"),
        ({"a.weight": torch.zeros(1)}, "found 1 tensors alone, such as a.weight"),
        ({"state_dict": {}, "epoch": 1}, "found a file of another program, with the entries state_dict, epoch"),
        ([1], "found a list"),
        ({}, "found nothing"),
        ({"wsolkit": {"version": "0.1.0"}}, "is a damaged checkpoint of wsolkit"),
        ({"wsolkit": 3}, "is a damaged checkpoint of wsolkit"),
    ],
)
def test_files_of_unknown_origin_are_refused_and_described(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError) as caught:
        Localizer.from_checkpoint(tmp_path / "x.ckpt")
    assert message in str(caught.value)


def test_weights_of_another_model_are_named(checkpoint: Path, tmp_path: Path) -> None:
    path = edited(checkpoint, tmp_path / "x.ckpt", class_names=["a", "b", "c"])
    with pytest.raises(CheckpointError, match="does not fit the model it names"):
        Localizer.from_checkpoint(path)


def test_package_is_imported_without_torch() -> None:
    code = "import sys, wsolkit; assert 'torch' not in sys.modules; wsolkit.Localizer; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, in_tmp: Path) -> None:
    cfg = load_config(
        *(f"method={method}", "dataset.records.sizes={train: 16, val: 8, test: 8}", "dataset.batch_size=8"),
        *("trainer=smoke", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "num_examples=0"),
        *(["method.fine_tuning.new_from=layer4"] if method == "spa" else []),
        *learned(method),
    )
    train(cfg, in_tmp / "run")
    localizer = Localizer.from_checkpoint(in_tmp / "run" / "checkpoints" / "best.ckpt", device="cpu")
    labels: Sequence[int] = [each.label_index for each in localizer(picture(), top_k=8)]
    assert sorted(labels) == list(range(8))


def test_checkpoint_keeps_the_sizes_of_its_evaluation(checkpoint: Path, tmp_path: Path) -> None:
    """Maps of both sizes and of the mirror images are averaged on the finest grid. An image and its mirror image agree."""
    content = torch.load(checkpoint, weights_only=True)
    content["wsolkit"]["config"]["dataset"] |= {"eval_image_size": [64, 96], "eval_flip": True}
    torch.save(content, tmp_path / "two.ckpt")
    localizer = Localizer.from_checkpoint(tmp_path / "two.ckpt", device="cpu")
    image = np.random.default_rng(0).integers(0, 255, (80, 100, 3), dtype=np.uint8)
    (found,) = localizer.raw_maps(image)
    assert found.raw.shape == (12, 12)  # 96 pixels in patches of 8
    (mirrored,) = localizer.raw_maps(image[:, ::-1], classes=[found.label])
    assert torch.allclose(mirrored.raw.flip(-1), found.raw, atol=1e-4)
    (single,) = Localizer.from_checkpoint(checkpoint, device="cpu").raw_maps(image)
    assert single.raw.shape == (8, 8)


def test_program_has_the_one_size_of_its_evaluation() -> None:
    assert exported_size(load_config("dataset.eval_image_size=96")) == 96
    assert exported_size(load_config("dataset.eval_image_size=[128]")) == 128
    assert exported_size(load_config()) == 128  # as the recipe says
    assert exported_size(load_config("method=cam")) == 64
    with pytest.raises(
        ConfigError, match=r"averages over images of 64, 96 pixels.*add dataset\.eval_image_size=96 dat"
    ):
        exported_size(load_config("dataset.eval_image_size=[64,96]"))
    with pytest.raises(ConfigError, match="64 pixels and their mirror images, and an exported program sees each image"):
        exported_size(load_config("method=cam", "dataset.eval_flip=true"))
