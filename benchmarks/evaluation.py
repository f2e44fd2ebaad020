"""How fast boxes are drawn at 1,000 thresholds, against the plain rule run threshold by threshold, on one core.

    python benchmarks/evaluation.py [FOLDER_OF_NPY_MAPS]

Both draw the boxes of the same maps and compare them with the same ground truth, side by side in one run; the results
must be equal, or the script fails. Maps are 224×224. Without an argument they are made here: coarse maps enlarged as a
network's are, some with noise.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from wsolkit.localization.boxes import MAXBOXACC, MAXBOXACC_V2, BoxRule, grey_levels, matched_boxes, threshold_grid

SIZE, MAPS = 224, 24
REPEATS_PLAIN, REPEATS = 3, 20
THRESHOLDS = threshold_grid(1000)
TRUTH = np.array([[30, 40, 160, 190], [120, 20, 200, 100]])


def made_maps() -> dict[str, list[npt.NDArray[np.float64]]]:
    """Maps as methods give them, by kind."""
    rng = np.random.default_rng(0)
    kinds = {
        "7×7 enlarged": (7, 0.0),
        "14×14 enlarged": (14, 0.0),
        "28×28 enlarged": (28, 0.0),
        "14×14 and noise": (14, 0.1),
    }
    maps: dict[str, list[npt.NDArray[np.float64]]] = {}
    for kind, (cells, noise) in kinds.items():
        maps[kind] = []
        for _ in range(MAPS):
            rows, columns = np.mgrid[:cells, :cells] / cells
            centre, width = rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3)
            blob = np.exp(-((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / (2 * width**2))
            coarse = blob + 0.3 * rng.random((cells, cells))
            score = cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
            score += noise * rng.random((SIZE, SIZE))
            maps[kind].append((score - score.min()) / (score.max() - score.min()))
    return maps


def read_maps(path: Path) -> dict[str, list[npt.NDArray[np.float64]]]:
    """Maps [H, W] in [0, 1] from a folder of .npy files."""
    return {str(path): [np.load(file).astype(np.float64) for file in sorted(path.rglob("*.npy"))[:MAPS]]}


def iou(boxes: npt.NDArray[np.int64], truth: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """IoU [n, m] of boxes with both corners inside."""
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    shared = np.clip(high - low + 1, 0, None).prod(-1)
    areas = [(b[:, 2:] - b[:, :2] + 1).prod(-1) for b in (boxes, truth)]
    return np.asarray(shared / (areas[0][:, None] + areas[1][None] - shared))


def plain_rule(score: npt.NDArray[np.float64], largest: bool) -> npt.NDArray[np.float64]:
    """Best IoU at each threshold, the whole rule for each by itself; the IoU of all boxes in one array operation."""
    grey = (score * 255).astype(np.uint8)
    peak, (height, width) = grey.max(), grey.shape
    boxes, counts = [], []
    for threshold in THRESHOLDS:
        _, binary = cv2.threshold(grey, int(threshold * peak), 255, cv2.THRESH_BINARY)
        contours, _ = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
        if largest and contours:
            contours = [max(contours, key=cv2.contourArea)]
        for contour in contours:
            x, y, w, h = cv2.boundingRect(contour)
            boxes.append([x, y, min(x + w, width - 1), min(y + h, height - 1)])
        if not contours:
            boxes.append([0, 0, 0, 0])
        counts.append(max(len(contours), 1))
    best = iou(np.array(boxes), TRUTH).max(axis=1)
    return np.maximum.reduceat(best, np.cumsum([0, *counts[:-1]]))


def own(score: npt.NDArray[np.float64], rule: BoxRule) -> npt.NDArray[np.float64]:
    """The same by the component tree."""
    return matched_boxes(grey_levels(score, THRESHOLDS), rule, TRUTH)[1]


def milliseconds(repeats: int, function: Any, *arguments: Any) -> tuple[float, Any]:
    """Best time of one call, and what it returns."""
    best, result = np.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*arguments)
        best = min(best, time.perf_counter() - start)
    return 1000 * best, result


def main() -> None:
    """Print a Markdown table: mean milliseconds a map, and their ratio."""
    cv2.setNumThreads(0)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    maps = read_maps(Path(sys.argv[1])) if len(sys.argv) > 1 else made_maps()
    own(np.random.default_rng(0).random((SIZE, SIZE)), MAXBOXACC)  # compiles
    print("| maps | boxes | plain rule, ms a map | here, ms a map | ratio | lowest ratio of a map |")
    print("|---|---|---|---|---|---|")
    for kind, scores in maps.items():
        for name, rule in (("largest", MAXBOXACC), ("all", MAXBOXACC_V2)):
            times = []
            for score in scores:
                plain, expected = milliseconds(REPEATS_PLAIN, plain_rule, score, rule is MAXBOXACC)
                ours, actual = milliseconds(REPEATS, own, score, rule)
                if not np.array_equal(expected, actual):
                    sys.exit(f"error: the results differ on a map of {kind}")
                times.append((plain, ours))
            plain, ours = np.mean(times, axis=0)
            lowest = min(a / b for a, b in times)
            print(f"| {kind} | {name} | {plain:.1f} | {ours:.2f} | {plain / ours:.0f} | {lowest:.0f} |", flush=True)


if __name__ == "__main__":
    main()
