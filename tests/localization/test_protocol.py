"""The rules of each paper's evaluation, as ../shared/spec/evaluation.md has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import protocol
from wsolkit import load_config
from wsolkit.build import build_protocols
from wsolkit.errors import ConfigError
from wsolkit.localization.maps import normalise, upsample
from wsolkit.settings.checks import check_config

BOXES = np.array([[10, 20, 499, 374], [0, 0, 500, 375]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("maxboxacc", [[4, 11, 223, 223], [0, 0, 224, 224]]),  # x · 224 / W, truncated
        ("maxboxacc_v2", [[4, 11, 223, 223], [0, 0, 224, 224]]),
        ("ts_cam", [[4, 11, 223, 223], [0, 0, 223, 223]]),  # and clipped to 223
        ("scm", [[4, 11, 223, 223], [0, 0, 223, 223]]),
        ("sat", [[0, 0, 223, 223], [0, 0, 223, 223]]),  # x · 256 / W - 16, clipped
        ("spa", [[10, 20, 499, 374], [0, 0, 500, 375]]),  # as they are
    ],
)
def test_ground_truth_is_moved_into_the_frame(name: str, expected: list[list[int]]) -> None:
    assert protocol(name).truth(BOXES, 500, 375).tolist() == expected


def test_central_crop_shifts_the_ground_truth() -> None:
    box = np.array([[100, 150, 300, 300]])
    assert protocol("sat").truth(box, 500, 375).tolist() == [[51 - 16, 102 - 16, 153 - 16, 204 - 16]]


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        (
            "maxboxacc",
            ("resize", "bicubic", "after_upsampling", "relative_8_bit", "largest_outline", "clipped", "zero"),
        ),
        (
            "maxboxacc_v2",
            ("resize", "bicubic", "after_upsampling", "relative_8_bit", "all_outlines", "clipped", "zero"),
        ),
        (
            "ts_cam",
            ("resize", "bilinear", "after_upsampling", "relative_8_bit", "largest_outline", "half_open", "one_pixel"),
        ),
        ("scm", ("resize", "bilinear", "after_upsampling", "relative_8_bit", "largest_outline", "clipped", "zero")),
        ("sat", ("center_crop", "bilinear", "before_upsampling", "above", "most_pixels", "half_open", "image")),
        ("spa", ("resize", "bilinear", "before_upsampling", "from", "all_pixels", "inclusive", "zero")),
    ],
)
def test_rules_are_those_of_the_papers(name: str, rules: tuple[str, ...]) -> None:
    p = protocol(name)
    assert (p.input, p.interpolation, p.min_max, p.threshold_rule, p.component, p.far_corner, p.empty) == rules
    assert p.num_thresholds == (1000 if name.startswith("maxboxacc") else 100)
    assert p.gt_known_comparison == ("above" if name == "spa" else "at_least")
    assert p.top_k_comparison == ("above" if name in ("spa", "ts_cam") else "at_least")
    assert p.gt_known_map == ("predicted" if name == "scm" else "label")
    assert p.threshold_per == ("metric" if name == "scm" else "protocol")
    assert p.top5_map == ("predicted" if name == "sat" else "label")
    assert p.epsilon == (1e-5 if name == "sat" else 0)


def test_published_thresholds_depend_on_the_data_set() -> None:
    """CUB has no data set yet, so its name is put on another one."""
    every = "protocol=[ts_cam,sat,spa]"
    imagenet = build_protocols(load_config(every, "dataset=imagenet", "dataset.root=none"))
    cub = build_protocols(load_config(every, "dataset=listed", "dataset.root=none", "dataset.name=cub"))
    own = build_protocols(load_config(every, "dataset=listed", "dataset.root=none", "protocol.sat.threshold=0.35"))
    assert [imagenet[n].threshold for n in ("ts_cam", "sat", "spa")] == [0.12, 0.3, None]
    assert [cub[n].threshold for n in ("ts_cam", "sat", "spa")] == [0.1, 0.4, None]
    assert [own[n].threshold for n in ("ts_cam", "sat", "spa")] == [None, 0.35, None]
    assert list(imagenet["spa"].threshold_range) == [0.2, 0.5]
    assert imagenet["spa"].thresholds[imagenet["spa"].admissible][[0, -1]] == pytest.approx([0.2, 0.5])
    assert [cub["sat"].classification, imagenet["sat"].classification] == ["ten_crop", "single"]
    assert cub["spa"].truth(BOXES[1:], 500, 375).tolist() == [[0, 0, 499, 374]]  # CUB's boxes end at x + w - 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocol.sat.resize=300", "resolution and resize are 224 and 300, but the images are cut by"),
        ("protocol.sat=null", "protocol.sat=None: expected the rules of a protocol"),
        ("protocol.sat.threshold=abc", "protocol.sat.threshold='abc'"),
        ("protocol.sat.component=foo", "protocol.sat.component='foo'"),
    ],
)
def test_wrong_settings_are_named(override: str, message: str) -> None:
    cfg = load_config("protocol=[sat]", "dataset=listed", "dataset.root=none", override)
    with pytest.raises(ConfigError, match=message):
        check_config(cfg)
        build_protocols(cfg)


@pytest.mark.parametrize("rule", ["relative_8_bit", "above", "from"])
def test_levels_are_the_rule_at_every_threshold(rule: str) -> None:
    p = protocol("sat", threshold_rule=rule)
    maps = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    maps[0] = 0
    maps[1, 0, 0] = 1
    for score, levels in zip(maps.numpy(), p.levels(maps), strict=True):
        grey = (score * 255).astype(np.uint8)
        for threshold, cut in zip(p.thresholds, levels.cuts, strict=True):
            expected = {
                "relative_8_bit": grey > int(threshold * grey.max()),
                "above": score.astype(float) > threshold,
                "from": score.astype(float) >= threshold,
            }[rule]
            assert np.array_equal(levels.level > cut, expected)


def test_order_of_min_max_and_upsampling() -> None:
    maps = torch.rand(2, 14, 14, generator=torch.Generator().manual_seed(0))
    after, before = protocol("ts_cam").localization_maps(maps), protocol("sat").localization_maps(maps)
    assert after.amax().item() == 1
    assert before.amax().item() < 1  # interpolation and the epsilon have lowered the peak
    assert protocol("spa").localization_maps(maps, (30, 50)).shape == (2, 30, 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": 0.123}, r"threshold=0.123: expected a multiple of 1/num_thresholds = 0.01"),
        ({"threshold": 1.0}, r"threshold=1.0: expected"),
        ({"threshold_range": [0.5]}, r"threshold_range=\[0.5\]: expected first and last"),
        ({"threshold_range": [0.6, 0.5]}, r"threshold_range=\[0.6, 0.5\]: expected first and last"),
        ({"iou_thresholds": [0.3]}, r"iou_thresholds=\[0.3\]: expected numbers above 0 and up to 1, 0.5 among them"),
        ({"iou_thresholds": [0.5, 7]}, r"iou_thresholds=\[0.5, 7\]"),
        ({"iou_thresholds": [0.5, 0.504]}, "differ as whole percentages"),
        ({"num_thresholds": 0}, "num_thresholds 1 to 10000"),
        ({"num_thresholds": 70000}, "num_thresholds 1 to 10000"),
        ({"epsilon": -1.0}, "epsilon=-1.0: expected a small number"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"resize": 200}, "resize=200 is smaller than its resolution=224"),
    ],
)
def test_wrong_rules_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        protocol("sat", **changes)


@pytest.mark.parametrize("name", ["maxboxacc", "sat"])
def test_protocol_scales_maps_by_its_normalisation(name: str) -> None:
    """Where min-max was, before or after upsampling. The keys that share maps between protocols tell them apart."""
    maps = torch.randn(2, 14, 14, generator=torch.Generator().manual_seed(0))
    plain = protocol(name)
    assert plain.normalisation == "minmax"
    for how in ("max", "pas", "ivr"):
        other = protocol(name, normalisation=how, percentile=0.3)
        found = other.localization_maps(maps)
        if name == "sat":
            expected = upsample(normalise(maps, how, 0.3), (224, 224), "bilinear")
        else:
            expected = normalise(upsample(maps, (224, 224), "bicubic"), how, 0.3)
        assert torch.equal(found, expected)
        assert other.map_rule != plain.map_rule
        assert other.level_rule != plain.level_rule
    with pytest.raises(ConfigError, match=r"percentile=1\.0: expected a share"):
        protocol(name, percentile=1.0)
