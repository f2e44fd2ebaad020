"""Measure where the time of a training step and of an evaluation goes."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.profilers import Profiler
from rich.table import Table

from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation
from wsolkit.reporting.terminal import PlainConsole
from wsolkit.system.drafts import write_text

Stage = Literal["training", "evaluation"]

PARTS = {
    "data": "waiting for a batch, and moving it to the device",
    "forward": "the network",
    "loss": "what the method makes of its output",
    "backward": "",
    "optimizer": "its step, gradient clipping, zeroing",
    "maps": "score maps from the network's output",
    "metrics": "localization maps, masks; waiting for the boxes of the batch before",
    "summary": "numbers of the whole split",
    "logging": "losses, loggers, callbacks",
    "checkpoint": "writing it",
    "report": "pictures and charts, once",
    "loop": "Lightning's own",
}
_PART_OF_ACTION = (  # The first entry whose text is in the name of Lightning's action counts.
    ("dataloader_next", "data"),
    ("val_next", "data"),
    ("test_next", "data"),
    ("batch_transfer", "data"),
    ("batch_to_device", "data"),
    ("backward", "backward"),
    ("optimizer_step", "optimizer"),
    ("optimizer_zero_grad", "optimizer"),
    ("gradient_clipping", "optimizer"),
    ("training_step", "logging"),
    ("[Callback]Evaluator", "metrics"),
    ("Checkpoint", "checkpoint"),
    ("save_checkpoint", "checkpoint"),
    ("[Callback]Report", "report"),
    ("[Callback]", "logging"),
    ("[LightningModule]", "logging"),
)


_EVALUATED = (".on_validation_batch_end", ".on_test_batch_end")


class StepProfiler(Profiler):
    """Times what Lightning does, and what a method does within it. Each moment counts for the innermost part only.

    On a GPU it waits for the device between parts, so a step takes longer than without a profile.

    Args:
        skip: the number of training batches, and of evaluation batches, that it leaves out at the start.
    """

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.skip = skip
        self.batches: dict[Stage, int] = {"training": 0, "evaluation": 0}
        self.seconds: dict[Stage, defaultdict[str, float]] = {
            "training": defaultdict(float),
            "evaluation": defaultdict(float),
        }
        self._stage_now: Stage | None = None
        self._parts: list[str] = []
        self._since = 0.0

    def watch(self, module: WSOLModule, evaluation: Evaluation) -> None:
        """Also time the parts of a method and of its evaluation."""
        for name in module.network.passes:
            self._time(module.network, name, "forward")
        self._time(module, "losses", "loss")
        self._time(module, "localize", "maps")
        self._time(evaluation, "update", "metrics")
        self._time(evaluation, "compute", "summary")

    def _time(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        setattr(owner, name, timed)

    def start(self, action_name: str) -> None:
        """Start the clock of an action."""
        if action_name.endswith((".on_validation_start", ".on_test_start")):
            self._change("evaluation")
        elif action_name.endswith("train_dataloader_next"):
            self._change("training")
        elif action_name.endswith(".on_train_epoch_end"):
            self._change(None)
        part = next((part for text, part in _PART_OF_ACTION if text in action_name), None)
        self._enter(part or (self._parts[-1] if self._parts else "loop"))

    def stop(self, action_name: str) -> None:
        """Stop the clock of an action."""
        self._leave()
        if action_name == "run_training_batch":
            self._count("training")
        elif action_name.startswith("[Callback]Evaluator") and action_name.endswith(_EVALUATED):
            self._count("evaluation")
        elif action_name.startswith("[Strategy]") and action_name.endswith((".on_validation_end", ".on_test_end")):
            self._change(None)

    def _change(self, stage: Stage | None) -> None:
        self._credit()
        self._stage_now = stage

    def _count(self, stage: Stage) -> None:
        self.batches[stage] += 1
        if self.batches[stage] == self.skip:
            self._credit()
            self.seconds[stage].clear()

    def _enter(self, part: str) -> None:
        self._credit()
        self._parts.append(part)

    def _leave(self) -> None:
        self._credit()
        self._parts.pop()

    def _credit(self) -> None:
        """Add the time since the last call to the part in which it was spent."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stage_now is not None:
            self.seconds[self._stage_now][self._parts[-1] if self._parts else "loop"] += now - self._since
        self._since = now

    def results(self) -> dict[str, Any]:
        """Return the results of "training" and "evaluation".

        Each has the number of `batches`, the `ms` per batch, and in `parts` the ms per batch and the percentage of each
        part.
        """
        results: dict[str, Any] = {}
        for stage, seconds in self.seconds.items():
            batches, total = self.batches[stage] - self.skip, sum(seconds.values())
            if batches > 0:
                results[stage] = {
                    "batches": batches,
                    "ms": 1000 * total / batches,
                    "parts": {
                        part: {"ms": 1000 * seconds[part] / batches, "percent": 100 * seconds[part] / total}
                        for part in PARTS
                        if part in seconds
                    },
                }
        return results

    def report(self, folder: Path) -> None:
        """Print a table, and write profile.json into a run directory."""
        results = self.results()
        write_text(folder / "profile.json", json.dumps(results, indent=2) + "\n")
        for stage, result in results.items():
            table = Table(
                title=f"{stage}: {result['ms']:.2f} ms a batch, mean of {result['batches']}", title_justify="left"
            )
            table.add_column("part")
            table.add_column("ms", justify="right")
            table.add_column("%", justify="right")
            table.add_column("")
            for part, cost in result["parts"].items():
                table.add_row(part, f"{cost['ms']:.2f}", f"{cost['percent']:.1f}", PARTS[part])
            PlainConsole().print(table)
