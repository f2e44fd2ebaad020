"""Conformer: its layout, its published sizes, and its weights from a server in the publisher's place."""

from __future__ import annotations

import functools
import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsolkit import load_config
from wsolkit.backbones.conformer import Conformer, conformer_names
from wsolkit.backbones.pretrained import normalization
from wsolkit.backbones.transformer import Read
from wsolkit.backbones.weights import download_weights
from wsolkit.errors import CheckpointError, ConfigError
from wsolkit.settings.compose import arguments


@functools.cache
def settings(name: str) -> dict[str, Any]:
    return arguments(load_config("method=ts_cam", f"backbone={name}").backbone)


def conformer(name: str = "conformer_micro", **changes: Any) -> Conformer:
    torch.manual_seed(0)
    return Conformer(**settings(name) | {"pretrained": False} | changes).eval()


def busy(backbone: Conformer) -> Conformer:
    """Give every norm and bias a value that shows."""
    for name, value in backbone.state_dict().items():
        if value.ndim == 1:
            torch.nn.init.uniform_(value, 0.5, 1.5) if "var" in name or "weight" in name else nn.init.normal_(value)
    return backbone


@pytest.mark.parametrize(
    ("name", "count"), [("conformer_tiny", 23_524_704), ("conformer_small", 37_673_424), ("conformer_base", 83_289_136)]
)
def test_numbers_of_parameters_are_those_published(name: str, count: int) -> None:
    """With both linear classifiers of 1,000 classes."""
    with torch.device("meta"):
        backbone = conformer(name)
        classifiers = (backbone.branch_classifier(1000), nn.Linear(backbone.embed_dim, 1000))
    assert sum(p.numel() for part in (backbone, *classifiers) for p in part.parameters()) == count


