"""Images per second that one loader process on one core gives, against a plain torchvision loader.

    python benchmarks/loading.py [FOLDER_OF_IMAGES]

Both read the same 500×375 JPEGs (quality 95, 4:2:0, about as large as ILSVRC's) and apply the same transforms; each has
a process on the same core, and they take turns, epoch by epoch. Evaluation must give equal batches, or the script
fails. Without an argument the pictures are drawn here: smooth noise of many scales, as natural images have it. Those of
a folder are enlarged.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import one_thread
from wsolkit.data.files import images_below
from wsolkit.data.pixels import Pixels, normalised_batch, normalised_levels, resize
from wsolkit.data.records import FileRecords, file_records, read_image

IMAGES, SIZE, BATCH, REPEATS = 384, (500, 375), 64, 9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PlainDataset(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision's ImageFolder does: PIL decodes, torchvision's classic transforms follow."""

    def __init__(self, paths: list[Path], train: bool) -> None:
        self.paths = paths
        if train:
            steps = [transforms.Resize((256, 256)), transforms.RandomCrop(224), transforms.RandomHorizontalFlip()]
        else:
            steps = [transforms.Resize((224, 224))]
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with self.paths[index].open("rb") as file, PIL.Image.open(file) as image:
            return self.transform(image.convert("RGB")), 0


def drawn() -> Iterator[PIL.Image.Image]:
    """Pictures of noise at every scale, weaker the finer it is."""
    rng = np.random.default_rng(0)
    while True:
        picture = np.full((SIZE[1], SIZE[0], 3), 110.0)
        for octave in range(1, 10):
            noise = rng.normal(size=(2**octave, 2**octave, 4)).astype(np.float32)
            grain = noise[..., 3:] + 0.4 * noise[..., :3]  # channels vary together, mostly
            for channel in range(3):
                layer = PIL.Image.fromarray(grain[..., channel]).resize(SIZE, PIL.Image.Resampling.BICUBIC)
                picture[..., channel] += 30 * 2 ** (-0.2 * octave) * np.asarray(layer)
        yield PIL.Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def enlarged(folder: Path) -> Iterator[PIL.Image.Image]:
    """The images of a folder, in an order drawn by lot."""
    paths = [folder / name for name in sorted(images_below(folder, Counter()))]
    for number in np.random.default_rng(0).choice(len(paths), IMAGES):
        with PIL.Image.open(paths[number]) as image:
            yield image.convert("RGB").resize(SIZE, PIL.Image.Resampling.BICUBIC)


def write(pictures: Iterable[PIL.Image.Image], folder: Path) -> list[Path]:
    """Write the first pictures as JPEGs."""
    paths = [folder / f"{number}.JPEG" for number in range(IMAGES)]
    for path, picture in zip(paths, pictures, strict=False):
        picture.save(path, quality=95, subsampling="4:2:0")
    return paths


def own(paths: list[Path], cache: str | None, workers: int = 1) -> WSOLDataModule:
    """This project's loaders of the same files."""

    def records(split: str) -> FileRecords:
        ids = [path.name for path in paths]
        boxes = {name: [[10, 10, 300, 300]] for name in ids if split != "train"}
        return file_records(paths[0].parent, ids, [0] * len(ids), ["0"], boxes, None)

    return WSOLDataModule(
        records=records,
        image_size=224,
        eval_image_size=None,
        eval_flip=False,
        resize=256,
        batch_size=BATCH,
        eval_batch_size=BATCH,
        num_workers=workers,
        held_out=False,
        pseudo_boxes=None,
        crop_scale=None,
        train_boxes=None,
        train_masks=None,
        classes=None,
        fraction=None,
        shots=None,
        subset_seed=0,
        mean=MEAN,
        std=STD,
        seed=0,
        cache=cache,
        uncropped=False,
        model_classes=None,
        pairs=False,
    )


def plain(paths: list[Path], train: bool) -> DataLoader[Any]:
    """Torchvision's loader."""
    return DataLoader(
        PlainDataset(paths, train),
        batch_size=BATCH,
        shuffle=train,
        num_workers=1,
        persistent_workers=True,
        worker_init_fn=one_thread,
    )


