"""Evaluation of a module in validation and test."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import distributed

from wsolkit.data.records import Records
from wsolkit.errors import ConfigError, TrainingError
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation, outcome
from wsolkit.metrics.norms import NormHistogram
from wsolkit.types import EvaluationBatch


class Evaluator(Callback):
    """Localizes each batch of validation and test, and logs the metrics as `val/…` and `test/…`.

    Args:
        evaluation: metrics under one or more protocols, with the thresholds that validation selects.

    Attributes:
        results: numbers of the latest pass, by name.
        curves: curves and tables of that pass, by name.
        norm_histogram: norms of features in the test, where the method shows them.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.norm_histogram = NormHistogram()
        self.results: dict[str, float] = {}
        self.curves: dict[str, list[Any]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have all processes evaluate one network, with the BatchNorm statistics of the first."""
        self.evaluation.to(pl_module.device)
        if distributed.is_available() and distributed.is_initialized():
            for buffer in _method(pl_module).network.buffers():
                distributed.broadcast(buffer, src=0)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the metrics where the module is."""
        self.evaluation.to(pl_module.device)
        self.norm_histogram.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Localize and count a batch."""
        module = _method(pl_module)
        with _precision(trainer):
            self.evaluation.update(batch, module.localize, module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Localize and count a batch, and the norms of its features, if the method shows them."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        with _precision(trainer):
            norms = _method(pl_module).norms(batch["image"])
        if norms is not None:
            self.norm_histogram.update(norms, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics, and select the thresholds that were best."""
        self.evaluation.thresholds = {}
        self._finish(pl_module, "val")
        self.evaluation.select(self.results)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics, at the thresholds selected in validation, if any."""
        self._finish(pl_module, "test")
        self.curves |= outcome(self.norm_histogram.compute()).curves
        self.norm_histogram.reset()

    def _finish(self, module: LightningModule, stage: str) -> None:
        computed = self.evaluation.compute()  # summed over all processes: nothing is left to synchronise
        self.evaluation.reset()
        self.results, self.curves = outcome(computed)
        module.log_dict({f"{stage}/{name}": value for name, value in self.results.items()})

    def check_finite(self, records: Records, network: str) -> None:
        """Check that the latest pass met no logits or score maps that are not finite.

        Args:
            records: of its split.
            network: whose they are.

        Raises:
            TrainingError: it met some, and their images count as wrong; the message names them.
        """
        count = int(self.results.get("not_finite", 0))
        if count:
            named = [records.name(int(index)) for index in self.curves["not_finite_images"] if index >= 0]
            raise TrainingError(
                f"{network} gives logits or score maps that are not finite for {count} of {len(records.labels)} images "
                f"({', '.join(named)}{', …' if count > len(named) else ''}), and they count as wrong. Try "
                "trainer.precision=32-true, or another checkpoint; allow_not_finite=true accepts such results"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the numbers and the selected thresholds."""
        checkpoint.setdefault("wsolkit", {}).update(metrics=self.results, thresholds=self.evaluation.thresholds)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the thresholds that were selected."""
        self.evaluation.thresholds = checkpoint["wsolkit"]["thresholds"]


def check_monitor(monitor: str | None, evaluation: Evaluation, records: Records) -> str:
    """The metric by which checkpoints are chosen.

    Args:
        monitor: the metric of the settings; None: the first protocol's `max_box_acc`, or its `pxap` where there are
            masks and no boxes, or `top1_cls` where there are neither.
        evaluation: computes the metrics.
        records: of the split on which it is chosen.

    Raises:
        ConfigError: there is no such metric.
    """
    if monitor is None:
        first = next(iter(evaluation.protocols))
        if len(records.boxes(0)):
            return f"{first}/max_box_acc"
        return "top1_cls" if records.mask(0) is None else f"{first}/pxap"
    if monitor not in evaluation.names:
        raise ConfigError(f"monitor={monitor}: expected one of {', '.join(evaluation.names)}")
    return monitor


def _precision(trainer: Trainer) -> AbstractContextManager[None]:
    """The precision of the run, which Lightning sets for the module's own hooks only."""
    return trainer.precision_plugin.val_step_context()


def _method(module: LightningModule) -> WSOLModule:
    assert isinstance(module, WSOLModule)
    return module
