"""What SCM's diffusion costs: both solvers against grid size and iterations, and a training step beside TS-CAM's.

    python benchmarks/scm_diffusion.py              # solvers
    python benchmarks/scm_diffusion.py step         # training step, ViT-S, batch 64
    python benchmarks/scm_diffusion.py step dataset.batch_size=16 backbone=vit_tiny trainer.precision=bf16-mixed

Times are medians of forward and backward, the two compared in turns; memory is what is kept for the backward pass.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence

import torch
from timing import milliseconds, name, steps
from torch import Tensor

from wsolkit import load_config
from wsolkit.methods.scm import ActivationDiffusionBlock, Solver, choose_solver

CLASSES = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kept_for_backward(function: Callable[[], object]) -> int:
    """Bytes of all tensors that a function stores for its backward pass."""
    stored: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(stored.values())


def block_forward(
    batch: int, side: int, iterations: int, solver: Solver, device: torch.device = DEVICE
) -> Callable[[], Tensor]:
    """Forward pass of one ADB on a random batch."""
    semantic = torch.randn(batch, CLASSES, side, side, device=device, requires_grad=True)
    attention = torch.rand(batch, side, side, device=device, requires_grad=True)
    block = ActivationDiffusionBlock(iterations, solver=solver).to(device)

    def forward() -> Tensor:
        semantic_after, attention_after = block(semantic, attention)
        loss: Tensor = semantic_after.sum() + attention_after.square().sum()
        return loss

    return forward


def solvers(batch: int, sides: Sequence[int], iterations: Sequence[int]) -> None:
    """Print rows of one ADB's cost."""
    for side, p in itertools.product(sides, iterations):
        forwards = [block_forward(batch, side, p, solver) for solver in ("stencil", "dense")]
        memory = [kept_for_backward(forward) / 2**20 for forward in forwards]
        stencil, dense = milliseconds(
            *[lambda forward=forward: forward().backward() for forward in forwards], device=DEVICE
        )
        auto = choose_solver(DEVICE.type, batch, side**2, p)
        print(
            f"| {side}×{side} | {batch} | {p} | {stencil:.1f} | {dense:.1f} | {dense / stencil:.1f} "
            f"| {memory[0]:.2f} | {memory[1]:.1f} | {auto} |",
            flush=True,
        )


def training_steps(overrides: Sequence[str]) -> None:
    """Print a table of training steps' cost."""
    common = ["dataset=listed", "dataset.root=none", "dataset.num_classes=1000", "backbone.pretrained=false"]
    configs = {
        "TS-CAM": load_config("method=ts_cam", *common, "dataset.batch_size=64", *overrides),
        "SCM, 4 ADBs, p = 4": load_config("method=scm", *common, "dataset.batch_size=64", *overrides),
    }
    made = [steps(cfg, DEVICE) for cfg in configs.values()]
    memory = [kept_for_backward(each.forward) / 2**20 for each in made]
    times = milliseconds(*[each.train for each in made], device=DEVICE, seconds=10, rounds=10)
    cfg = configs["TS-CAM"]
    print(
        f"| {cfg.backbone.name}, batch {cfg.dataset.batch_size}, {cfg.dataset.num_classes} classes "
        f"| ms a step | kept for backward, MiB |\n|---|---|---|"
    )
    for method, duration, size in zip(configs, times, memory, strict=True):
        print(f"| {method} | {duration:.0f} (×{duration / times[0]:.3f}) | {size:.0f} (+{size - memory[0]:.0f}) |")


def main() -> None:
    """Measure and print Markdown tables."""
    print(f"{name(DEVICE)}, torch {torch.__version__}\n")
    if sys.argv[1:2] == ["step"]:
        training_steps(sys.argv[2:])
        return
    print(f"One ADB, {CLASSES} classes, float32, forward and backward; memory kept for the backward pass\n")
    print("| grid | batch | p | stencil, ms | dense, ms | ratio | stencil, MiB | dense, MiB | auto |")
    print("|---|---|---|---|---|---|---|---|---|")
    solvers(16, [14, 28], [1, 2, 3, 4, 6, 8])
    solvers(2, [14, 28, 56], [4])


if __name__ == "__main__":
    main()
