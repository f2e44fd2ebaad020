"""Images per second in training and inference, and peak memory, of a method on a backbone on this machine.

    python benchmarks/throughput.py method=sat backbone=vit_tiny trainer.precision=bf16-mixed

Takes the settings of `python -m wsolkit.train`; weights are random and images noise, which does not change
the speed.
Training is forward, losses, backward and the optimizer's step; inference is `localize`. Loading of data is not counted.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import torch
from timing import finish, name, steps

from wsolkit import load_config

WARMUP, SECONDS = 2, 20.0


def images_per_second(step: Callable[[], object], batch_size: int, device: torch.device) -> float:
    """Repeat a step for SECONDS after WARMUP steps."""

    for _ in range(WARMUP):
        step()
    finish(device)
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        step()
        finish(device)
        steps += 1
    return steps * batch_size / (time.perf_counter() - start)


def main() -> None:
    """Measure and print one line of a Markdown table."""
    cfg = load_config(
        "dataset=listed", "dataset.root=none", "dataset.num_classes=1000", "backbone.pretrained=false", *sys.argv[1:]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made, batch_size = steps(cfg, device), cfg.dataset.batch_size
    training = images_per_second(made.train, batch_size, device)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_resident_bytes()
    inference = images_per_second(made.infer, batch_size, device)
    print("| method | backbone | precision | batch | training images/s | inference images/s | peak memory | device |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {cfg.method.name} | {cfg.backbone.name} | {cfg.trainer.precision} | {batch_size} "
        f"| {training:.1f} | {inference:.1f} | {memory / 2**30:.2f} GiB | {name(device)} |"
    )


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