class Timed:
    """A loader whose batches say how much processor time its process has used."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.collate, self.used = loader, loader.collate_fn, 0.0
        loader.collate_fn = self.timed_batch

    def timed_batch(self, samples: Any) -> tuple[Any, float]:
        """A batch, and the processor time of this process in seconds."""
        return self.collate(samples), time.process_time()

    def batches(self) -> Iterator[Any]:
        """An epoch."""
        for batch, used in self.loader:
            self.used = used
            yield batch

    def rates(self) -> tuple[float, float]:
        """Images per second of processor time, and of the clock, over an epoch."""
        used, start = self.used, time.perf_counter()
        for _ in self.batches():
            pass
        return IMAGES / (self.used - used), IMAGES / (time.perf_counter() - start)


def steps(path: Path) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """What is done to an image, by the plain path and here."""
    image = read_image(path)
    picture, small = PIL.Image.fromarray(image), resize(image, 224, 224)
    small_picture, levels = PIL.Image.fromarray(small), normalised_levels(MEAN, STD)
    normalised = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def decode() -> None:
        with PIL.Image.open(path) as opened:
            opened.convert("RGB")

    scale = transforms.functional.resize
    return {
        "read and decode": (decode, lambda: read_image(path)),
        "resize to 256×256": (lambda: scale(picture, [256, 256]), lambda: resize(image, 256, 256)),
        "resize to 224×224": (lambda: scale(picture, [224, 224]), lambda: resize(image, 224, 224)),
        "normalise": (lambda: normalised(small_picture), lambda: normalised_batch([Pixels(small, levels)])),
    }


def milliseconds(function: Callable[[], object]) -> float:
    """Processor time of a call, the mean of ten."""
    start = time.process_time()
    for _ in range(10):
        function()
    return 100 * (time.process_time() - start)


def main() -> None:
    """Print a Markdown table: medians over the repeats."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write(enlarged(Path(sys.argv[1])) if len(sys.argv) > 1 else drawn(), Path(folder))
        kib = np.mean([path.stat().st_size for path in paths]) / 1024
        loaders = {
            "plain training": Timed(plain(paths, True)),
            "training": Timed(own(paths, None).train_dataloader()),
            "training, cached": Timed(own(paths, folder).train_dataloader()),
            "plain evaluation": Timed(plain(paths, False)),
            "evaluation": Timed(own(paths, None).test_dataloader()),
        }
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
        if cores:
            os.sched_setaffinity(0, cores[-1:])  # the loaders' processes, which start now, stay on this core
        for loader in loaders.values():
            loader.rates()
        if cores:
            os.sched_setaffinity(0, cores[:1])
        pairs = zip(loaders["plain evaluation"].batches(), loaders["evaluation"].batches(), strict=True)
        if not all(torch.equal(expected, batch["image"]) for (expected, _), batch in pairs):
            sys.exit("error: the images of an evaluation batch differ")
        rates = {name: [] for name in loaders}  # type: dict[str, list[tuple[float, float]]]
        for _ in range(REPEATS):
            for name, loader in loaders.items():
                rates[name].append(loader.rates())
        times: dict[str, list[tuple[float, float]]] = {}
        for path in paths[::8]:
            for name, (by_plain, here) in steps(path).items():
                times.setdefault(name, []).append((milliseconds(by_plain), milliseconds(here)))
    print(f"{IMAGES} images of {SIZE[0]}×{SIZE[1]}, {kib:.0f} KiB each")
    print("| loader | plain, images/s of one core | here | ratio | ratio by the clock |")
    print("|---|---|---|---|---|")
    against = {"training": "plain training", "training, cached": "plain training", "evaluation": "plain evaluation"}
    for name, other in against.items():
        mine, theirs = np.array(rates[name]), np.array(rates[other])
        core, clock = np.median(mine / theirs, axis=0)
        print(f"| {name} | {np.median(theirs[:, 0]):.0f} | {np.median(mine[:, 0]):.0f} | {core:.2f} | {clock:.2f} |")
    print("\n| step | plain, ms an image | here |\n|---|---|---|")
    for name, pairs_of_times in times.items():
        theirs_ms, mine_ms = np.median(pairs_of_times, axis=0)
        print(f"| {name} | {theirs_ms:.2f} | {mine_ms:.2f} |")


if __name__ == "__main__":
    main()
