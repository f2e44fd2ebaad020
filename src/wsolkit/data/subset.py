"""Take a part of a data set: some of its classes, a fraction of its training images, or a few of them per class.

`classes` concerns every split. The kept classes are numbered again from 0 in the order of the data set, whatever order
the setting has. Results by class and a checkpoint's `class_names` follow this numbering. When a model is evaluated,
classes have the numbers that the model knows.

`fraction` and `shots` concern the training images of each class. The fraction comes first, and the shots are taken from
it. The seed and the name of the class alone decide which images these are. All processes therefore draw the same
images, the images of a class do not depend on the other classes, and with one seed, fewer images are always among more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from lightning_utilities.core.rank_zero import rank_zero_warn

from wsolkit.data.classes import class_label, known_labels, missing_classes
from wsolkit.data.records import Records, Source, Split, uncut_boxes
from wsolkit.errors import ConfigError, DataError
from wsolkit.types import Boxes, Image, Mask


class Subset:
    """Some images of a split, with their own labels, see `Records`.

    Args:
        records: the records of the split.
        positions: the positions of the images in it [n].
        labels: the labels of these images [n].
        classes: the names of the classes by label.
    """

    def __init__(
        self,
        records: Records,
        positions: npt.NDArray[np.int64],
        labels: npt.NDArray[np.int64],
        classes: Sequence[str],
    ) -> None:
        self.classes, self.labels = classes, labels
        self._records, self._positions = records, positions

    @property
    def whole(self) -> Records:
        """Return the split that the images are a part of."""
        return self._records

    def name(self, index: int) -> str:
        """Return the name, see `Records.name`."""
        return self._records.name(int(self._positions[index]))

    def source(self, index: int) -> Source | None:
        """Return the source, see `Records.source`."""
        return self._records.source(int(self._positions[index]))

    def image(self, index: int) -> Image:
        """Read an image, see `Records.image`."""
        return self._records.image(int(self._positions[index]))

    def boxes(self, index: int) -> Boxes:
        """Return the true boxes, see `Records.boxes`."""
        return self._records.boxes(int(self._positions[index]))

    def uncut_boxes(self, index: int) -> Boxes:
        """Return the boxes before clipping, see `uncut_boxes`."""
        return uncut_boxes(self._records, int(self._positions[index]))

    def size(self, index: int) -> tuple[int, int] | None:
        """Return the size that boxes refer to, see `Records.size`."""
        return self._records.size(int(self._positions[index]))

    def mask(self, index: int) -> Mask | None:
        """Return the mask, see `Records.mask`."""
        return self._records.mask(int(self._positions[index]))


def part_of(
    records: Records,
    split: Split,
    classes: Sequence[str | int] | None,
    fraction: float | None,
    shots: int | None,
    seed: int,
    known: Sequence[str] | None = None,
) -> Records:
    """Return the part of a split that the settings ask for, or `records` itself if they ask for all of it.

    Args:
        records: the records of the split.
        split: the split.
        classes: the names or labels of the classes to keep, or None for all. A name takes precedence over a label.
        fraction: the share of each class's training images, in (0, 1], at least one image. None takes all.
        shots: the number of training images of each class. None takes all.
        seed: the seed of the draw, 0 or more.
        known: the classes of a model by label, whose labels the part then has. None numbers the classes again.

    Raises:
        ConfigError: a setting is out of its range, or there is no such class.
        DataError: a class has fewer training images than `shots`, or the model does not know it.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"dataset.fraction={fraction}: expected a share of the training images, above 0 and up to 1")
    if shots is not None and shots < 1:
        raise ConfigError(f"dataset.shots={shots}: expected 1 or more training images of each class")
    if seed < 0:
        raise ConfigError(f"dataset.subset_seed={seed}: expected 0 or more")
    names = records.classes
    kept = list(range(len(names))) if classes is None else _labels(names, classes)
    if split == "train" and (fraction is not None or shots is not None):
        positions = _draw(records, kept, fraction, shots, seed)
    else:
        positions = np.flatnonzero(np.isin(records.labels, kept))
    numbers = np.full(len(names), -1)
    numbers[kept] = range(len(kept))
    if known is not None:
        numbers[kept] = known_labels(names, kept, set(records.labels[positions].tolist()), known)
    labels = numbers[records.labels[positions]].astype(np.int64)
    if known is not None and (said := missing_classes(split, set(labels.tolist()), known)):
        rank_zero_warn(said)
    kept_names = [names[label] for label in kept] if known is None else list(known)
    if kept_names == list(names) and np.array_equal(labels, records.labels):
        return records
    return Subset(records, positions, labels, kept_names)


def _labels(names: Sequence[str], wanted: Sequence[str | int]) -> list[int]:
    if not wanted:
        raise ConfigError("dataset.classes=[]: name one class or more, or leave it out for all")
    try:
        return sorted({class_label(names, given) for given in wanted})
    except ConfigError as error:
        raise ConfigError(f"dataset.classes: {error}") from error


def _draw(
    records: Records, kept: Sequence[int], fraction: float | None, shots: int | None, seed: int
) -> npt.NDArray[np.int64]:
    """Return the positions of the drawn images, in ascending order."""
    by_label = np.argsort(records.labels, kind="stable")
    ends = np.cumsum(np.bincount(records.labels, minlength=len(records.classes)))
    drawn = []
    for label in kept:
        name, start = records.classes[label], ends[label - 1] if label else 0
        members = np.random.default_rng([seed, *name.encode(errors="surrogateescape")]).permutation(
            by_label[start : ends[label]]
        )
        if fraction is not None:
            members = members[: max(round(fraction * len(members)), 1)]
        if shots is not None and len(members) < shots:
            left = "" if fraction is None else f" after dataset.fraction={fraction}"
            raise DataError(
                f"dataset.shots={shots}: class '{name}' has {len(members)} training images{left}: ask for as many at "
                "most, or leave the class out of dataset.classes"
            )
        drawn.append(members[:shots])
    return np.sort(np.concatenate(drawn))
