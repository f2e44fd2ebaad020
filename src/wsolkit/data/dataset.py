"""Turn records into samples and batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wsolkit.data.cache import ImageCache
from wsolkit.data.pixels import Pixels, normalised_batch
from wsolkit.data.records import Records, uncut_boxes
from wsolkit.data.seeding import derive_seed
from wsolkit.data.targets import Targets
from wsolkit.data.transforms import Transform
from wsolkit.errors import ConfigError, DataError
from wsolkit.types import Boxes, EvaluationBatch, Image, Mask, Tokens, TrainingBatch, View


class Sample(TypedDict):
    """One image (`Pixels`, or `Tokens`), its transformed `boxes` and `mask`, and its original boxes and size (w, h).

    uncut_boxes: the original boxes before they were clipped at the edges of the image.
    uncropped, uncropped_mask: image and mask after the second transform, if there is one.
    views, uncropped_views: the image at the sizes of the evaluation, and whether it is mirrored.
    pseudo_box, pseudo_mask: what training learns beside the label, see `TrainingBatch`, or None.
    """

    image: Any
    label: int
    index: int
    boxes: Boxes
    mask: Mask | None
    original_boxes: Boxes
    uncut_boxes: Boxes
    size: tuple[int, int]
    uncropped: Pixels | None
    uncropped_mask: Mask | None
    views: list[tuple[Pixels | Tokens, bool]]
    uncropped_views: list[tuple[Pixels | Tokens, bool]]
    pseudo_box: npt.NDArray[np.float32] | None
    pseudo_mask: Mask | None


@dataclass(frozen=True)
class Sizes:
    """The sizes at which an evaluation shows images to the network, besides the one at which it is trained.

    Args:
        whole: transforms of the whole image to each size.
        uncropped: transforms to the sizes from which protocols cut, or () if no protocol does.
        mirrored: whether the network sees each image mirrored, too.
    """

    whole: Sequence[Transform] = ()
    uncropped: Sequence[Transform] = ()
    mirrored: bool = False

    @classmethod
    def of(
        cls,
        image_size: int,
        resize: int | None,
        sizes: int | Sequence[int] | None,
        mirrored: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Sizes:
        """Make the transforms.

        Args:
            image_size: the side at which the network is trained.
            resize: the side from which protocols cut `image_size`, or None if none does.
            sizes: the sides of the evaluation. None is `image_size`.
            mirrored: see the class.
            mean, std: see `Transform`.
        """
        sides = [image_size] if sizes is None else [sizes] if isinstance(sizes, int) else list(sizes)
        if not sides:
            raise ConfigError("dataset.eval_image_size=[]: expected one size or more, or null for dataset.image_size")
        if sides == [image_size] and not mirrored:
            return cls()
        whole = [Transform(side, side, False, mean, std) for side in sides]
        larger = [] if resize is None else [round(side * resize / image_size) for side in sides]
        return cls(whole, [Transform(side, side, False, mean, std) for side in larger], mirrored)


class WSOLDataset(Dataset[Sample]):
    """Samples of a split.

    Indices are pairs (epoch, position). The augmentation of a sample depends only on them and on the seed. It is
    therefore the same for any number of workers and processes, and differs between epochs.

    Args:
        records: the records of the split.
        transform: turns an image as read into the input of the network.
        seed: the seed of the augmentations.
        uncropped: a second transform of the same image.
        cache: the images at a size that is large enough for the transforms.
        sizes: the sizes of an evaluation.
        targets: what training learns beside the labels, in place of the true boxes and masks. None is nothing.
    """

    def __init__(
        self,
        records: Records,
        transform: Transform,
        seed: int,
        uncropped: Transform | None = None,
        cache: ImageCache | None = None,
        sizes: Sizes = Sizes(),
        targets: Targets | None = None,
    ) -> None:
        self.records = records
        self.targets = targets
        self.sizes = sizes
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
            check_shape(self.records.name(index), mask, width, height)
        if self.targets is not None:
            boxes, mask = self.targets.boxes_of(index), self.targets.mask_of(self.records.name(index))
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
            "views": self._views(image, self.sizes.whole),
            "uncropped_views": self._views(image, self.sizes.uncropped),
            "pseudo_box": self._pseudo_box(transformed.shares),
            "pseudo_mask": None if self.targets is None else transformed.mask,
        }

    def _pseudo_box(self, shares: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """Return the largest of an image's pseudo boxes, NaN if it has none or its crop does not show it."""
        if self.targets is None or self.targets.boxes is None:
            return None
        if len(shares) == 0:
            return np.full(4, np.nan, np.float32)
        return shares[np.argmax(shares[:, 2] * shares[:, 3])]  # type: ignore[no-any-return]

    def _views(self, image: Image, transforms: Sequence[Transform]) -> list[tuple[Pixels | Tokens, bool]]:
        views: list[tuple[Pixels | Tokens, bool]] = []
        for transform in transforms:
            seen = transform(image, np.zeros((0, 4), np.int64), None, 0).image
            views.append((seen, False))
            if self.sizes.mirrored:
                views.append((seen._replace(image=np.ascontiguousarray(seen.image[:, ::-1])), True))
        return views

    def _image(self, index: int) -> tuple[Image, tuple[int, int]]:
        """Return an image, which may be resized, and its width and height in the records."""
        if self.cache is not None:
            return self.cache.image(index)
        image = self.records.image(index)
        return image, (image.shape[1], image.shape[0])


