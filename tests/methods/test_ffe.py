"""FFE: its heads written out one by one, and its parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit import build_module, load_config
from wsolkit.methods.ffe import FFE, ForegroundHeads
from wsolkit.methods.trilite import LocalizationHead, background_loss
from wsolkit.types import Tokens

BLOCKS, STARTS, WIDTH, CLASSES = 2, 3, 16, 5


def heads_and_their_parts() -> tuple[ForegroundHeads, list[LocalizationHead]]:
    """Heads, and the same as single heads of TriLite, whose 3×3 kernels are zero but in the middle."""
    torch.manual_seed(0)
    heads = ForegroundHeads(WIDTH, BLOCKS, STARTS, CLASSES)
    nn.init.normal_(heads.norm.weight)
    nn.init.normal_(heads.norm.bias)
    single = []
    for number in range(BLOCKS * STARTS):
        block, start = divmod(number, STARTS)
        one, channels = LocalizationHead(WIDTH, CLASSES, dropout=0.0), slice(3 * number, 3 * number + 3)
        own = heads.weight[block, 3 * start : 3 * start + 3].detach()  # [3, D]
        one.conv.weight.data = F.pad(own[:, :, None, None], (1, 1, 1, 1))
        one.norm.weight.data, one.norm.bias.data = (
            heads.norm.weight[channels].detach(),
            heads.norm.bias[channels].detach(),
        )
        one.classifier.weight.data = heads.classifier_weight[number].detach()
        one.classifier.bias.data = heads.classifier_bias[number].detach()
        single.append(one)
    return heads, single


def feature(height: int = 4, width: int = 6) -> Tensor:
    return torch.randn(2, BLOCKS, WIDTH, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [True, False])
def test_heads_are_heads_of_trilite_side_by_side(training: bool) -> None:
    heads, single = heads_and_their_parts()
    regions, logits = heads.train(training)(feature())
    for number, one in enumerate(single):
        expected, foreground, background = one.train(training)(feature()[:, number // STARTS])
        assert torch.allclose(regions[:, number], expected, atol=1e-5)
        assert torch.allclose(logits[:, number, 0], foreground, atol=1e-5)
        assert torch.allclose(logits[:, number, 1], background, atol=1e-5)


def test_loss_is_the_sum_of_the_heads_losses() -> None:
    module = small()
    network, label = module.network, torch.tensor([1, 3])
    tokens = Tokens(torch.randn(2, 128), torch.randn(2, 1, 128, 4, 4))
    losses = module.train().losses({"image": tokens, "label": label})
    logits, _, of_regions = network(tokens)
    each = [
        F.cross_entropy(of_regions[:, head, 0], label) + 0.5 * background_loss(of_regions[:, head, 1], label)
        for head in range(of_regions.shape[1])
    ]
    assert len(each) == 9
    expected = F.cross_entropy(logits, label) + torch.stack(each).sum()
    assert torch.allclose(losses["loss"], expected, atol=1e-4)


def test_heads_do_not_influence_each_other() -> None:
    heads, _ = heads_and_their_parts()
    _, logits = heads.train()(feature())
    logits[:, 4].sum().backward()  # The second block's second head.
    gradient = heads.weight.grad
    assert gradient is not None
    touched = gradient.abs().sum(dim=2).reshape(BLOCKS * STARTS, 3).sum(dim=1) > 1e-6
    assert touched.tolist() == [False] * 4 + [True] + [False]


def small(*overrides: str) -> FFE:
    torch.manual_seed(0)
    module = build_module(load_config("method=ffe", "dataset=shapes", *overrides))
    assert isinstance(module, FFE)
    return module


def test_map_is_the_mean_foreground_after_the_walk() -> None:
    image = torch.randn(2, 3, 64, 64)
    module = small("postprocess=none").eval()
    expected = module.inside(image, torch.zeros(2, dtype=torch.long))["P"].mean(dim=1, keepdim=True)
    found = module.localize(image, torch.zeros(2, 1, dtype=torch.long))
    assert torch.allclose(found.maps, expected, atol=1e-6)
    with_walk = small().eval()
    tokens = with_walk.network.backbone(image)
    assert with_walk.postprocess is not None
    walked = with_walk.postprocess(expected, tokens.patches[:, 0])
    assert torch.allclose(with_walk.localize(image).maps, walked, atol=1e-5)


def test_it_brings_its_blocks_and_its_walk() -> None:
    cfg = load_config("method=ffe", "dataset=listed", "dataset.root=x")
    assert (cfg.backbone.blocks, cfg.postprocess.name) == ("last_quarter", "similarity")
    assert (cfg.backbone.cache, list(cfg.dataset.eval_image_size)) == ("memory", [224, 448])
    assert list(load_config("method=trilite").backbone.blocks) == [-1]


@pytest.mark.parametrize("model", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3"])
def test_whole_path_runs_on_other_tokens(model: str) -> None:
    """Random weights: blocks are counted from the end, and widths and grids are the backbone's."""
    cfg = load_config("method=ffe", "dataset=listed", "dataset.root=x")
    cfg.backbone.model, cfg.backbone.pretrained, cfg.backbone.options = model, False, {"depth": 4}
    module = build_module(cfg, ["cat", "dog"])
    image = torch.randn(2, 3, 112, 112)
    module.losses({"image": image, "label": torch.tensor([0, 1])})["loss"].backward()
    side = 112 // module.network.backbone.patch_size  # type: ignore[union-attr,operator]
    assert module.eval().localize(image).maps.shape == (2, 1, side, side)
