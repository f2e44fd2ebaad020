"""Weights from timm's hub, with a local server in the hub's place."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

MODEL = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"

CODE = """
from wsolkit import build_module, load_config
module = build_module(load_config("method=ts_cam", "backbone=vit_tiny", "dataset.image_size=64", "dataset.resize=64"))
network = module.network.backbone
print(network.network.norm.bias[0].item(), network.classifier_bias[7].item(), tuple(network.network.pos_embed.shape))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """Serve one file as the hub does; yields its address."""
    torch.manual_seed(0)
    state = timm.create_model(MODEL).state_dict()
    state["norm.bias"][0], state["head.bias"][7] = 0.25, 0.5
    content = safetensors.torch.save(state)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            found = self.path == f"/timm/{MODEL}/resolve/main/model.safetensors"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if found and body:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"} | environment
    return subprocess.run([sys.executable, "-c", CODE], env=settings, capture_output=True, text=True, check=False)


def test_pretrained_weights_come_from_the_hub(hub: str, tmp_path: Path) -> None:
    done = load(tmp_path, HF_ENDPOINT=hub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "0.25 0.5 (1, 17, 192)"  # position embedding interpolated to 64 pixels


def test_unreachable_hub_is_named_with_what_to_do(tmp_path: Path) -> None:
    done = load(tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode != 0
    assert f"the weights of '{MODEL}' did not come from timm's hub" in done.stderr
    assert "backbone.weights=FILE" in done.stderr
