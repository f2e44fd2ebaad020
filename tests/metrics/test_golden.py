"""The reference evaluation, reproduced curve by curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import GOLDEN, protocol
from wsolkit.localization import boxes_at_thresholds
from wsolkit.metrics import MaxBoxAccuracy, PixelAveragePrecision

DELTAS = (30, 50, 70)


def ground_truth(golden: Any) -> list[Any]:
    rules = protocol("maxboxacc")
    sizes = golden["image_sizes"]
    return [rules.truth(golden["gt_boxes"][golden["gt_index"] == i], *sizes[i].tolist()) for i in range(len(sizes))]


def test_boxes_equal_the_reference_at_every_threshold() -> None:
    with np.load(GOLDEN / "evaluation.npz") as golden:
        assert np.array_equal(np.concatenate(ground_truth(golden)), golden["gt_boxes_224"])
        thresholds = np.arange(0, 1, 0.001)
        for score_map, expected in zip(golden["score_maps_u16"] / 65535, golden["single_boxes"], strict=True):
            assert np.array_equal(boxes_at_thresholds(score_map, thresholds, "largest"), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_curves_equal_the_reference(shared: Path, dtype: Any) -> None:
    with np.load(shared / "golden" / "eval_a.npz") as golden:
        maps = (golden["score_maps_u16"] / 65535).astype(dtype)
        for select, name in (("largest", "single"), ("any", "multi")):
            metric = MaxBoxAccuracy(select=select)  # type: ignore[arg-type]
            for start in range(0, len(maps), 7):  # in batches, the last one smaller
                metric.update(torch.from_numpy(maps[start : start + 7]), ground_truth(golden)[start : start + 7])
            for row, delta in enumerate(DELTAS):
                assert np.array_equal(metric.counts()[row].numpy(), golden[f"correct_{name}_{delta}"])
            values = metric.compute()
            expected = golden[f"maxboxacc_{name}"]
            assert [values[f"max_box_acc_{d}"].item() for d in DELTAS] == pytest.approx(expected)
            assert values["max_box_acc"].item() == pytest.approx(expected[1])
            assert values["max_box_acc_v2"].item() == pytest.approx(expected.mean())

        objects, ignored = (
            np.unpackbits(golden[f"{kind}_masks"]).reshape(maps.shape).astype(bool) for kind in ("gt", "ignore")
        )
        masks = np.where(objects, 1, np.where(ignored, 255, 0)).astype(np.uint8)
        pixels = PixelAveragePrecision()
        for start in range(0, len(maps), 7):
            pixels.update(torch.from_numpy(maps[start : start + 7]), torch.from_numpy(masks[start : start + 7]))
        assert np.array_equal(pixels.histogram[1].numpy(), golden["true_hist"])
        assert np.array_equal(pixels.histogram[0].numpy(), golden["false_hist"])
        assert pixels.compute().item() == pytest.approx(float(golden["pxap"]))
