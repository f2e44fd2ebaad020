from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from wsolkit.backbones import vit as vit_module
from wsolkit.backbones.pretrained import normalization
from wsolkit.backbones.vit import ViT, block_with_scores, mix, prefers_plain, run_block
from wsolkit.errors import CheckpointError, ConfigError

OPTIONS = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
MODEL = "vit_tiny_patch16_224"


def vit(image_size: int = 32, weights: str | None = None, model: str = MODEL, **options: Any) -> ViT:
    torch.manual_seed(0)
    return ViT(model, image_size, 0.0, False, weights, OPTIONS | options).eval()


def full_attention(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, h, N, N] and output of a block, with the whole attention matrix written out."""
    attention, normed = block.attn, block.norm1(x)
    batch, length, width = x.shape
    qkv = attention.qkv(normed).reshape(batch, length, 3, 3, 8).permute(2, 0, 3, 1, 4)
    scores = qkv[0] @ qkv[1].transpose(-2, -1) / 8**0.5
    out = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(batch, length, width)
    x = x + attention.proj(out)
    return scores, x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("token", [0, -1, 5])
def test_row_of_scores_is_that_of_the_whole_matrix(token: int) -> None:
    block, x = vit().blocks[0], torch.randn(2, 17, 24)
    out, row = block_with_scores(block, x, token)
    scores, expected = full_attention(block, x)
    assert torch.allclose(row, scores[:, :, token], atol=1e-5)
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(out, block(x), atol=1e-5)


def test_row_of_scores_is_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, row = block_with_scores(vit().blocks[0], torch.randn(2, 17, 24), 0)
    assert row.dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "dtype", "tokens", "needs_gradient", "plain"),
    [
        ("cpu", torch.bfloat16, 198, True, True),
        ("cpu", torch.float16, 577, True, True),
        ("cpu", torch.bfloat16, 1025, True, False),  # the matrix would need too much memory
        ("cpu", torch.bfloat16, 198, False, False),
        ("cpu", torch.float32, 198, True, False),
        ("cuda", torch.bfloat16, 198, True, False),
    ],
)
def test_form_of_attention(device: str, dtype: torch.dtype, tokens: int, needs_gradient: bool, plain: bool) -> None:
    assert prefers_plain(device, dtype, tokens, needs_gradient) == plain


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)])
def test_both_forms_of_attention_agree(dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the output and in the gradients of q, k and v, with a gradient that differs by position."""
    query, key, value = inputs = torch.randn(3, 2, 3, 17, 8, dtype=dtype, requires_grad=True).unbind()
    results = {}
    for plain in (True, False):
        monkeypatch.setattr(vit_module, "prefers_plain", lambda *_, plain=plain: plain)
        out = mix(query, key, value, scale=0.3)
        results[plain] = [out, *torch.autograd.grad(out, inputs, torch.linspace(-1, 1, 8, dtype=dtype).expand_as(out))]
    for actual, expected in zip(results[True], results[False], strict=True):
        assert torch.allclose(actual, expected, atol=tolerance, rtol=tolerance)


def test_plain_attention_drops_entries_as_the_fused_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With values of 1, each output is what is left of a row of the attention matrix, scaled up."""
    query, key, value = torch.randn(4, 3, 64, 8), torch.randn(4, 3, 64, 8), torch.ones(4, 3, 64, 8)
    for plain in (True, False):
        monkeypatch.setattr(vit_module, "prefers_plain", lambda *_, plain=plain: plain)
        left = mix(query, key, value, scale=0.3, dropout=0.5)
        assert left.std() > 0.05
        assert left.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_block_is_that_of_timm(dtype: torch.dtype | None) -> None:
    """In training, in float32 and under autocast, where attention takes another form than timm's."""
    block, x = vit(depth=1).blocks[0].train(), torch.randn(2, 17, 24)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        assert torch.allclose(run_block(block, x), block(x), atol=1e-5 if dtype is None else 2e-2)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_both_forms_compile_as_one_graph(form: str) -> None:
    """Without a gradient, the same block takes the fused kernel."""
    torch._dynamo.reset()
    block, x = vit(depth=1).blocks[0], torch.randn(2, 17, 24)
    compiled = torch.compile(run_block, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(form == "plain"):
        assert torch.allclose(compiled(block, x), run_block(block, x), atol=2e-2)


def test_tokens_are_those_of_timm() -> None:
    backbone, image = vit(), torch.randn(2, 3, 32, 32)
    tokens = backbone.norm(backbone.blocks(backbone.embed(image)))
    assert torch.allclose(tokens, backbone.network.forward_features(image), atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 32), (24, 40)])
