"""What Lightning, logging and the checks of a run add to a training step, of each method.

    python benchmarks/step_cost.py                                                     # shapes, vit_micro and cnn_micro
    python benchmarks/step_cost.py backbone=vit_tiny dataset.image_size=224 dataset.resize=224 dataset.batch_size=16
    python benchmarks/step_cost.py method=scm

A step of a run as `python -m wsolkit.train` makes it (losses logged, progress bar, CSV log, learning rate, images a
second, memory, checks of the loss, checkpoint callbacks), and a bare step (forward, losses, backward, clipping,
optimizer) of a twin on the same batches, in turns. Times are of the processor, one core, and sums over the ten steps
between two logged ones; medians of those. What a second bare step seems to add is the noise.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # further threads would wait actively, and be counted

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig
from timing import CNNS, TERMS, TRANSFORMERS

from wsolkit import build_module, load_config
from wsolkit.build import build_optimization
from wsolkit.system.libraries import quieten_libraries
from wsolkit.training.checkpointing import LastCheckpoint
from wsolkit.training.failures import FiniteLoss
from wsolkit.training.loggers import build_loggers
from wsolkit.training.progress import Progress
from wsolkit.training.speed import Speed
from wsolkit.training.trainer import build_trainer

WINDOWS, WINDOW = 8, 10


class InTurns:
    """A loader of one batch, many times, which makes a bare step before it gives the next."""

    def __init__(self, batch: dict[str, torch.Tensor], bare: Callable[[], None]) -> None:
        self.batch = batch
        self.bare = bare
        self.bare_seconds: list[float] = []
        self.again_seconds: list[float] = []
        self.run_seconds: list[float] = []

    def __len__(self) -> int:
        return 1 + WINDOW * (1 + WINDOWS)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(len(self)):
            start = time.process_time()
            self.bare()
            again = time.process_time()
            self.bare()
            given = time.process_time()
            yield self.batch
            self.bare_seconds.append(again - start)
            self.again_seconds.append(given - again)
            self.run_seconds.append(time.process_time() - given)

    def windows(self, seconds: list[float]) -> list[float]:
        """Sums over the steps between two logged ones, without the first window."""
        return [sum(seconds[start : start + WINDOW]) for start in range(WINDOW, WINDOW * (1 + WINDOWS), WINDOW)]


def measure(cfg: DictConfig) -> tuple[float, float, float]:
    """Milliseconds of a bare step; what a run adds to it, and another bare step seems to, in percent."""
    torch.manual_seed(0)
    module, twin = build_module(cfg), build_module(cfg)
    size, count = cfg.dataset.image_size, cfg.dataset.batch_size
    batch = {"image": torch.randn(count, 3, size, size), "label": torch.arange(count) % cfg.dataset.num_classes}
    optimizer = build_optimization(cfg).optimizer(twin)

    def bare() -> None:
        loss = twin.losses(batch)["loss"]  # type: ignore[arg-type]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.trainer.gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), cfg.trainer.gradient_clip_val)
        optimizer.step()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loader = InTurns(batch, bare)
        callbacks: list[Callback] = [
            FiniteLoss(WINDOW),
            LastCheckpoint(folder, **cfg.checkpoints),
            LearningRateMonitor("step"),
            Speed(),
            Progress(console_kwargs={"file": io.StringIO(), "force_terminal": True}),
        ]
        trainer = build_trainer(cfg, folder, callbacks, build_loggers(cfg, folder))
        twin.train()
        trainer.fit(module, loader)
    bare_steps = loader.windows(loader.bare_seconds)

    def added(seconds: list[float]) -> float:
        pairs = zip(bare_steps, loader.windows(seconds), strict=True)
        return 100 * statistics.median(other / alone - 1 for alone, other in pairs)

    return 1000 * statistics.median(bare_steps) / WINDOW, added(loader.run_seconds), added(loader.again_seconds)


def main() -> None:
    """Print a Markdown table."""
    given = sys.argv[1:]
    chosen = {argument.removeprefix("method=") for argument in given if argument.startswith("method=")}
    backbone = next((argument for argument in given if argument.startswith("backbone=")), "")
    kinds = [TRANSFORMERS, CNNS] if not backbone else [TRANSFORMERS if "it_" in backbone else CNNS]
    rest = [argument for argument in given if not argument.startswith("method=")]
    quieten_libraries()
    print("| method | backbone | batch | bare step, ms | a run adds | noise |")
    print("|---|---|---|---|---|---|")
    for method in [method for kind in kinds for method in kind if not chosen or method in chosen]:
        cfg = load_config(
            *(
                "trainer=cpu",
                "trainer.max_epochs=1",
                f"trainer.log_every_n_steps={WINDOW}",
                "trainer.limit_val_batches=0",
            ),
            *("backbone.pretrained=false", "dataset.batch_size=16", f"method={method}"),
            *TERMS.get(method, []),
            *rest,
        )
        milliseconds, added, noise = measure(cfg)
        print(
            f"| {method} | {cfg.backbone.name} | {cfg.dataset.batch_size} | {milliseconds:.1f} "
            f"| {added:+.1f} % | {noise:+.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