def check_shape(name: str, mask: Mask, width: int, height: int) -> None:
    """Check that a mask has the proportions of its image.

    Raises:
        DataError: it does not.
    """
    h, w = mask.shape
    # Proportions are equal as far as sides in whole pixels allow.
    if abs(h * width - w * height) > h + w + height + width:
        raise DataError(f"mask of '{name}' is {w}×{h}, its image {width}×{height}: expected the same proportions")


def training_batch(samples: Sequence[Sample]) -> TrainingBatch:
    """Collate what losses need."""
    batch: TrainingBatch = {
        "image": _input([sample["image"] for sample in samples]),
        "label": torch.tensor([sample["label"] for sample in samples]),
    }
    boxes = [sample["pseudo_box"] for sample in samples if sample["pseudo_box"] is not None]
    masks = [sample["pseudo_mask"] for sample in samples if sample["pseudo_mask"] is not None]
    if boxes:
        batch["pseudo_box"] = torch.from_numpy(np.stack(boxes))
    if masks:
        batch["pseudo_mask"] = torch.from_numpy(np.stack(masks))
    return batch


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
        "views": _views([sample["views"] for sample in samples]),
        "uncropped_views": _views([sample["uncropped_views"] for sample in samples]),
    }


def _views(samples: Sequence[Sequence[tuple[Pixels | Tokens, bool]]]) -> list[View]:
    """Return a batch in each of several views, given the views of each sample."""
    return [View(_input([image for image, _ in view]), view[0][1]) for view in zip(*samples, strict=True)]


def _input(images: Sequence[Pixels | Tokens]) -> Tensor | Tokens:
    """Stack images, or tokens in half precision, as the network's input in single precision."""
    if isinstance(images[0], Pixels):
        return normalised_batch(cast("Sequence[Pixels]", images))
    parts = zip(*images, strict=True)
    return Tokens(*(torch.from_numpy(np.stack(part)).float() for part in parts))