def test_any_size_that_the_patch_size_divides(height: int, width: int) -> None:
    backbone, image = vit(), torch.randn(1, 3, height, width)
    tokens = backbone.embed(image)
    assert tokens.shape == (1, 1 + height * width // 64, 24)
    assert backbone.patches(tokens, image).shape == (1, 24, height // 8, width // 8)


def test_patches_are_laid_out_row_by_row() -> None:
    backbone = vit()
    row = torch.arange(1 + 4 * 3 + 1)[None]  # class token, patches, one token more
    grid = backbone.grid(row, torch.empty(1, 3, 32, 24))
    assert grid.tolist() == [[[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]]


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="image_size=30 is not a multiple of the patch size 8.*use 24 or 32"):
        vit(image_size=30)
    with pytest.raises(ConfigError, match="images of 20×32 pixels do not divide into patches of 8"):
        vit().embed(torch.zeros(1, 3, 32, 20))


@pytest.mark.parametrize("model", ["vit_tiny_patch16_225", "resnet18", "vit_base_patch14_reg4_dinov2_nothing"])
def test_models_that_do_not_serve_are_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="timm has no model|is not a plain vision transformer"):
        ViT(model, 224, 0.0, False, None, {})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_weights_come_back_from_a_file(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    source = vit()
    torch.nn.init.normal_(source.network.pos_embed)
    state = {f"module.{name}" if wrapper else name: value.half() for name, value in source.network.state_dict().items()}
    state |= {"head.weight": torch.ones(7, 24), "head.bias": torch.arange(7.0)}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({wrapper: state} if wrapper else state, path)
    loaded = vit(weights=str(path))
    for name, value in source.network.state_dict().items():
        assert torch.allclose(loaded.network.state_dict()[name], value, atol=2e-3)
    assert loaded.classifier_bias is not None
    assert loaded.classifier_bias.tolist() == list(range(7))


def test_position_embedding_is_interpolated_to_the_image(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(vit(image_size=32).network.state_dict(), path)
    assert vit(image_size=64, weights=str(path)).network.pos_embed.shape == (1, 65, 24)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(vit(depth=3).network.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"12 not part of the model \(blocks\.2\.attn"):
        vit(weights=str(path))
    torch.save(vit(embed_dim=48).network.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"of another shape \(cls_token: \(1, 1, 48\), expected \(1, 1, 24\)"):
        vit(weights=str(path))


def test_normalisation_is_that_of_the_pretraining() -> None:
    assert normalization("deit_small_patch16_224.fb_in1k", None, None)[0] == (0.485, 0.456, 0.406)
    assert normalization("vit_tiny_patch16_224.augreg_in21k_ft_in1k", None, None) == ((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ConfigError, match="timm has no model 'vit_tinny'"):
        normalization("vit_tinny", None, None)


def test_weights_in_the_shared_folder_classify_as_stated(shared: Path) -> None:
    """They load with nothing left over, and the backbone is the one timm builds with them."""
    path = shared / "data" / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.fp16.safetensors"
    backbone = ViT("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224, 0.1, True, str(path), {})
    expected = safetensors.torch.load_file(path)
    assert torch.equal(backbone.network.pos_embed, expected["pos_embed"].float())
    assert backbone.classifier_bias is not None
    assert len(backbone.classifier_bias) == 1000


def test_position_embeddings_keep_the_grid_of_their_weights() -> None:
    """DINOv2's are at 518 pixels. A network whose patch size is changed has no such weights."""
    options = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    native = ViT("vit_small_patch14_dinov2", 224, 0.0, False, None, options)
    assert native.network.pos_embed.shape == (1, 1 + 37 * 37, 48)
    assert native.embed(torch.zeros(1, 3, 28, 42)).shape == (1, 1 + 2 * 3, 48)
    own = ViT("vit_tiny_patch16_224", 64, 0.0, False, None, {**options, "patch_size": 8})
    assert own.network.pos_embed.shape == (1, 1 + 8 * 8, 48)
