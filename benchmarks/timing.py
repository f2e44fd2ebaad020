"""What several benchmarks share: functions timed in turns, steps of a method, and the name of the processor."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from wsolkit import build_module
from wsolkit.build import build_optimization
from wsolkit.methods.base import WSOLModule

TRANSFORMERS, CNNS = ("sat", "ts_cam", "scm"), ("cam", "spa", "bridging_gap")
TERMS = {"spa": ["method.start_epoch=0"], "bridging_gap": ["method.warmup_epochs=0"]}  # every term of the loss, at once
HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def finish(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    *functions: Callable[[], object], device: torch.device, seconds: float = 2.0, rounds: int = 2
) -> list[float]:
    """Median times of functions that are run in turns, for `seconds` and at least `rounds` rounds.

    On one thread of a CPU, these are times of the processor, into which other work on the machine does not count.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: list[list[float]] = [[] for _ in functions]
    begin = time.perf_counter()
    while len(times[0]) <= rounds or time.perf_counter() - begin < seconds:
        for function, own in zip(functions, times, strict=True):
            start = clock()
            function()
            finish(device)
            own.append(1e3 * (clock() - start))
    return [statistics.median(own[1:]) for own in times]  # the first round warms up


class Steps(NamedTuple):
    """What is timed of a method: `forward` computes the loss, `train` makes a whole step, `infer` localizes."""

    forward: Callable[[], Tensor]
    train: Callable[[], None]
    infer: Callable[[], object]


def steps(cfg: DictConfig, device: torch.device, module: WSOLModule | None = None) -> Steps:
    """Make the steps of a method on random images, in the precision of `cfg.trainer`.

    Args:
        cfg: the settings of a run.
        device: where the steps run.
        module: the method, or None to build that of `cfg`.
    """
    module = (module or build_module(cfg)).to(device)
    optimizer = build_optimization(cfg).optimizer(module)
    size, count = cfg.dataset.image_size, cfg.dataset.batch_size
    image = torch.randn(count, 3, size, size, device=device)
    label = torch.randint(cfg.dataset.num_classes, (count,), device=device)
    half = HALF.get(str(cfg.trainer.precision))

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(device.type, half) if half is not None else nullcontext()

    def forward() -> Tensor:
        module.train()
        with precision():
            return module.losses({"image": image, "label": label})["loss"]

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward().backward()
        optimizer.step()

    def infer() -> object:
        module.eval()
        with precision(), torch.inference_mode():
            return module.localize(image)

    return Steps(forward, train, infer)


def name(device: torch.device) -> str:
    """Name the processor and its kind of arithmetic: a GPU by its model, a CPU by its instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    units = [unit for unit in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if features.get(unit)]
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU ({', '.join(units)}), {threads} thread{'s' if threads > 1 else ''}"
