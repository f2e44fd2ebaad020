"""Which form of attention is quicker, and how fast the transformer methods are beside the papers' released code.

    python benchmarks/attention.py                                                   # both tables
    python benchmarks/attention.py layer                                             # fused and plain attention alone
    python benchmarks/attention.py steps method=sat dataset.batch_size=32            # the methods

Rivals are timed in turns, and figures are medians. OMP_NUM_THREADS=1 measures time of the processor, which is steady on
a machine that has other work. The released code of TS-CAM, SCM and SAT stores the attention matrix of each block. It is
written out below, works on the same weights, and must give the same results, or the script fails.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timing import milliseconds, name, steps
from torch import Tensor

from wsolkit import build_module, load_config
from wsolkit.backbones.vit import ViT, prefers_plain
from wsolkit.localization.maps import min_max
from wsolkit.methods.base import WSOLModule
from wsolkit.methods.sat import SATNetwork
from wsolkit.methods.scm import ActivationDiffusionBlock, SpatialCalibration
from wsolkit.methods.ts_cam import CoupledMaps, TSCAMNetwork

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(16, 3, 65), (16, 3, 198), (16, 6, 198), (64, 3, 198), (1, 3, 198), (4, 6, 577), (4, 6, 785), (4, 6, 1025)]
METHODS = ("sat", "ts_cam", "scm")


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain attention on [B, h, N, d]."""
    weights: Tensor = (query * query.shape[-1] ** -0.5 @ key.mT).softmax(dim=-1)
    return weights @ value


