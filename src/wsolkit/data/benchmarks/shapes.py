"""Draw the built-in data set: small creatures before a cluttered background, told apart by the colour of their spots.

It is a small version of weakly supervised localization. The classes share body, legs and textures. Only a few spots,
each a few pixels wide, tell them apart: one on the head, and three anywhere on the flank. A classifier needs one spot,
so its map tends to cover only that spot. A good localizer covers the creature. Patches of every colour, dots in the
spots' colours, and bars that hide parts of the creature lie before and around it. Position, size, direction and colours
vary.

The seed, the split and the index determine an image, and nothing is on disk. Boxes and masks come with the images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from wsolkit.data.records import Split
from wsolkit.errors import ConfigError
from wsolkit.types import Boxes, Image, Mask

_COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 190, 50),
    "blue": (40, 70, 235),
    "yellow": (245, 225, 30),
    "magenta": (225, 40, 225),
    "cyan": (30, 220, 225),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
_RIM = (60, 40, 25)  # This colour surrounds the spots of every creature.
_FUR = (200, 140, 70)
_FLANK_SPOTS = 3
CLASSES = tuple(f"{colour} spots" for colour in _COLOURS)

_SPLIT_NUMBER: Mapping[Split, int] = {"train": 0, "val": 1, "test": 2}
Bars = Literal["dull", "vivid"]

_SHIFT = 4  # OpenCV's drawing coordinates have this many fractional bits.


class ShapesRecords:
    """Images of one split, drawn on first use and kept in memory.

    Args:
        split: the split. Splits differ in their random numbers.
        sizes: the number of images of each split.
        image_size: the side in pixels.
        seed: the seed of the whole data set.
        bars: whether the bars that hide parts of an image have "dull" colours like the background, or "vivid" ones.
    """

    def __init__(self, split: Split, sizes: Mapping[str, int], image_size: int, seed: int, bars: Bars = "dull") -> None:
        if sizes[split] < 1:
            raise ConfigError(f"dataset.sizes.{split}={sizes[split]}: expected 1 or more images")
        self.classes: Sequence[str] = CLASSES
        self.labels: npt.NDArray[np.int64] = np.arange(sizes[split], dtype=np.int64) % len(CLASSES)
        self._split, self._image_size, self._seed, self._bars = split, image_size, seed, bars
        self._drawn: dict[int, tuple[Image, Mask]] = {}

    def name(self, index: int) -> str:
        """Return the name, see `Records.name`."""
        return f"{self._split}/{index:05d}"

    def source(self, index: int) -> None:
        """Return None, see `Records.source`."""

    def image(self, index: int) -> Image:
        """Return an image, see `Records.image`."""
        return self._draw(index)[0]

    def mask(self, index: int) -> Mask:
        """Return the mask of the creature's visible part, see `Records.mask`."""
        return self._draw(index)[1]

    def boxes(self, index: int) -> Boxes:
        """Return one box around the creature's visible part, see `Records.boxes`."""
        rows, columns = np.nonzero(self.mask(index))
        return np.array([[columns.min(), rows.min(), columns.max(), rows.max()]], dtype=np.int64)

    def size(self, index: int) -> None:
        """Return None, see `Records.size`."""
        return None

    def _draw(self, index: int) -> tuple[Image, Mask]:
        if index not in self._drawn:
            rng = np.random.default_rng([self._seed, _SPLIT_NUMBER[self._split], index])
            self._drawn[index] = draw(rng, int(self.labels[index]), self._image_size, self._bars)
        return self._drawn[index]


def draw(rng: np.random.Generator, label: int, size: int, bars: Bars = "dull") -> tuple[Image, Mask]:
    """Draw one image [size, size, 3] of a class and the mask of the creature's visible part (0, 1)."""
    image = _background(rng, size)
    mask = np.zeros((size, size), np.uint8)
    _creature(rng, image, mask, label)
    for _ in range(rng.integers(0, 3)):
        _bar(rng, image, mask, bars)
    noise = rng.normal(0, 6, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8), mask


def _background(rng: np.random.Generator, size: int) -> Image:
    coarse = rng.uniform(80, 180, (4, 4, 3)).astype(np.float32)
    coarse = 0.5 * coarse + 0.5 * coarse.mean(axis=-1, keepdims=True)  # duller than what lies before it
    image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    for _ in range(rng.integers(3, 7)):  # This clutter has the colours of the creatures, and sometimes their fur.
        corners = rng.uniform(0, size, 2) + rng.uniform(-0.14, 0.14, (rng.integers(3, 6), 2)) * size
        region = np.zeros((size, size), np.uint8)
        cv2.fillPoly(region, [cv2.convexHull(corners.astype(np.int32))], 1)
        if rng.random() < 0.15:
            _paint_fur(rng, image, region)
        else:
            image[region > 0] = rng.uniform(30, 220, 3)
    for _ in range(rng.integers(1, 5)):  # These are dots in the spots' colours.
        colour = _COLOURS[rng.choice(list(_COLOURS))]
        _disc(image, rng.uniform(0, size, 2), size * rng.uniform(0.025, 0.04), _tint(rng, colour))
    return np.asarray(image, np.uint8)


