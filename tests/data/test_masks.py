"""Masks: merged from files, scaled with their image, and stacked with images that have none."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from wsolkit.data.dataset import WSOLDataset, evaluation_batch
from wsolkit.data.masks import MaskFiles
from wsolkit.data.records import Names, file_records
from wsolkit.data.transforms import Transform
from wsolkit.errors import DataError


def save(path: Path, levels: np.ndarray, mode: str = "L") -> None:
    PIL.Image.fromarray(levels.astype(np.uint8)).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB"])
def test_masks_of_an_image_are_merged_and_objects_go_before_ignored_regions(tmp_path: Path, mode: str) -> None:
    left, middle, ignore = (np.zeros((4, 6)) for _ in range(3))
    left[:, 0], middle[1, 2], ignore[:2] = 255, 255, 255
    for name, levels in {"left": left, "middle": middle, "ignore": ignore}.items():
        save(tmp_path / f"{name}.png", levels, mode)
    masks = MaskFiles(tmp_path, [["left.png", "middle.png"], ["left.png"], []], ["ignore.png", "", ""], 0)
    assert masks(0).tolist() == [  # type: ignore[union-attr]
        [1, 255, 255, 255, 255, 255],
        [1, 255, 1, 255, 255, 255],
        [1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
    ]
    assert np.unique(masks(1)).tolist() == [0, 1]  # type: ignore[arg-type]
    assert masks(2) is None


def test_files_of_other_sizes_are_brought_to_the_first(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.full((4, 6), 0))
    save(tmp_path / "b.png", np.kron([[0, 255]], np.ones((8, 6))))
    mask = MaskFiles(tmp_path, [["a.png", "b.png"]], None, 0)(0)
    assert mask is not None
    assert mask.tolist() == [[0, 0, 0, 1, 1, 1]] * 4


def test_missing_and_broken_masks_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")
    masks = MaskFiles(tmp_path, [["a.png"], ["b.png"]], None, 0)
    with pytest.raises(DataError, match=r"mask '.*a\.png' does not exist"):
        masks(0)
    with pytest.raises(DataError, match=r"mask '.*b\.png' cannot be decoded"):
        masks(1)


NUMBERS = np.array([[0, 0, 1], [2, 2, 0]], np.uint8)
MARKED = (NUMBERS > 0).astype(np.uint8)


def palette(*colours: tuple[int, int, int]) -> PIL.Image.Image:
    mask = PIL.Image.fromarray(NUMBERS, "P")
    mask.putpalette([level for colour in colours for level in colour])
    return mask


def opaque(grey: int, opacity: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.stack([np.full_like(opacity, grey), opacity], axis=2))


BLACK, RED, BLUE, WHITE = (0, 0, 0), (128, 0, 0), (0, 0, 128), (255, 255, 255)
READ = {
    "numbers.png": PIL.Image.fromarray(NUMBERS),
    "bits.png": PIL.Image.fromarray(MARKED * 255).convert("1"),
    "bits.tif": PIL.Image.fromarray(MARKED * 255).convert("1"),
    "sixteen.png": PIL.Image.fromarray(MARKED.astype(np.uint16)),
    "sixteen bits, all.png": PIL.Image.fromarray(MARKED.astype(np.uint16) * 65535),
    "float.tif": PIL.Image.fromarray(MARKED.astype(np.float32) / 1000),
    "colours.png": palette(BLACK, RED, BLUE),
    "greys in any order.png": PIL.Image.fromarray(1 - MARKED, "P"),
    "no background in view.png": PIL.Image.fromarray(MARKED * 255).convert("RGBA"),
    "opacity says the same.png": PIL.Image.fromarray(np.stack([MARKED * 255] * 2, axis=2)),
}
READ["greys in any order.png"].putpalette([255, 255, 255, 0, 0, 0])


@pytest.mark.parametrize("name", READ)
def test_what_a_mask_marks_does_not_depend_on_how_it_is_stored(tmp_path: Path, name: str) -> None:
    READ[name].save(tmp_path / name)
    assert MaskFiles(tmp_path, [[name]], None, 0)(0).tolist() == MARKED.tolist()  # type: ignore[union-attr]


UNCLEAR = {
    "another black.png": (palette(BLACK, BLACK, RED), "has a palette in which another colour than number 0 is black"),
    "coloured background.png": (palette(RED, BLUE, WHITE), "has a palette in which another colour than number 0"),
    "white, cut out.png": (opaque(255, MARKED * 255), "marks pixels by its opacity, and others by its grey levels"),
    "black, cut out.png": (opaque(0, MARKED * 255), "marks pixels by its opacity, and others by its grey levels"),
    "integers.tif": (
        PIL.Image.fromarray(NUMBERS.astype(np.int32)),
        "is of mode I and holds int32 with values from 0 to 2",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_masks_that_may_mean_one_thing_or_another_are_named(tmp_path: Path, name: str) -> None:
    mask, message = UNCLEAR[name]
    mask.save(tmp_path / name)
    with pytest.raises(DataError) as caught:
        MaskFiles(tmp_path, [[name]], None, 0)(0)
    assert str(caught.value).startswith(f"mask '{tmp_path / name}' {message}")


def test_masks_of_0_and_1_are_named_where_grey_levels_up_to_255_are_expected(tmp_path: Path) -> None:
    PIL.Image.fromarray(MARKED).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x.png' holds nothing above 1, and marks are above 127: .* threshold of 0"):
        MaskFiles(tmp_path, [["x.png"]], None, 127)(0)
    save(tmp_path / "nothing.png", np.zeros((2, 3)))
    assert MaskFiles(tmp_path, [["nothing.png"]], None, 127)(0).max() == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(300, 500), (480, 800), (61, 101)])
def test_masks_are_scaled_from_their_own_pixels(shape: tuple[int, int]) -> None:
    """As the reference evaluations do: the nearest pixel of the mask as it is stored."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 500, 3), dtype=np.uint8)
    mask = rng.choice(np.array([0, 1, 255], np.uint8), shape)
    out = Transform(224, 224, False, (0.5,) * 3, (0.5,) * 3)(image, np.zeros((0, 4), np.int64), mask, 0)
    assert out.mask is not None
    assert np.array_equal(out.mask, cv2.resize(mask, (224, 224), interpolation=cv2.INTER_NEAREST))


def test_images_without_mask_are_ignored_beside_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png", np.full((8, 8), 255))

    def batch(objects: list[list[str]]) -> list[int] | None:
        masks = MaskFiles(tmp_path, objects, None, 0)
        records = file_records(tmp_path, ["a.png", "b.png"], [0, 0], ["x"], {}, None, masks)
        dataset = WSOLDataset(records, Transform(8, 8, False, (0.5,) * 3, (0.5,) * 3), 0)
        stacked = evaluation_batch([dataset[0, 0], dataset[0, 1]])["mask"]
        return None if stacked is None else [int(level) for level in stacked[:, 3, 3]]

    assert batch([["a.png"], []]) == [1, 255]
    assert batch([[], []]) is None


def test_names_are_kept_as_they_are() -> None:
    names = ["a b/ü.jpg", "", "Ж,1.png"]
    kept = Names(names)
    assert [kept[index] for index in range(len(kept))] == names
    assert len(Names([])) == 0
