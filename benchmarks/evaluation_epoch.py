"""What an evaluation epoch costs on the CPU's cores, and what the boxes add to it on a machine with a GPU.

    python benchmarks/evaluation_epoch.py [cores] [GPU images per second]

Measures, one core each, with the default protocols maxboxacc and maxboxacc_v2: loading an image (500×375 JPEG, as in
ILSVRC), drawing its boxes by the label's map, and counting them. From these it computes the rate of an epoch on so many
cores (16), of which loaders take up to 8, in front of a GPU of that speed, with the boxes and without.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from wsolkit import load_config
from wsolkit.build import build_protocols
from wsolkit.data.pixels import normalised_batch
from wsolkit.data.records import read_image
from wsolkit.data.transforms import Transform
from wsolkit.metrics.boxes import Verdicts
from wsolkit.metrics.functional import size_bins
from wsolkit.metrics.under_protocol import ProtocolEvaluation

BATCH, CLASSES, LOADERS = 64, 1000, 8
TRUTH = np.array([[30, 40, 160, 190]])
SIZES = size_bins(TRUTH, 224, 224)


def seconds(function: Callable[[], object], repeats: int = 30) -> float:
    """Median time of a call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def loading() -> float:
    """Decode, resize and normalise a JPEG of 500×375 pixels."""
    rng = np.random.default_rng(0)
    coarse = PIL.Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8))
    transform = Transform(224, 224, False, (0.5,) * 3, (0.5,) * 3)
    boxes = np.array([[10, 10, 300, 300]])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.JPEG"
        coarse.resize((500, 375), PIL.Image.Resampling.BICUBIC).save(path, quality=90)
        return seconds(lambda: normalised_batch([transform(read_image(path), boxes, None, 0).image]))


def score_maps() -> torch.Tensor:
    """Maps [64, 14, 14] as networks make them: an object and some noise."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:14, :14] / 14
    maps = []
    for _ in range(BATCH):
        centre, width = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3)
        blob = np.exp(-((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / (2 * width**2))
        maps.append(blob + 0.3 * rng.random((14, 14)))
    return torch.from_numpy(np.array(maps)).float()


def main() -> None:
    """Print the measured times and the computed rates."""
    cores = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    gpu = float(sys.argv[2]) if len(sys.argv) > 2 else 3000.0
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    protocols = build_protocols(load_config("dataset=listed", "dataset.root=none"))
    load, draw, count = loading(), 0.0, 0.0
    rng = np.random.default_rng(0)
    maps = score_maps()
    levels = next(iter(protocols.values())).levels(next(iter(protocols.values())).localization_maps(maps))
    for rules in protocols.values():  # they share the levels, and the holes filled in them
        metric = ProtocolEvaluation(rules, CLASSES, threshold_by_maps=False)
        metric.judge(levels[-1], TRUTH, SIZES)  # compiles
        start = time.perf_counter()
        for level in levels:
            metric.judge(level, TRUTH, SIZES)
        draw += (time.perf_counter() - start) / BATCH
        judged = [metric.judge(level, TRUTH, SIZES) for level in levels]
        iou, error, size, baselines = (np.stack(part) for part in zip(*judged, strict=True))
        top1, top5 = rng.random(BATCH) < 0.7, rng.random(BATCH) < 0.9
        label = rng.integers(0, CLASSES, BATCH)
        verdicts = Verdicts(np.arange(BATCH), label, iou, error, size, baselines.swapaxes(0, 1), iou, top1, top5, label)
        count += seconds(lambda m=metric, v=verdicts: m.boxes.update(v)) / BATCH  # type: ignore[misc]
    for what, cost in (("load", load), ("draw boxes, both protocols", draw), ("count, both protocols", count)):
        print(f"{what}: {1000 * cost:.2f} ms an image on one core")
    # A class that is taken for another has its map drawn as well: 1.3 maps an image.
    draw *= 1.3
    loaders = min(LOADERS, cores)
    without = min(gpu, loaders / load)
    # The threads that draw have the cores that loaders leave; one of them counts, batch after batch.
    busy = without * load
    beside = min(without, (cores - busy) / (draw + count), 1 / count)
    print(
        f"epoch on {cores} cores, GPU {gpu:.0f} images/s: {without:.0f} images/s without boxes, {beside:.0f} with them"
    )
    print(f"boxes take {beside * (draw + count):.1f} cores and add {100 * (without / beside - 1):.1f} % to the epoch")


if __name__ == "__main__":
    main()
