"""From records to samples and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wsolkit.data.cache import ImageCache
from wsolkit.data.pixels import Pixels, normalised_batch
from wsolkit.data.records import Records, uncut_boxes
from wsolkit.data.seeding import derive_seed
from wsolkit.data.transforms import Transform
from wsolkit.errors import DataError
from wsolkit.types import Boxes, EvaluationBatch, Image, Mask, TrainingBatch


class Sample(TypedDict):
    """One image: transformed, with `boxes` and `mask` carried along, and its original boxes and size (w, h).

    uncut_boxes: the original boxes before they were cut off at the edges of the image.
    uncropped, uncropped_mask: the same after the second transform, where there is one.
    """

    image: Pixels
    label: int
    index: int
    boxes: Boxes
    mask: Mask | None
    original_boxes: Boxes
    uncut_boxes: Boxes
    size: tuple[int, int]
    uncropped: Pixels | None
    uncropped_mask: Mask | None


class WSOLDataset(Dataset[Sample]):
    """Samples of a split.

    Indices are pairs (epoch, position): the augmentation of a sample depends on them and the seed alone, so it is the
    same whatever the number of workers and processes, and different in every epoch.

    Args:
        records: of the split.
        transform: from an image as read to what the network takes.
        seed: of the augmentations.
        uncropped: a second transform of the same image.
        cache: the images at a size that loses nothing for the transforms.
    """

    def __init__(
        self,
        records: Records,
        transform: Transform,
        seed: int,
        uncropped: Transform | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.records = records
        self.transform = transform
        self.seed = seed
        self.uncropped = uncropped
        self.cache = cache

    def __len__(self) -> int:
        return len(self.records.labels)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image, (width, height) = self._image(index)
        boxes, mask = self.records.boxes(index), self.records.mask(index)
        if mask is not None:
            _check_shape(self.records.name(index), mask, width, height)
        transformed = self.transform(image, boxes, mask, derive_seed(self.seed, epoch, index), (width, height))
        second = None if self.uncropped is None else self.uncropped(image, boxes, mask, 0, (width, height))
        return {
            "image": transformed.image,
            "label": int(self.records.labels[index]),
            "index": index,
            "boxes": transformed.boxes,
            "mask": transformed.mask,
            "original_boxes": boxes,
            "uncut_boxes": uncut_boxes(self.records, index),
            "size": self.records.size(index) or (width, height),
            "uncropped": None if second is None else second.image,
            "uncropped_mask": None if second is None else second.mask,
        }

    def _image(self, index: int) -> tuple[Image, tuple[int, int]]:
        """An image, perhaps resized, and the width and height that it has in the records."""
        if self.cache is not None:
            return self.cache.image(index)
        image = self.records.image(index)
        return image, (image.shape[1], image.shape[0])


def _check_shape(name: str, mask: Mask, width: int, height: int) -> None:
    h, w = mask.shape
    # Equal proportions, as far as sides in whole pixels can have them.
    if abs(h * width - w * height) > h + w + height + width:
        raise DataError(f"mask of '{name}' is {w}×{h}, its image {width}×{height}: expected the same proportions")


def training_batch(samples: Sequence[Sample]) -> TrainingBatch:
    """Collate what losses need."""
    return {
        "image": normalised_batch([sample["image"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }


def evaluation_batch(samples: Sequence[Sample]) -> EvaluationBatch:
    """Collate what losses and metrics need."""
    uncropped = [sample["uncropped"] for sample in samples if sample["uncropped"] is not None]
    return {
        **training_batch(samples),
        "boxes": [sample["original_boxes"] for sample in samples],
        "uncut_boxes": [sample["uncut_boxes"] for sample in samples],
        "size": torch.tensor([sample["size"] for sample in samples]),
        "mask": _stack_masks([sample["mask"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "uncropped": normalised_batch(uncropped) if uncropped else None,
        "uncropped_mask": _stack_masks([sample["uncropped_mask"] for sample in samples]),
    }


def _stack_masks(masks: Sequence[Mask | None]) -> Tensor | None:
    """Stack the masks of a batch, 255 (ignored) everywhere in that of an image without one; None if none has one."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    nothing = np.full_like(present[0], 255)
    return torch.from_numpy(np.stack([nothing if mask is None else mask for mask in masks]))


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Training batches: each epoch a new permutation, cut into global batches, each cut into one part per process.

    The images of a step depend on seed and epoch alone, not on the number of processes. The incomplete batch at the
    end is left out, since a loss over the batch (SAT's area) means something else there; a data set smaller than one
    batch makes one batch a step.

    Args:
        length: number of images.
        batch_size: images per forward pass, over all processes.
        seed: of the permutations.
        rank, world_size: which process this is, of how many.

    Attributes:
        epoch: number of the next epoch.
        skip: how many batches at its start are left out, since they were trained on before an interruption.

    Raises:
        DataError: there are fewer images than processes.
    """

    def __init__(self, length: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        size = min(batch_size, length) // world_size * world_size
        if size == 0:
            raise DataError(f"{length} training images cannot be spread over {world_size} processes: use fewer devices")
        self.length, self.size, self.seed, self.rank, self.world_size = length, size, seed, rank, world_size
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return self.length // self.size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, skip = self.epoch, self.skip
        self.epoch, self.skip = epoch + 1, 0
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        for start in range(skip * self.size, len(self) * self.size, self.size):
            part = order[start + self.rank : start + self.size : self.world_size]
            yield [(epoch, index) for index in part.tolist()]


class Place(TypedDict, total=False):
    """Where in which epoch training is.

    epoch: its number; taken: how many batches of it were trained on; over: whether it has ended, validation and all.
    batch: images of a batch, over all processes; images: of the data set; seed: of their order; these three are not in
    early checkpoints, nor is `over`.
    """

    epoch: int
    taken: int
    over: bool
    batch: int
    images: int
    seed: int


class TrainingLoader(DataLoader[Sample]):
    """Loads training batches, and says and restores where in which epoch it is.

    Counts the batches that were taken, not those that its workers have prepared.

    Args:
        dataset, batches: what is loaded, in which order.
        limit: batches of an epoch, if the trainer takes fewer than there are.
        accumulate: batches of an optimizer step.
        ended: whether an epoch has ended before its last batch, as trainer.max_steps has it; its number is given.
        options: see `DataLoader`.

    Attributes:
        start: where it begins: number of an epoch, how many batches of it are left out, and whether it was within the
            epoch that training stopped.
    """

    def __init__(
        self,
        dataset: WSOLDataset,
        batches: GlobalBatches,
        limit: int,
        accumulate: int = 1,
        ended: Callable[[int], bool] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batches, collate_fn=training_batch, **options)
        self._batches, self._limit, self._accumulate, self._ended = batches, limit, accumulate, ended
        self._epoch, self._taken = -1, limit
        self.start = (0, 0, False)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._epoch, self._taken = self._batches.epoch, self._batches.skip
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    def state_dict(self) -> Place:
        """Lightning's hook: where training is."""
        own = self._batches
        return {
            "epoch": self._epoch,
            "taken": self._taken,
            "over": self._taken >= self._limit or (self._ended is not None and self._ended(self._epoch)),
            "batch": own.size,
            "images": own.length,
            "seed": own.seed,
        }

    def load_state_dict(self, state_dict: Place) -> None:
        """Lightning's hook: go on within the epoch, or with the next one."""
        epoch, taken = state_dict["epoch"], state_dict["taken"]
        within = not state_dict.get("over", taken >= self._limit)
        epoch, skip = (epoch, self._skipped(state_dict)) if within else (epoch + 1, 0)
        self._batches.epoch, self._batches.skip = epoch, skip
        self.start = epoch, skip, within
        # What a checkpoint says that is written before the next batch.
        self._epoch, self._taken = (epoch, skip) if within else (epoch - 1, self._limit)

    def _skipped(self, place: Place) -> int:
        """How many batches to leave out: whole optimizer steps, and never the last one, after which comes validation.

        Where steps had other sizes, it goes on with the first step that begins at or after the images trained on.
        """
        size, before = self._batches.size, place.get("batch", self._batches.size)
        trained = place["taken"] * before
        steps = math.ceil(trained / (size * self._accumulate))
        skip = min(steps, math.ceil(self._limit / self._accumulate) - 1) * self._accumulate
        if size != before or skip * size != trained:
            rank_zero_warn(
                f"epoch {place['epoch']} goes on after {skip * size} of its {self._limit * size} images: the "
                f"checkpoint's run had trained on {trained}, in batches of {before}; they are of {size} now"
            )
        return skip


class EachOnce(Sampler[tuple[int, int]]):
    """Evaluation order: every image once over all processes, none repeated to fill up."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.positions = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.positions)


def one_thread(_: Any) -> None:
    """Start a loader's worker: one thread each, so that workers do not compete for the cores."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
