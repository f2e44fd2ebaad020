"""Load data for training and evaluation, for any data set and any method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from lightning import LightningDataModule, Trainer
from lightning.pytorch.loops.progress import _ProcessedTracker as ProcessedTracker
from torch.utils.data import DataLoader

from wsolkit.data.cache import ImageCache
from wsolkit.data.dataset import (
    EachOnce,
    GlobalBatches,
    Place,
    Sample,
    Sizes,
    TrainingLoader,
    WSOLDataset,
    evaluation_batch,
    one_thread,
)
from wsolkit.data.pseudo_boxes import pseudo_boxes as read_pseudo_boxes
from wsolkit.data.records import FileRecords, Records, Split
from wsolkit.data.subset import Subset, part_of
from wsolkit.data.targets import Targets
from wsolkit.data.tokens import TokenSamples, TokenStore
from wsolkit.data.transforms import Transform
from wsolkit.errors import CheckpointError, ConfigError, DataError
from wsolkit.system.cores import available_cores
from wsolkit.system.drafts import write_text

_MAX_AUTO_WORKERS = 8


def _limited(limit: int | float | None, batches: int) -> int:
    """Return how many of an epoch's batches Lightning takes, for a limit that is a number or a share."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


class WSOLDataModule(LightningDataModule):
    """Loads the batches of a data set.

    Args:
        records: reads a split.
        image_size: the side of the network's input in pixels.
        eval_image_size: the sides at which the network sees evaluated images, one or several. None is `image_size`.
        eval_flip: whether it sees them mirrored, too. Maps and logits of all views are averaged.
        resize: the side to which training images are scaled before they are cropped. Evaluation scales to `image_size`.
        batch_size: the images of one optimizer step, over all devices and accumulated batches.
        eval_batch_size: the images of one evaluation batch on one device.
        num_workers: the loader processes per device. "auto" takes as many as there are cores, up to 8.
        classes, fraction, shots, subset_seed: the part of the data set to use, see `part_of`.
        held_out: whether thresholds and checkpoints are selected on the split "val", or else on "test" itself.
        pseudo_boxes: the file or folder of the boxes that select in place of the ground truth, or None.
        mean, std: the normalisation of the backbone.
        seed: the seed of the order and the augmentations.
        crop_scale: for random resized crops, see `Transform`. None crops `image_size` pixels.
        train_boxes, train_masks: the pseudo boxes and pseudo masks that training learns beside the labels, see
            `wsolkit.data.targets`, or None.
        cache: the folder for a file of the training images at `resize`, which is filled as they are read. None decodes
            them again in each epoch. Evaluation always decodes.
        uncropped: whether evaluation batches also have the images scaled to `resize`, for protocols that crop them.
        model_classes: the names of a model's classes by label. The evaluated images then have its labels. None takes
            the labels of the training images.
        pairs: whether training batches hold pairs of images of one class side by side, see `GlobalBatches`.
    """

    def __init__(
        self,
        records: Callable[[Split], Records],
        image_size: int,
        eval_image_size: int | Sequence[int] | None,
        eval_flip: bool,
        resize: int,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int | Literal["auto"],
        classes: Sequence[str | int] | None,
        fraction: float | None,
        shots: int | None,
        subset_seed: int,
        held_out: bool,
        pseudo_boxes: str | None,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        crop_scale: Sequence[float] | None,
        train_boxes: str | None,
        train_masks: str | None,
        cache: str | None,
        uncropped: bool,
        model_classes: Sequence[str] | None,
        pairs: bool,
    ) -> None:
        super().__init__()
        for name, value in {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "image_size": image_size,
        }.items():
            if value < 1:
                raise ConfigError(f"dataset.{name}={value}: expected 1 or more")
        self.image_size = image_size
        self.eval_image_size, self.eval_flip = eval_image_size, eval_flip
        self.resize = resize
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.held_out = held_out
        self._pseudo_path = pseudo_boxes
        self._pseudo: FileRecords | None = None
        self.mean, self.std = tuple(mean), tuple(std)
        self.seed = seed
        self._read = records
        self.classes, self.fraction, self.shots, self.subset_seed = classes, fraction, shots, subset_seed
        self.crop_scale = crop_scale
        self.train_boxes, self.train_masks = train_boxes, train_masks
        self.cache = cache
        self.uncropped = uncropped
        self.model_classes = model_classes
        self.pairs = pairs
        self._datasets: dict[Split, WSOLDataset] = {}
        self._training: TrainingLoader | None = None
        self._position: Place | None = None
        self.stores: dict[Split, list[TokenStore]] = {}
        """The tokens of splits, which the loaders give in place of images."""

    @property
    def class_names(self) -> list[str]:
        """Return the names of the classes, by label."""
        return list(self.dataset("train").records.classes)

    def dataset(self, split: Split) -> WSOLDataset:
        """Return the samples of a split, which is read once.

        Raises:
            ConfigError, DataError: see the data set's module and `part_of`, or the split is empty.
        """
        split = self.read_as(split)
        if split not in self._datasets:
            train = split == "train"
            side = self.resize if train else self.image_size
            transform = Transform(side, self.image_size, train, self.mean, self.std, self.crop_scale)
            uncropped = None
            if self.uncropped and not train:
                uncropped = Transform(self.resize, self.resize, False, self.mean, self.std)
            known = None if train else self.model_classes
            records = part_of(
                self._read(split), split, self.classes, self.fraction, self.shots, self.subset_seed, known
            )
            if len(records.labels) == 0:
                raise DataError(f"the {split} split is empty")
            cache = ImageCache(Path(self.cache), records, self.resize) if train and self.cache is not None else None
            larger = None if uncropped is None else self.resize
            sizes = (
                Sizes()
                if train
                else Sizes.of(self.image_size, larger, self.eval_image_size, self.eval_flip, self.mean, self.std)
            )
            targets = Targets.of(self.train_boxes, self.train_masks, records) if train else None
            self._datasets[split] = WSOLDataset(records, transform, self.seed, uncropped, cache, sizes, targets)
        return self._datasets[split]

    @property
    def selects(self) -> bool:
        """Whether "val" has thresholds to select before the test."""
        return self.held_out or self._pseudo_path is not None

    @property
    def pseudo_boxes(self) -> FileRecords | None:
        """Return the images of the split "val" with pseudo boxes, which are read once, or None if none are given.

        Raises:
            DataError: see `wsolkit.data.pseudo_boxes`.
        """
        if self._pseudo is None and self._pseudo_path is not None:
            self._pseudo = read_pseudo_boxes(Path(self._pseudo_path), self.dataset("val").records)
        return self._pseudo

    def read(self, *splits: Split) -> None:
        """Read splits, and the pseudo boxes of "val", now, so that errors come before the first step."""
        if "train" in splits and self.model_classes is None:
            self.model_classes = self.class_names
        for split in splits:
            self.dataset(split)
        if "val" in splits:
            _ = self.pseudo_boxes

    def setup(self, stage: str) -> None:
        """Read what a stage of Lightning needs."""
        stages: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        self.read(*stages.get(stage, ()))

    def save_subset(self, path: Path) -> None:
        """Write the names of the training images, one per line, if they are only a part of the data set's."""
        training = self.dataset("train").records
        if isinstance(training, Subset):
            names = [training.name(index) for index in range(len(training.labels))]
            write_text(path, "".join(f"{name}\n" for name in names))

    def check(self, trainer: Trainer) -> None:
        """Check, before a run begins, that it will validate, choose a checkpoint and test.

        Raises:
            ConfigError: the run would end before its first validation.
            DataError: a split has fewer images than processes.
        """
        processes = trainer.num_devices * trainer.num_nodes
        for split in get_args(Split):
            count = len(self.dataset(split))
            if count < processes:
                raise DataError(
                    f"the {split} split has {count} images, and this run has {processes} processes, each of which "
                    f"needs one: set trainer.devices to {count} at most"
                )
        self._check_batch(processes, trainer.accumulate_grad_batches)
        batches = _limited(trainer.limit_train_batches, len(self._batches(trainer.accumulate_grad_batches)))
        taken = {"train": batches}
        for split, limit in (("val", trainer.limit_val_batches), ("test", trainer.limit_test_batches)):
            there = -(-len(self.dataset(split)) // (self.eval_batch_size * processes))  # type: ignore[arg-type]
            taken[split] = _limited(limit, there)
        for split, count in taken.items():
            if count == 0:
                raise ConfigError(f"trainer.limit_{split}_batches leaves no batch of the {split} split: set it higher")
        accumulate, every = trainer.accumulate_grad_batches, trainer.check_val_every_n_epoch
        steps = -(-batches // accumulate) * (every or 1)
        if trainer.val_check_interval != 1.0:
            steps = -(-_limited(trainer.val_check_interval, batches) // accumulate)
        if trainer.max_steps != -1 and trainer.max_steps < steps:
            shorter = max(trainer.max_steps // (every or 1), 1) * accumulate
            raise ConfigError(
                f"trainer.max_steps={trainer.max_steps} ends the run before its first validation, after step {steps}: "
                "no checkpoint would be chosen. Set trainer.max_steps to that or more, or shorten the epochs with "
                f"trainer.limit_train_batches={shorter}"
            )
        epochs = trainer.max_epochs
        if epochs is not None and every is not None and every > epochs:
            raise ConfigError(
                f"trainer.check_val_every_n_epoch={every} is above trainer.max_epochs={epochs}: there would be no "
                f"validation, and no checkpoint be chosen. Set it to {epochs} at most"
            )

    def train_dataloader(self) -> DataLoader[Sample]:
        """Load the training images."""
        rank, world_size, accumulate = self._share_of_process()
        self._check_batch(world_size, accumulate)
        dataset = self._loaded("train")
        batches = self._batches(accumulate, rank, world_size)
        limit = _limited(None if self.trainer is None else self.trainer.limit_train_batches, len(batches))
        self._training = TrainingLoader(
            dataset, batches, limit, accumulate, self._ended, **self.loader_options(dataset)
        )
        if self._position is not None:
            self._training.load_state_dict(self._position)
        return self._training

    def _check_batch(self, world_size: int, accumulate: int) -> None:
        """Check that a global batch can be divided among processes and accumulated batches.

        Raises:
            ConfigError: it cannot.
        """
        if self.batch_size % (world_size * accumulate * (2 if self.pairs else 1)):
            raise ConfigError(
                f"dataset.batch_size={self.batch_size} is the global batch: it must be a multiple of "
                f"{world_size} devices × {accumulate} accumulated batches"
                + (" × 2, since this method trains on pairs of images of one class" if self.pairs else "")
            )

    def _batches(self, accumulate: int, rank: int = 0, world_size: int = 1) -> GlobalBatches:
        """Return the training batches of a process."""
        labels = self.dataset("train").records.labels
        pairs = np.asarray(labels, np.int64) if self.pairs else None
        return GlobalBatches(len(labels), self.batch_size // accumulate, self.seed, rank, world_size, pairs)

    def state_dict(self) -> dict[str, Any]:
        """Return where training is in the training images.

        Lightning keeps the loader's state too, but restores it only within an epoch.
        """
        return {} if self._training is None else dict(self._training.state_dict())

    def _ended(self, epoch: int) -> bool:
        """Say whether the trainer has finished an epoch, perhaps early because of trainer.max_steps."""
        if self.trainer is None:
            return False
        progress = cast(ProcessedTracker, self.trainer.fit_loop.epoch_progress.current)
        return progress.processed > epoch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue in the training images where a checkpoint was."""
        self._position = cast(Place, state_dict)

    def check_position(self, place: Place, resume: str) -> None:
        """Check that training can continue from a position. Within an epoch, it needs the same images in order.

        Args:
            place: the position in the checkpoint, or {} if it has none.
            resume: the setting that names the checkpoint.

        Raises:
            CheckpointError: it cannot continue.
        """
        if place.get("over", True):
            return
        for now, before, what in (
            (len(self.dataset("train")), place["images"], "training images"),
            (self.seed, place["seed"], "as the seed of their order"),
        ):
            if now != before:
                raise CheckpointError(
                    f"{resume} stopped within epoch {place['epoch']}, and it is unclear which images are left: {now} "
                    f"{what} (was {before}). Continue with the old value, or from a checkpoint at the end of an epoch"
                )

    @property
    def start(self) -> tuple[int, int, bool]:
        """Return where training begins, see `TrainingLoader`."""
        assert self._training is not None
        return self._training.start

    def training_images(self, epoch: int, batch: int) -> list[str]:
        """Return the names of the images of a training batch, over all processes."""
        dataset = self.dataset("train")
        batches = self._batches(self._share_of_process()[2])
        batches.epoch, batches.skip = epoch, batch
        return [dataset.records.name(index) for _, index in next(iter(batches))]

    def val_dataloader(self) -> DataLoader[Sample]:
        """Load the images of the validation."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Sample]:
        """Load the images of the test."""
        return self._evaluation_loader("test")

    def whole_images(self, places: Sequence[int], size: int, batch_size: int) -> DataLoader[Sample]:
        """Load training images as an evaluation sees them.

        Args:
            places: the positions of the images in the split, in the order in which they come.
            size: the side that they are squashed to.
            batch_size: the number of images in a batch.
        """
        dataset = WSOLDataset(self.dataset("train").records, Transform(size, size, False, self.mean, self.std), 0)
        return DataLoader(
            dataset,
            sampler=[(0, place) for place in places],
            batch_size=batch_size,
            collate_fn=evaluation_batch,
            **self.loader_options(dataset) | {"persistent_workers": False},
        )

    def check_targets(self, learned: Sequence[str], method: str) -> None:
        """Check that training has what its method learns beside the labels, and nothing else.

        Args:
            learned: see `WSOLModule.targets`.
            method: the name of the method.

        Raises:
            ConfigError: it has not.
        """
        given = {"train_boxes": self.train_boxes, "train_masks": self.train_masks}
        for name, path in given.items():
            if name in learned and path is None:
                raise ConfigError(
                    f"method={method} learns {name.removeprefix('train_')}: give dataset.{name}=PATH, which python -m "
                    f"wsolkit.pseudo_{name.removeprefix('train_')} writes"
                )
            if name not in learned and path is not None:
                raise ConfigError(f"dataset.{name}={path}: method={method} does not learn from it: leave it out")

    def _loaded(self, split: Split) -> WSOLDataset:
        stores = self.stores.get(self.read_as(split))
        dataset = self.dataset(split)
        return TokenSamples(dataset, stores, training=split == "train") if stores else dataset

    def read_as(self, split: Split) -> Split:
        """Return the split whose images stand for a split, which is the test if nothing is held out."""
        return "test" if split == "val" and not self.held_out else split

    def _evaluation_loader(self, split: Split) -> DataLoader[Sample]:
        dataset = self._loaded(split)
        rank, world_size, _ = self._share_of_process()
        if len(dataset) < world_size:
            raise DataError(
                f"{len(dataset)} {split} images on {world_size} processes: use at most as many devices as images"
            )
        order = EachOnce(len(dataset), rank, world_size)
        return DataLoader(
            dataset,
            sampler=order,
            batch_size=self.eval_batch_size,
            collate_fn=evaluation_batch,
            **self.loader_options(dataset),
        )

    def _share_of_process(self) -> tuple[int, int, int]:
        if self.trainer is None:
            return 0, 1, 1
        return self.trainer.global_rank, self.trainer.world_size, self.trainer.accumulate_grad_batches

    def loader_options(self, dataset: WSOLDataset) -> dict[str, Any]:
        """Return the options of a loader of these samples, see PyTorch's `DataLoader`."""
        devices = self.trainer.num_devices if self.trainer is not None else 1
        automatic = min(_MAX_AUTO_WORKERS, available_cores() // devices)
        workers = automatic if self.num_workers == "auto" else self.num_workers
        if isinstance(dataset, TokenSamples):
            workers = 0  # Tokens are in memory, or mapped into it. Other processes would have to copy them.
        return {
            "num_workers": workers,
            "worker_init_fn": one_thread,
            "persistent_workers": workers > 0,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        }