def layer() -> None:
    """Print a table of attention alone, between the layer's two projections."""
    print(
        "| B, h, N | precision | inference, ms: fused | plain | ratio | training, ms: fused | plain | ratio | chosen |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    forms = (F.scaled_dot_product_attention, plain_attention)
    for (batch, heads, tokens), dtype in (
        (shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)
    ):
        qkv = torch.randn(batch, tokens, 3, heads, 64, device=DEVICE).to(dtype).requires_grad_()

        def forward(form: Callable[..., Tensor], qkv: Tensor = qkv) -> Tensor:
            return form(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)

        def train(form: Callable[..., Tensor], forward: Callable[..., Tensor] = forward) -> None:
            out = forward(form)
            out.backward(out.detach())

        with torch.inference_mode():
            inference = milliseconds(*[functools.partial(forward, form) for form in forms], device=DEVICE)
        training = milliseconds(*[functools.partial(train, form) for form in forms], device=DEVICE)
        chosen = [
            "plain" if prefers_plain(DEVICE.type, dtype, tokens, training) else "fused" for training in (False, True)
        ]
        cells = [f"{fused:.2f} | {plain:.2f} | {fused / plain:.2f}" for fused, plain in (inference, training)]
        print(
            f"| {batch}, {heads}, {tokens} | {str(dtype)[6:]} | {' | '.join(cells)} | {', '.join(chosen)} |", flush=True
        )


def released_block(block: Any, x: Tensor, spatial: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Run a transformer block, and return tokens [B, N, D], attention [B, h, N, N] and SAT's mask [B, N]."""
    attention, (batch, tokens, width) = block.attn, x.shape
    qkv = attention.qkv(block.norm1(x)).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (qkv[0] @ qkv[1].transpose(-2, -1)) * attention.scale
    weights = scores.softmax(dim=-1)
    mask = scores[:, :, -1].mean(dim=1).sigmoid()
    if spatial:
        weights = weights * mask[:, None, None]
    x = x + block.drop_path1(attention.proj((weights @ qkv[2]).transpose(1, 2).reshape(batch, tokens, width)))
    return x + block.drop_path2(block.mlp(block.norm2(x))), weights, mask


def released_sat(network: SATNetwork, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SAT: logits [B, C], localization map [B, h, w] and patch tokens [B, D, h, w]."""
    assert isinstance(network.backbone, ViT)
    tokens = network.backbone.embed(image)
    tokens = torch.cat([tokens, (network.spatial_token + network.spatial_embed).expand(len(tokens), -1, -1)], dim=1)
    masks = []
    for index, block in enumerate(network.backbone.blocks):
        tokens, _, mask = released_block(block, tokens, index in network.spatial)
        if index in network.spatial:
            masks.append(mask.float())
    semantic = network.head(network.backbone.patches(network.backbone.norm(tokens), image).contiguous())
    maps = network.backbone.grid(torch.stack(masks).mean(dim=0), image)
    return semantic.float().mean(dim=(2, 3)), maps, network.backbone.patches(tokens, image)


def released_ts_cam(network: TSCAMNetwork, image: Tensor) -> CoupledMaps:
    """TS-CAM: semantic maps [B, C, h, w], attention map [B, h, w] and patch tokens [B, D, h, w]."""
    assert isinstance(network.backbone, ViT)
    tokens, attention = network.backbone.embed(image), []
    for block in network.backbone.blocks:
        tokens, weights, _ = released_block(block, tokens)
        attention.append(weights)
    semantic = network.head(network.backbone.patches(network.backbone.norm(tokens), image).contiguous())
    summed = torch.stack(attention).mean(dim=2).sum(dim=0)[:, 0]  # [L, B, h, N, N] → [B, N]
    patches = network.backbone.patches(tokens, image)
    return CoupledMaps(semantic.float(), network.backbone.grid(summed.float(), image), patches, None)


def released_logits(network: TSCAMNetwork, image: Tensor) -> Tensor:
    """TS-CAM in training: the attention is kept, and not used."""
    return network.classify(released_ts_cam(network, image).semantic, None)


def released_diffusion(block: ActivationDiffusionBlock, semantic: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """One block of SCM: semantic [B, C, H, W] and attention [B, H, W], with the N×N matrices of Eqn. 3 to 5."""
    height, width = semantic.shape[-2:]
    place = torch.arange(height * width, device=semantic.device)
    row, column = place // width, place % width
    adjacency = ((row[:, None] - row).abs() + (column[:, None] - column).abs() == 1).float()
    unit = F.normalize(semantic.flatten(2), dim=1)
    similarity = unit.transpose(1, 2) @ unit  # [B, N, N]
    matrix = (torch.diag(adjacency.sum(dim=1)) - adjacency) * (block.semantic_weight * similarity - 1)
    inverse, twice = block.alpha * matrix.detach(), 2 * torch.eye(len(place), device=semantic.device)
    for _ in range(block.iterations):
        inverse = inverse @ (twice - matrix @ inverse)
    diffused = (inverse.transpose(1, 2) @ attention.flatten(1)[..., None])[..., 0]
    z = diffused / (block.threshold * attention.flatten(1).amax(dim=1, keepdim=True))
    update = min_max(F.tanhshrink(z).view_as(attention))
    return semantic + semantic * update[:, None], attention + update


def released_calibration(calibration: SpatialCalibration, semantic: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """The stack of SCM's blocks, in float32 as ours."""
    with torch.autocast(semantic.device.type, enabled=False):
        for block in calibration.blocks:
            semantic, attention = released_diffusion(block, semantic, attention)
    return semantic, attention


def as_released(module: Any) -> WSOLModule:
    """Let a method work as its released code does."""
    network = module.network
    if isinstance(network, SATNetwork):
        network.with_tokens = functools.partial(released_sat, network)  # type: ignore[method-assign]
    else:
        network.forward = functools.partial(released_logits, network)
        network.with_tokens = functools.partial(released_ts_cam, network)
    if hasattr(module, "calibration"):
        module.calibration.forward = functools.partial(released_calibration, module.calibration)
    return module  # type: ignore[no-any-return]


def check(own: WSOLModule, released: WSOLModule, size: int) -> None:
    """Compare loss and maps of both on one batch, without what is drawn at random."""
    image, label = torch.randn(2, 3, size, size, device=own.device), torch.tensor([0, 1], device=own.device)
    with torch.no_grad():
        for ours, theirs in (
            (own.eval().localize(image).maps, released.eval().localize(image).maps),
            (module.losses({"image": image, "label": label})["loss"] for module in (own, released)),
        ):
            if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4):
                sys.exit(f"error: the results differ by {(ours - theirs).abs().max():.1e}")


def speeds(overrides: Sequence[str]) -> None:
    """Print a table of images a second of the methods."""
    print("| method | backbone | precision | batch | | released, images/s | here, images/s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    common = (
        "dataset=listed",
        "dataset.root=none",
        "dataset.num_classes=200",
        "dataset.batch_size=16",
        "backbone=vit_tiny",
    )
    chosen = [override.removeprefix("method=") for override in overrides if override.startswith("method=")]
    rest = [override for override in overrides if not override.startswith("method=")]
    for method in chosen or METHODS:
        for precision in ("32-true", "bf16-mixed"):
            cfg = load_config(
                f"method={method}", *common, "backbone.pretrained=false", f"trainer.precision={precision}", *rest
            )
            torch.manual_seed(0)
            own, released = build_module(cfg).to(DEVICE), as_released(build_module(cfg).to(DEVICE))
            released.load_state_dict(own.state_dict())
            check(own, released, cfg.dataset.image_size)
            theirs, ours = steps(cfg, DEVICE, released), steps(cfg, DEVICE, own)
            for what, pair in (("training", (theirs.train, ours.train)), ("inference", (theirs.infer, ours.infer))):
                rates = [1e3 * cfg.dataset.batch_size / time for time in milliseconds(*pair, device=DEVICE, rounds=7)]
                print(
                    f"| {method} | {cfg.backbone.name} | {precision} | {cfg.dataset.batch_size} | {what} "
                    f"| {rates[0]:.1f} | {rates[1]:.1f} | {rates[1] / rates[0]:.2f} |",
                    flush=True,
                )


def main() -> None:
    """Measure and print Markdown tables."""
    chosen, overrides = sys.argv[1:2], sys.argv[2:]
    print(f"{name(DEVICE)}, torch {torch.__version__}\n")
    if chosen != ["steps"]:
        layer()
        print()
    if chosen != ["layer"]:
        speeds(overrides)


if __name__ == "__main__":
    main()
