"""Compute the tokens of a data set's images once, before a run trains on them."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import timm
import torch
from lightning import Trainer
from rich.progress import Progress, TaskID
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.pixels import Pixels, normalised_batch
from wsolkit.data.records import Records, Split
from wsolkit.data.tokens import Seen, TokenStore, check_room
from wsolkit.data.transforms import Transform
from wsolkit.errors import BusyError, ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.settings.conf import as_named
from wsolkit.system.locks import alone
from wsolkit.training.progress import Progress as RunProgress
from wsolkit.types import Tokens

_SPARE = 0.5  # Tokens take at most this share of the memory that is free.
_PAUSE = 1.0  # Seconds between looks whether another process is done.


def cache_tokens(module: WSOLModule, datamodule: WSOLDataModule, trainer: Trainer, splits: Sequence[Split]) -> None:
    """Compute the tokens that a run needs and that are not there yet, if `backbone.cache` asks for them.

    Afterwards, the data module's loaders give tokens in place of images. Training then sees whole images at
    `dataset.image_size`, without random crops.

    Args:
        module: the method. It is unaffected unless its backbone is a `TokenBackbone`.
        datamodule: the data set.
        trainer: gives device and precision.
        splits: the splits that the run reads.

    Raises:
        ConfigError: the cache does not fit the run.
        DataError: an image cannot be read, or the tokens do not fit on the disk.
    """
    backbone = getattr(module.network, "backbone", None)
    if not isinstance(backbone, TokenBackbone) or backbone.cache is None:
        return
    in_memory = backbone.cache == "memory"
    if in_memory and trainer.world_size > 1:
        raise ConfigError(
            f"backbone.cache=memory: each of {trainer.world_size} processes would keep all tokens: use "
            "backbone.cache=DIR, a folder that they share"
        )
    described = _describe(backbone, datamodule, str(trainer.precision))
    wanted: dict[Seen, TokenStore] = {}
    for split in splits:
        for seen in _views(datamodule, backbone, split):
            if seen not in wanted:
                backbone.check_size(seen.size, seen.size)
                side = seen.size // backbone.patch_size
                shape = (len(backbone.blocks), backbone.embed_dim, side, side)
                folder = None if in_memory else Path(backbone.cache)
                records = datamodule.dataset(seen.split).records
                wanted[seen] = TokenStore(records, seen, described, backbone.pooled_dim, shape, folder)
    stores = list(wanted.values())
    if not stores:
        return
    check_room(stores, int(_SPARE * psutil.virtual_memory().available))
    for store in stores:
        store.open()
    _fill(stores, backbone, datamodule, trainer)
    datamodule.stores = {
        split: [wanted[seen] for seen in _views(datamodule, backbone, split)]
        for split in {seen.split for seen in wanted}
    }


def _views(datamodule: WSOLDataModule, backbone: TokenBackbone, split: Split) -> list[Seen]:
    """Return how the backbone sees the images of a split. A split whose images protocols crop is not cached."""
    split = datamodule.read_as(split)
    if split == "train":
        return [Seen(split, datamodule.image_size, mirrored) for mirrored in (False, True)[: 1 + backbone.cache_flip]]
    if datamodule.uncropped:
        return []
    sizes = datamodule.eval_image_size or datamodule.image_size
    sides = [sizes] if isinstance(sizes, int) else sizes
    return [Seen(split, side, mirrored) for side in sides for mirrored in (False, True)[: 1 + datamodule.eval_flip]]


def _describe(backbone: TokenBackbone, datamodule: WSOLDataModule, precision: str) -> str:
    """Describe all that tokens depend on, besides the images, their size, and whether they are mirrored."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    network = f"{type(backbone.network).__name__} {timm.__version__} {backbone.blocks} {backbone.norm}"
    return f"{network} {digest.hexdigest()} {datamodule.mean} {datamodule.std} {precision}"


class _Whole(Dataset["tuple[int, Pixels, tuple[int, int]]"]):
    """Images of a split as the backbone sees them: their index, their pixels, and their width and height.

    Args:
        records: the images.
        indices: those that are read.
        transform: turns an image into the backbone's input.
    """

    def __init__(self, records: Records, indices: Sequence[int], transform: Transform) -> None:
        self._records, self._indices, self._transform = records, indices, transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> tuple[int, Pixels, tuple[int, int]]:
        index = self._indices[place]
        image = self._records.image(index)
        seen = self._transform(image, np.zeros((0, 4), np.int64), None, 0).image
        return index, seen, (image.shape[1], image.shape[0])


def _batch(samples: Sequence[tuple[int, Pixels, tuple[int, int]]]) -> tuple[list[int], Tensor, list[tuple[int, int]]]:
    indices, images, sizes = zip(*samples, strict=True)
    return list(indices), normalised_batch(images), list(sizes)


def _fill(stores: Sequence[TokenStore], backbone: TokenBackbone, datamodule: WSOLDataModule, trainer: Trainer) -> None:
    """Compute what is missing in some stores. Those of one split and size read each image once."""
    groups: dict[tuple[Split, int], list[TokenStore]] = {}
    for store in stores:
        groups.setdefault((store.seen.split, store.seen.size), []).append(store)
    shown = trainer.is_global_zero and any(isinstance(one, RunProgress) for one in trainer.callbacks)  # type: ignore[attr-defined]
    backbone.to(trainer.strategy.root_device)
    with Progress(disable=not shown, transient=True) as bar:
        for (split, size), group in groups.items():
            with contextlib.ExitStack() as locks:
                for store in group:
                    _wait_for(store, locks)
                missing = sorted({index for store in group for index in store.missing})
                count = len(datamodule.dataset(split))
                place = "memory" if group[0].path is None else f"'{as_named(group[0].path.parent)}'"
                total = sum(store.nbytes for store in group) / 2**20
                if trainer.is_global_zero:
                    what = f"Tokens of {count} {split} images at {size} pixels take {total:,.0f} MiB in {place}"
                    print(f"{what}: {f'{len(missing)} are missing' if missing else 'all are there'}", flush=True)
                if missing:
                    task = bar.add_task(f"Tokens of {split} at {size}", total=len(missing))
                    _compute(group, missing, backbone, datamodule, trainer, bar, task)


def _wait_for(store: TokenStore, locks: contextlib.ExitStack) -> None:
    """Wait until no other process fills a store, and keep others from it."""
    if store.path is None:
        return
    lock = store.path.with_name(f".{store.path.name}.lock")
    while True:
        try:
            locks.enter_context(alone(lock, f"computing the tokens in '{store.path}'"))
            return
        except BusyError:
            time.sleep(_PAUSE)


def _compute(
    stores: Sequence[TokenStore],
    missing: Sequence[int],
    backbone: TokenBackbone,
    datamodule: WSOLDataModule,
    trainer: Trainer,
    bar: Progress,
    task: TaskID,
) -> None:
    seen = stores[0].seen
    images = datamodule.dataset(seen.split)
    transform = Transform(seen.size, seen.size, False, datamodule.mean, datamodule.std)
    loader = DataLoader(
        _Whole(images.records, missing, transform),
        batch_size=datamodule.eval_batch_size,
        collate_fn=_batch,
        **(datamodule.loader_options(images) | {"persistent_workers": False}),
    )
    for indices, image, sizes in loader:
        image = image.to(trainer.strategy.root_device)
        for store in stores:
            with trainer.precision_plugin.val_step_context():
                tokens: Tokens = backbone(image.flip(-1) if store.seen.mirrored else image)
            store.write(indices, sizes, tokens)
        bar.advance(task, len(indices))