def _creature(rng: np.random.Generator, image: Image, mask: Mask, label: int) -> None:
    size = len(image)
    length = size * rng.uniform(0.12, 0.24)  # This is half the length of the body.
    width = length * rng.uniform(0.5, 0.75)
    angle = rng.uniform(0, 2 * np.pi)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    centre = rng.uniform(1.2 * length, size - 1.2 * length, 2)
    side = rng.choice([-1, 1])

    cv2.ellipse(mask, _fixed(centre), _fixed((length, width)), np.degrees(angle), 0, 360, 1, -1, cv2.LINE_8, _SHIFT)
    for at in rng.uniform(-0.75, 0.75, rng.integers(2, 5)):  # These are the legs.
        hip = centre + along * at * length + side * across * width * 0.6
        foot = hip + side * across * length * rng.uniform(0.5, 0.8) + along * rng.uniform(-0.1, 0.1) * length
        cv2.line(mask, _fixed(hip), _fixed(foot), 1, max(1, round(size * 0.05)), cv2.LINE_8, _SHIFT)
    head = centre + along * length * 1.1
    _disc(mask, head, length * 0.38, 1)
    _paint_fur(rng, image, mask)

    turn, reach = rng.uniform(0, 2 * np.pi, _FLANK_SPOTS), np.sqrt(rng.uniform(0, 0.8, _FLANK_SPOTS))
    flank = centre + np.outer(reach * np.cos(turn), along * length) + np.outer(reach * np.sin(turn), across * width)
    radius = max(size * 0.04, 2.0)
    for spot in (head, *flank):
        _disc(mask, spot, radius * 1.4, 1)
        _disc(image, spot, radius * 1.4, _RIM)
        _disc(image, spot, radius * 0.9, _tint(rng, _COLOURS[list(_COLOURS)[label]]))


def _paint_fur(rng: np.random.Generator, image: Image, region: Mask) -> None:
    """Fill a region with brownish stripes or checks."""
    size = len(image)
    colour = np.array(_FUR) * rng.uniform(0.6, 1.15) + rng.uniform(-20, 20, 3)
    rows, columns = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), size * rng.uniform(0.06, 0.12)
    wave = np.sin((rows * np.sin(angle) + columns * np.cos(angle)) * 2 * np.pi / period)
    if rng.random() < 0.5:
        wave = wave * np.sin((rows * np.cos(angle) - columns * np.sin(angle)) * 2 * np.pi / period)
    shade = 1 + rng.uniform(0.1, 0.35) * np.sign(wave)
    image[region > 0] = np.clip(colour * shade[..., None], 0, 255)[region > 0]


def _bar(rng: np.random.Generator, image: Image, mask: Mask, bars: Bars) -> None:
    """Hide a strip of the image."""
    size = len(image)
    angle = rng.uniform(0, np.pi)
    offset = np.array([np.cos(angle), np.sin(angle)]) * size
    middle = rng.uniform(0.2, 0.8, 2) * size
    strip = np.zeros_like(mask)
    cv2.line(
        strip,
        _fixed(middle - offset),
        _fixed(middle + offset),
        1,
        max(1, round(size * 0.04)),
        cv2.LINE_8,
        _SHIFT,
    )
    if bars == "vivid":
        image[strip > 0] = rng.uniform(30, 220, 3)
    else:
        colour = rng.uniform(80, 180, 3)
        image[strip > 0] = 0.2 * colour + 0.8 * colour.mean()
    # It never hides the whole creature, because a box needs something to surround.
    if (mask & (1 - strip)).any():
        mask[strip > 0] = 0


def _disc(image: npt.NDArray[np.uint8], centre: npt.NDArray[np.float64], radius: float, colour: Any) -> None:
    cv2.circle(image, _fixed(centre), round(radius * 2**_SHIFT), colour, -1, cv2.LINE_8, _SHIFT)


def _tint(rng: np.random.Generator, colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(np.clip(np.array(colour) + rng.uniform(-20, 20, 3), 0, 255).tolist())


def _fixed(point: Any) -> tuple[int, int]:
    x, y = np.round(np.asarray(point) * 2**_SHIFT).astype(int).tolist()
    return x, y
