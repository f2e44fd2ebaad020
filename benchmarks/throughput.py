"""Images per second in training and inference, and peak memory, of a method on a backbone on this machine.

    python benchmarks/throughput.py method=sat backbone=vit_tiny trainer.precision=bf16-mixed

Takes the settings of `python -m wsolkit.train`; weights are random and images noise, which does not change
the speed.
Training is forward, losses, backward and the optimizer's step; inference is `localize`. Loading of data is not counted.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from wsolkit import build_module, load_config
from wsolkit.build import build_optimization

WARMUP, SECONDS = 2, 20.0


def images_per_second(step: Callable[[], object], batch_size: int, device: torch.device) -> float:
    """Repeat a step for SECONDS after WARMUP steps."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARMUP):
        step()
    finish()
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        step()
        finish()
        steps += 1
    return steps * batch_size / (time.perf_counter() - start)


def main() -> None:
    """Measure and print one line of a Markdown table."""
    cfg = load_config(
        "dataset=listed", "dataset.root=none", "dataset.num_classes=1000", "backbone.pretrained=false", *sys.argv[1:]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(cfg.trainer.precision))
    module = build_module(cfg).to(device)
    size, batch_size = cfg.dataset.image_size, cfg.dataset.batch_size
    batch = {
        "image": torch.randn(batch_size, 3, size, size, device=device),
        "label": torch.randint(cfg.dataset.num_classes, (batch_size,), device=device),
    }
    optimizer = build_optimization(cfg).optimizer(module)

    def precision() -> torch.autocast | nullcontext[None]:
        return torch.autocast(device.type, half) if half is not None else nullcontext()

    def train() -> None:
        with precision():
            loss = module.losses(batch)["loss"]  # type: ignore[arg-type]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def infer() -> None:
        with precision(), torch.inference_mode():
            module.localize(batch["image"])

    training = images_per_second(train, batch_size, device)
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()
    else:
        name, memory = f"{platform.machine()} CPU, {torch.get_num_threads()} threads", _peak_resident_bytes()
    module.eval()
    inference = images_per_second(infer, batch_size, device)
    print("| method | backbone | precision | batch | training images/s | inference images/s | peak memory | device |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {cfg.method.name} | {cfg.backbone.name} | {cfg.trainer.precision} | {batch_size} "
        f"| {training:.1f} | {inference:.1f} | {memory / 2**30:.2f} GiB | {name} |"
    )


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
