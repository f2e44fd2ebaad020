from __future__ import annotations

import cv2
import numpy as np
import torch

from wsolkit.localization.maps import central_crop, min_max, ten_crops, upsample


def test_min_max_scales_each_map_by_itself() -> None:
    maps = torch.tensor([[[2.0, 4.0], [3.0, 2.0]], [[-1.0, -1.0], [0.0, 1.0]]])
    expected = [[[0.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.5, 1.0]]]
    assert min_max(maps).tolist() == expected
    assert torch.allclose(min_max(maps, epsilon=1.0)[0], torch.tensor([[0, 2 / 3], [1 / 3, 0]]))


def test_constant_map_becomes_zero_and_not_nan() -> None:
    assert min_max(torch.full((1, 3, 3), 7.0)).eq(0).all()


def test_upsampling_is_that_of_opencv() -> None:
    maps = torch.rand(3, 14, 14, generator=torch.Generator().manual_seed(0))
    for interpolation, flag in (("bicubic", cv2.INTER_CUBIC), ("bilinear", cv2.INTER_LINEAR)):
        for height, width in ((224, 224), (375, 500)):
            expected = np.stack([cv2.resize(m, (width, height), interpolation=flag) for m in maps.numpy()])
            actual = upsample(maps, (height, width), interpolation)  # type: ignore[arg-type]
            assert np.abs(actual.numpy() - expected).max() < 1e-5


def test_ten_crops_are_those_of_torchvision() -> None:
    from torchvision.transforms.functional import ten_crop

    images = torch.rand(2, 3, 20, 20)
    expected = ten_crop(images, [16, 16])  # in another order: there the crops of the mirrored image
    order = [[torch.equal(own, crop) for crop in expected].index(True) for own in ten_crops(images, 16)]
    assert sorted(order) == list(range(10))
    assert torch.equal(central_crop(images, 16), images[..., 2:18, 2:18])
