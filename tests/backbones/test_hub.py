"""Weights from timm's hub, with a local server in the hub's place."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest
import safetensors.torch
import timm
import torch

from wsolkit.backbones.pretrained import _why_unreachable, create
from wsolkit.errors import CheckpointError

VIT, CNN = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "mobilenetv2_100.ra_in1k"

CODE = """
from wsolkit import build_module, load_config
from wsolkit.errors import WsolkitError

def show(overrides, describe):
    try:
        print(*describe(build_module(load_config(*overrides)).network.backbone))
    except WsolkitError as error:
        print(" ".join(str(error).split()))

show(
    ["method=ts_cam", "backbone=vit_tiny", "dataset.image_size=64", "dataset.resize=64"],
    lambda own: (own.network.norm.bias[0].item(), own.classifier_bias[7].item(), tuple(own.network.pos_embed.shape)),
)
show(
    ["method=trilite", "backbone=vit_tiny_tokens"],
    lambda own: (own.network.norm.bias[0].item(), own.patch_size, own.depth),
)
show(
    ["method=cam", "backbone=mobilenetv2"],
    lambda own: (own.stages[-1][1].bias[0].item(), own.classifier.bias[7].item(), tuple(own.classifier.weight.shape)),
)
"""


@pytest.fixture
def hub() -> Iterator[str]:
    """Serve two files as the hub does; yields its address."""
    torch.manual_seed(0)
    contents = {}
    for model, norm, bias in ((VIT, "norm.bias", "head.bias"), (CNN, "bn2.bias", "classifier.bias")):
        state = timm.create_model(model).state_dict()
        state[norm][0], state[bias][7] = 0.25, 0.5
        contents[f"/timm/{model}/resolve/main/model.safetensors"] = safetensors.torch.save(state)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            content = contents.get(self.path, b"")
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(tmp_path: Path, **environment: str) -> list[str]:
    """What a new process, since the hub's address is read on import, says of three networks: a line for each."""
    settings = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"} | environment
    done = subprocess.run([sys.executable, "-c", CODE], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-3:]


@pytest.fixture
def closed_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a hub that does not answer, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", address)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    return address


def test_hub_that_does_not_answer_is_said_within_seconds(
    closed_port: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Handlers of other tests may hold a stream that is closed.
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(CheckpointError, match=f"timm's hub \\({closed_port} cannot be reached: ConnectionError\\)"):
        create(VIT, True, {})
    assert sum(waits) < 3
    assert capfd.readouterr() == ("", "")
    assert hub_constants.HF_HUB_OFFLINE is False


def test_connection_that_breaks_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            if len(asked) > 1:
                self.send_response(200)
                self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        assert _why_unreachable() is None
        server.shutdown()
    assert len(asked) == 2


def test_pretrained_weights_come_from_the_hub(hub: str, tmp_path: Path) -> None:
    assert load(tmp_path, HF_ENDPOINT=hub) == [
        "0.25 0.5 (1, 197, 192)",  # The position embedding keeps its grid, although the images have 64 pixels.
        "0.25 16 12",
        "0.25 0.5 (1000, 1280)",
    ]


def test_unreachable_hub_is_named_with_what_to_do(tmp_path: Path) -> None:
    for model, said in zip((VIT, VIT, CNN), load(tmp_path, HF_HUB_OFFLINE="1"), strict=True):
        assert f"the weights of '{model}' could not be loaded from timm's hub" in said
        assert "backbone.weights=FILE" in said