def transcribed(state: dict[str, Tensor], image: Tensor, depth: int, heads: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The layout as it was published, in functions: tokens, the branch's feature, and the class token's attention."""
    attentions = []

    def conv(x: Tensor, name: str, stride: int = 1, padding: int = 0) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride, padding)

    def norm(x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        mean, variance, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps)

    def layer_norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def bottleneck(x: Tensor, name: str, stride: int, fused: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        inside = norm(conv(x, f"{name}.conv1"), f"{name}.bn1").relu() + fused
        inside = norm(conv(inside, f"{name}.conv2", stride, 1), f"{name}.bn2").relu()
        if f"{name}.residual_conv.weight" in state:
            x = norm(conv(x, f"{name}.residual_conv", stride), f"{name}.residual_bn")
        return (norm(conv(inside, f"{name}.conv3"), f"{name}.bn3") + x).relu(), inside

    def transform(x: Tensor, name: str) -> Tensor:
        def linear(y: Tensor, layer: str) -> Tensor:
            return F.linear(y, state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"])

        batch, length, width = x.shape
        qkv = linear(layer_norm(x, f"{name}.norm1"), "attn.qkv").reshape(batch, length, 3, heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        attentions.append(attention[:, :, 0])
        x = x + linear((attention @ value).transpose(1, 2).reshape(batch, length, width), "attn.proj")
        return x + linear(F.gelu(linear(layer_norm(x, f"{name}.norm2"), "mlp.fc1")), "mlp.fc2")

    stem = F.max_pool2d(norm(conv(image, "conv1", 2, 3), "bn1", 1e-5).relu(), 3, 2, 1)
    conv_map, _ = bottleneck(stem, "conv_1", 1)
    tokens = conv(stem, "trans_patch_conv", 4).flatten(2).mT
    tokens = transform(torch.cat([state["cls_token"].expand(len(image), -1, -1), tokens], 1), "trans_1")
    for number in range(2, depth + 1):
        name, stage = f"conv_trans_{number}", (number - 1) // (depth // 3)
        starts = number > 2 and stage > (number - 2) // (depth // 3)
        side = (4, 2, 1)[stage]
        conv_map, inside = bottleneck(conv_map, f"{name}.cnn_block", 2 if starts else 1)
        down = F.avg_pool2d(conv(inside, f"{name}.squeeze_block.conv_project"), side)
        height, width = down.shape[-2:]
        down = F.gelu(layer_norm(down.flatten(2).mT, f"{name}.squeeze_block.ln"))
        tokens = transform(torch.cat([tokens[:, :1], down], 1) + tokens, f"{name}.trans_block")
        up = conv(tokens[:, 1:].mT.unflatten(2, (height, width)), f"{name}.expand_block.conv_project")
        up = norm(up, f"{name}.expand_block.bn").relu().repeat_interleave(side, 2).repeat_interleave(side, 3)
        conv_map, _ = bottleneck(conv_map, f"{name}.fusion_block", 2 if number == depth else 1, up)
    return tokens, conv_map.mean((2, 3)), attentions


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_layout_is_that_of_the_publication(height: int, width: int) -> None:
    backbone = busy(conformer())
    image = torch.randn(2, 3, height, width)
    with torch.no_grad():
        found = backbone.features(image, {0: Read(0), 5: Read(0)})
        tokens, branch, attentions = transcribed(backbone.state_dict(), image, depth=6, heads=4)
    assert torch.allclose(found.tokens, tokens, rtol=1e-4, atol=1e-4 * tokens.abs().max().item())
    assert found.branch is not None
    assert torch.allclose(found.branch, branch, rtol=1e-4, atol=1e-4 * branch.abs().max().item())
    for row, attention in zip(found.rows, (attentions[0], attentions[5]), strict=True):
        assert torch.allclose(row.softmax(-1), attention, atol=1e-4)
    assert backbone.patches(found.tokens, image).shape == (2, 96, height // 16, width // 16)


def test_added_token_is_carried_through_every_exchange() -> None:
    """It stays last. As a copy of the class token, it remains one, because both enter each block in the same way."""
    backbone, image = busy(conformer()), torch.randn(2, 3, 48, 80)
    with torch.no_grad():
        found = backbone.features(image, {index: Read(-1) for index in range(6)}, extra=backbone.class_token)
    assert found.tokens.shape == (2, 1 + 3 * 5 + 1, 96)
    assert [row.shape for row in found.rows] == [(2, 4, 17)] * 6
    assert torch.allclose(found.tokens[:, -1], found.tokens[:, 0], rtol=1e-3, atol=1e-3)


def test_stochastic_depth_is_in_the_transformer_only() -> None:
    backbone = conformer(drop_path_rate=0.5)
    blocks = [backbone.trans_1, *(backbone.get_submodule(f"conv_trans_{n}.trans_block") for n in range(2, 7))]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 5}, "backbone.depth=5: expected a multiple of 3"),
        ({"embed_dim": 98}, "backbone.embed_dim=98: expected a multiple of 4, backbone.num_heads"),
        ({"patch_size": 8}, "backbone.patch_size=8: expected a multiple of 16"),
        ({"pretrained": True}, "nobody published weights for this Conformer"),
    ],
)
def test_sizes_that_do_not_serve_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conformer(**change)


def test_images_must_divide_into_patches() -> None:
    with pytest.raises(ConfigError, match="images of 40×64 pixels do not divide into patches of 16"):
        conformer().features(torch.zeros(1, 3, 64, 40), {})


def test_input_has_the_published_mean() -> None:
    backbone = load_config("method=ts_cam", "backbone=conformer_small").backbone
    assert normalization(backbone.get("model"), backbone.mean, backbone.std)[0] == (0.485, 0.456, 0.406)
    with pytest.raises(ConfigError, match="expected three numbers each, since timm has no such network"):
        normalization(None, None, backbone.std)


def published(form: str, classes: int = 1000) -> dict[str, Tensor]:
    """The state dict of a micro Conformer with its classifiers, in the names of a publisher."""
    backbone = busy(conformer())
    state = dict(backbone.state_dict())
    state |= {"trans_cls_head.weight": torch.randn(classes, 96), "trans_cls_head.bias": torch.randn(classes)}
    state |= {"conv_cls_head.weight": torch.randn(classes, 128), "conv_cls_head.bias": torch.randn(classes)}
    if form == "conformer":
        return state
    renamed = {}
    for name, value in state.items():
        new = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        new = new.replace("norm1.", f"{form}1.").replace("norm2.", f"{form}2.")
        renamed[f"head.{new}" if "cls_head" in new else f"backbone.{new}"] = value
    return renamed


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, bytes], list[str]]]:
    """A server in the publisher's place: its address, its files by path, and what was asked for."""
    contents: dict[str, bytes] = {}
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content = contents.get(self.path, b"")
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", contents, asked
        running.shutdown()


def as_file(content: Any) -> tuple[str, bytes]:
    """A PyTorch file, and the name under which its publisher would put it."""
    file = io.BytesIO()
    torch.save(content, file)
    data = file.getvalue()
    return f"/v0/conformer-p16_in1k-{hashlib.sha256(data).hexdigest()[:8]}.pth", data


@pytest.mark.parametrize("form", ["norm", "ln", "conformer"])
def test_published_weights_are_downloaded_once(form: str, server: tuple[str, dict[str, bytes], list[str]]) -> None:
    """In the names of both versions of mmpretrain, which wraps them, and in those of the Conformer's own code."""
    address, contents, asked = server
    state = published(form)
    path, contents[path] = as_file(state if form == "conformer" else {"meta": {}, "state_dict": state})
    for _ in range(2):
        loaded = conformer(pretrained=True, url=f"{address}{path}")
    assert asked == [path]
    expected = conformer_names(state)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert loaded.classifier_bias is not None
    assert torch.equal(loaded.classifier_bias, expected["trans_cls_head.bias"])


def test_classifier_of_the_branch_is_kept_for_as_many_classes(tmp_path: Path) -> None:
    state = published("conformer", classes=5)
    torch.save(state, tmp_path / "weights.pth")
    backbone = conformer(weights=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.branch_classifier(5).weight, state["conv_cls_head.weight"])
    assert backbone.branch_classifier(6).weight.abs().max() < 0.2


def test_what_cannot_be_downloaded_is_named(server: tuple[str, dict[str, bytes], list[str]]) -> None:
    address, contents, _ = server
    with pytest.raises(CheckpointError, match=r"/nothing\.pth' cannot be downloaded .*404.*backbone.weights=FILE"):
        download_weights(f"{address}/nothing.pth")
    with pytest.raises(CheckpointError, match=r"\(127\.0\.0\.1:9 cannot be reached: ConnectionError\)"):
        download_weights("http://127.0.0.1:9/nothing.pth")
    contents["/other-00000000.pth"] = b"something else"
    with pytest.raises(CheckpointError, match="is not the file that was published: its SHA-256 begins with"):
        download_weights(f"{address}/other-00000000.pth")
    assert not [path for path in Path(torch.hub.get_dir()).rglob("*") if path.is_file()]


def test_weights_of_other_networks_are_refused(tmp_path: Path) -> None:
    torch.save({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "deit.pth")
    with pytest.raises(
        CheckpointError, match="not the weights of a Conformer: entry trans_patch_conv.weight is missing"
    ):
        conformer(weights=str(tmp_path / "deit.pth"))
    state = published("ln")
    del state["backbone.trans_norm.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match="1 missing \\(trans_norm.bias\\)"):
        conformer(weights=str(tmp_path / "cut.pth"))
