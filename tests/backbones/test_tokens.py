"""Frozen transformers of all families, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.errors import CheckpointError, ConfigError

# Each family in small: the model, its options, its prefix tokens and whether it has a class token.
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 3, "num_heads": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "ViT": ("vit_tiny_patch16_224", SMALL, 1, True),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", SMALL, 2, True),
    "DINOv2": ("vit_small_patch14_dinov2", SMALL, 1, True),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", SMALL, 5, True),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL, 5, True),
    "EVA-02": ("eva02_tiny_patch14_224", SMALL, 1, True),
    "CLIP": ("vit_base_patch32_clip_224", SMALL, 1, True),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL, 0, False),
    "SigLIP, averaged": ("vit_base_patch16_siglip_gap_224", SMALL, 0, False),
}


def backbone(model: str, blocks: tuple[int, ...] = (-1,), norm: bool = False, **options: Any) -> TokenBackbone:
    torch.manual_seed(0)
    return TokenBackbone(model, False, None, blocks, norm, None, False, options)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_timm(family: str) -> None:
    """Taken out of `forward_features` of timm's own model, on a grid that is not square."""
    model, options, prefix, has_class = FAMILIES[family]
    own = backbone(model, **options)
    image = torch.randn(2, 3, own.patch_size * 2, own.patch_size * 3)
    tokens = own(image)
    assert own.has_class_token is has_class
    assert tokens.patches.shape == (2, 1, 48, 2, 3)
    own.network.norm = torch.nn.Identity()
    expected = own.network.forward_features(image)
    patches = expected[:, prefix:].mT.reshape(2, 48, 2, 3)
    assert torch.allclose(tokens.patches[:, 0], patches, atol=1e-3, rtol=1e-3)  # They are rounded to half precision.
    if has_class:
        assert torch.allclose(tokens.pooled, expected[:, 0], atol=1e-3, rtol=1e-3)
    assert tokens.pooled.shape == (2, own.pooled_dim)


def test_pooled_feature_without_a_class_token_is_the_classifier_s() -> None:
    own = backbone("vit_base_patch16_siglip_224", **SMALL)
    image = torch.randn(2, 3, 32, 32)
    expected = own.network.forward_head(own.network.forward_features(image), pre_logits=True)
    assert torch.allclose(own(image).pooled, expected, atol=1e-3, rtol=1e-3)


def test_blocks_are_counted_from_the_end_and_may_be_normalised() -> None:
    plain = backbone("vit_tiny_patch16_224", (-1, -2), **SMALL)
    normed = backbone("vit_tiny_patch16_224", (-2, -1), norm=True, **SMALL)
    image = torch.randn(1, 3, 32, 32)
    last, before = plain(image).patches.unbind(dim=1)
    normed_before, normed_last = normed(image).patches.unbind(dim=1)
    layer_norm = plain.network.norm
    for raw, expected in ((last, normed_last), (before, normed_before)):
        made = layer_norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert torch.allclose(made, expected, atol=5e-3)


def test_position_embeddings_stay_at_their_native_grid() -> None:
    """DINOv2's are at 518 pixels: 37×37 patches. They are interpolated once, to the size of the images."""
    own = backbone("vit_small_patch14_dinov2", **SMALL)
    assert own.network.pos_embed.shape[1] == 1 + 37 * 37
    assert own(torch.randn(1, 3, 56, 28)).patches.shape[-2:] == (4, 2)


def test_tokens_have_half_precision_and_are_finite() -> None:
    own = backbone("vit_tiny_patch16_224", **SMALL)
    own.network.blocks[-1].mlp.fc2.weight.data *= 1e6
    tokens = own(torch.randn(1, 3, 32, 32))
    for part in tokens:
        assert part.dtype == torch.float32
        assert torch.equal(part, part.half().float())
        assert part.isfinite().all()


@pytest.mark.parametrize(
    "model", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto", "beit_base_patch16_224"]
)
def test_models_without_patch_tokens_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match=f"'{model}' gives no patch tokens for images of any size: choose a ViT, "):
        backbone(model)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="timm has no model 'vit_tinny'; similar names: "):
        backbone("vit_tinny")
    for blocks in ((0,), (-4,), (), (-1, -1)):
        with pytest.raises(ConfigError, match=r"expected different numbers from -1 \(the last block\) to -3"):
            backbone("vit_tiny_patch16_224", blocks, **SMALL)
    with pytest.raises(ConfigError, match="images of 40×32 pixels do not divide into patches of 16"):
        backbone("vit_tiny_patch16_224", **SMALL)(torch.zeros(1, 3, 32, 40))


@pytest.mark.parametrize("family", ["ViT", "DINOv3", "SigLIP"])
def test_local_weights_are_loaded_and_checked(family: str, tmp_path: Path) -> None:
    model, options, _, _ = FAMILIES[family]
    torch.manual_seed(1)
    source = timm.create_model(model, pretrained=False, num_classes=7, **options)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    own = TokenBackbone(model, True, str(path), [-1], False, None, False, options)
    state = own.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in source.state_dict().items() if name in state)
    with pytest.raises(CheckpointError, match="do not fit the backbone"):
        TokenBackbone(model, True, str(path), [-1], False, None, False, {**options, "depth": 4})
