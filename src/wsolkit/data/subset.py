"""Parts of a data set: some of its classes, a fraction of its training images, a few of them for each class.

`classes` concerns every split. Those that are kept are numbered anew, from 0, in the data set's own order, whatever
order they are named in: results by class, and a checkpoint's `class_names`, follow that numbering.

`fraction` and `shots` concern the training images of each class: first a fraction of them, then that many of these.
Which ones depends on the seed and the class's name alone. So one process draws what another does; a class's images are
the same whichever classes are kept beside it; and with one seed, fewer images are always among more.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wsolkit.data.records import Records, Source, Split
from wsolkit.errors import ConfigError, DataError
from wsolkit.types import Boxes, Image, Mask


class Subset:
    """Some of the images of a split; see `Records`.

    Args:
        records: of the split.
        positions: of the images in it [n].
        kept: labels that these images may have, in ascending order; their numbers here are 0, 1, ….
    """

    def __init__(self, records: Records, positions: npt.NDArray[np.int64], kept: Sequence[int]) -> None:
        self.classes: Sequence[str] = [records.classes[label] for label in kept]
        self.labels: npt.NDArray[np.int64] = np.searchsorted(kept, records.labels[positions]).astype(np.int64)
        self._records, self._positions = records, positions

    def name(self, index: int) -> str:
        """See `Records.name`."""
        return self._records.name(int(self._positions[index]))

    def source(self, index: int) -> Source | None:
        """See `Records.source`."""
        return self._records.source(int(self._positions[index]))

    def image(self, index: int) -> Image:
        """See `Records.image`."""
        return self._records.image(int(self._positions[index]))

    def boxes(self, index: int) -> Boxes:
        """See `Records.boxes`."""
        return self._records.boxes(int(self._positions[index]))

    def size(self, index: int) -> tuple[int, int] | None:
        """See `Records.size`."""
        return self._records.size(int(self._positions[index]))

    def mask(self, index: int) -> Mask | None:
        """See `Records.mask`."""
        return self._records.mask(int(self._positions[index]))


def choose(
    records: Records,
    split: Split,
    classes: Sequence[str | int] | None,
    fraction: float | None,
    shots: int | None,
    seed: int,
) -> Records:
    """The part of a split that the settings ask for; `records` itself where they ask for all of it.

    Args:
        records: of the split.
        split: which it is.
        classes: names or labels of the classes to keep; a name goes before a label. None: all.
        fraction: of each class's training images, in (0, 1], at least one image. None: all.
        shots: training images of each class. None: all.
        seed: of the draw, 0 or more.

    Raises:
        ConfigError: a setting is out of its range, or there is no such class.
        DataError: a class has fewer training images than `shots`.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigError(f"dataset.fraction={fraction}: expected a share of the training images, above 0 and up to 1")
    if shots is not None and shots < 1:
        raise ConfigError(f"dataset.shots={shots}: expected 1 or more training images of each class")
    if seed < 0:
        raise ConfigError(f"dataset.subset_seed={seed}: expected 0 or more")
    kept = list(range(len(records.classes))) if classes is None else _labels(records.classes, classes)
    if split == "train" and (fraction is not None or shots is not None):
        return Subset(records, _draw(records, kept, fraction, shots, seed), kept)
    if classes is None:
        return records
    return Subset(records, np.flatnonzero(np.isin(records.labels, kept)), kept)


def _labels(names: Sequence[str], wanted: Sequence[str | int]) -> list[int]:
    if not wanted:
        raise ConfigError("dataset.classes=[]: name one class or more, or leave it out for all")
    label_of = {name: label for label, name in enumerate(names)}
    found = set()
    for given in wanted:
        label = label_of.get(str(given), given)
        if isinstance(label, str) or not 0 <= label < len(names):
            close = difflib.get_close_matches(str(given), names, n=1)
            raise ConfigError(
                f"dataset.classes: there is no class '{given}'"
                + (f" (did you mean '{close[0]}'?)" if close else "")
                + f"; expected names, such as '{names[0]}', or labels from 0 to {len(names) - 1}"
            )
        found.add(label)
    return sorted(found)


def _draw(
    records: Records, kept: Sequence[int], fraction: float | None, shots: int | None, seed: int
) -> npt.NDArray[np.int64]:
    """Positions of the images that are drawn, in ascending order."""
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