def _stack_masks(masks: Sequence[Mask | None]) -> Tensor | None:
    """Stack the masks of a batch, with 255 (ignored) everywhere for an image without one. None if none has one."""
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    nothing = np.full_like(present[0], 255)
    return torch.from_numpy(np.stack([nothing if mask is None else mask for mask in masks]))


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Training batches. Each epoch is a new permutation, cut into global batches, each cut into one part per process.

    The images of a step depend only on seed and epoch, and not on the number of processes. The incomplete batch at the
    end is left out, since a loss over the batch (SAT's area) means something else there. A data set that is smaller
    than one batch makes one batch per step.

    Args:
        length: the number of images.
        batch_size: the images per forward pass, over all processes.
        seed: the seed of the permutations.
        rank, world_size: the number of this process, and of all processes.
        pairs: the labels of the images, if batches hold pairs of images of one class, see `pairs_of_classes`. The
            images 2k and 2k + 1 of a process's batch are then a pair. None takes the images one by one.

    Attributes:
        epoch: the number of the next epoch.
        skip: the number of batches that it leaves out at the start, because a run trained on them before an
            interruption.

    Raises:
        DataError: there are fewer images than processes, or fewer pairs.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        pairs: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._group, self._pairs, self._seen = 1, pairs, length
        if pairs is not None:
            self._group, self._seen = 2, 2 * int(np.ceil(np.unique(pairs, return_counts=True)[1] / 2).sum())
        unit = world_size * self._group
        size = min(batch_size, self._seen) // unit * unit
        if size == 0:
            what = "images" if pairs is None else "images, in pairs of one class,"
            raise DataError(f"{length} training {what} cannot be spread over {world_size} processes: use fewer devices")
        self.length, self.size, self.seed, self.rank, self.world_size = length, size, seed, rank, world_size
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return self._seen // self.size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, skip = self.epoch, self.skip
        self.epoch, self.skip = epoch + 1, 0
        draws = np.random.default_rng([self.seed, epoch])
        order = draws.permutation(self.length) if self._pairs is None else pairs_of_classes(self._pairs, draws)
        groups, count = order.reshape(-1, self._group), self.size // self._group
        for start in range(skip * count, len(self) * count, count):
            part = groups[start + self.rank : start + count : self.world_size]
            yield [(epoch, index) for index in part.ravel().tolist()]


def pairs_of_classes(labels: npt.NDArray[np.int64], draws: np.random.Generator) -> npt.NDArray[np.int64]:
    """Pair each image with another one of its class, at random.

    Each image is in one pair. If a class has an odd number of images, one of them is in two pairs. A class of one image
    makes a pair of this image twice.

    Args:
        labels: the labels of the images [n].
        draws: draws the pairs and their order.

    Returns:
        the indices of pairs [m, 2], in a random order.

    >>> import numpy as np
    >>> from wsolkit.data.dataset import pairs_of_classes
    >>> pairs_of_classes(np.array([0, 1, 0]), np.random.default_rng(0)).tolist()
    [[1, 1], [0, 2]]
    """
    order = draws.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, and at random within each
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    odd = counts % 2 == 1
    pairs: npt.NDArray[np.int64] = np.insert(order, (starts + counts)[odd], order[starts[odd]]).reshape(-1, 2)
    return pairs[draws.permutation(len(pairs))]


class Place(TypedDict, total=False):
    """The position of training in the training images.

    epoch: the number of the epoch; taken: the number of its batches that were trained on; over: whether it has ended
    with its validation; batch: the images of a batch, over all processes; images: the images of the data set; seed: the
    seed of their order. Early checkpoints lack the last three and `over`.
    """

    epoch: int
    taken: int
    over: bool
    batch: int
    images: int
    seed: int


class TrainingLoader(DataLoader[Sample]):
    """Loads training batches, and saves and restores its position in the epoch.

    It counts the batches that training took, and not those that its workers have prepared.

    Args:
        dataset, batches: the images, and their order.
        limit: the batches of an epoch, if the trainer takes fewer than there are.
        accumulate: the batches of an optimizer step.
        ended: says whether the epoch of a number has ended before its last batch, because of trainer.max_steps.
        options: see `DataLoader`.

    Attributes:
        start: where it begins: the number of an epoch, the number of its batches that are left out, and whether
            training stopped within this epoch.
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
        """Return the position of training."""
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
        """Continue within the epoch, or with the next one."""
        epoch, taken = state_dict["epoch"], state_dict["taken"]
        within = not state_dict.get("over", taken >= self._limit)
        epoch, skip = (epoch, self._skipped(state_dict)) if within else (epoch + 1, 0)
        self._batches.epoch, self._batches.skip = epoch, skip
        self.start = epoch, skip, within
        # A checkpoint that is written before the next batch has this position.
        self._epoch, self._taken = (epoch, skip) if within else (epoch - 1, self._limit)

    def _skipped(self, place: Place) -> int:
        """Return how many batches to leave out: whole optimizer steps, but never the last one before the validation.

        If steps had other sizes, it continues with the first step that begins at or after the images trained on.
        """
        size, before = self._batches.size, place.get("batch", self._batches.size)
        trained = place["taken"] * before
        steps = math.ceil(trained / (size * self._accumulate))
        skip = min(steps, math.ceil(self._limit / self._accumulate) - 1) * self._accumulate
        if size != before or skip * size != trained:
            rank_zero_warn(
                f"epoch {place['epoch']} continues after {skip * size} of its {self._limit * size} images: the "
                f"checkpoint's run had trained on {trained}, in batches of {before}, and now they have {size}"
            )
        return skip


class EachOnce(Sampler[tuple[int, int]]):
    """The order of an evaluation: every image once over all processes, without repetitions to fill up."""

    def __init__(self, length: int, rank: int, world_size: int) -> None:
        self.positions = range(rank, length, world_size)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.positions)


def one_thread(_: Any) -> None:
    """Give each loader worker one thread, so that workers do not compete for the cores."""
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
