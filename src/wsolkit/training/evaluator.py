"""Evaluate a module in validation and test."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import distributed

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.records import Records
from wsolkit.errors import ConfigError, TrainingError
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Evaluation, outcome
from wsolkit.metrics.norms import NormHistogram
from wsolkit.types import EvaluationBatch


class Evaluator(Callback):
    """Localizes each batch of validation and test, and logs the metrics as `val/…` and `test/…`.

    Args:
        evaluation: the metrics under one or more protocols, with the thresholds that validation selects.

    Attributes:
        results: the numbers of the latest pass, by name.
        curves: the curves and tables of that pass, by name.
        norm_histogram: the norms of the features in the test, if the method shows them.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.norm_histogram = NormHistogram()
        self.results: dict[str, float] = {}
        self.curves: dict[str, list[Any]] = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give all processes the BatchNorm statistics of the first one, so that they evaluate the same network."""
        self.evaluation.to(pl_module.device)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self.evaluation.pseudo_boxes = datamodule.pseudo_boxes if isinstance(datamodule, WSOLDataModule) else None
        if distributed.is_available() and distributed.is_initialized():
            for buffer in _method(pl_module).network.buffers():
                distributed.broadcast(buffer, src=0)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the metrics to the device of the module."""
        self.evaluation.to(pl_module.device)
        self.evaluation.pseudo_boxes = None
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
        """Localize a batch and update the metrics."""
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
        """Localize a batch and update the metrics, and the norms of its features if the method shows them."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        with _precision(trainer):
            norms = _method(pl_module).norms(batch["image"])
        if norms is not None:
            self.norm_histogram.update(norms, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics, and select the best thresholds."""
        self.evaluation.thresholds = {}
        self._finish(pl_module, "val")
        self.evaluation.select(self.results)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics, at the thresholds that validation selected, if any."""
        self._finish(pl_module, "test")
        self.curves |= outcome(self.norm_histogram.compute()).curves
        self.norm_histogram.reset()

    def _finish(self, module: LightningModule, stage: str) -> None:
        computed = self.evaluation.compute()  # It sums over all processes, so nothing is left to synchronise.
        self.evaluation.reset()
        self.results, self.curves = outcome(computed)
        module.log_dict({f"{stage}/{name}": value for name, value in self.results.items()})

    def check_finite(self, records: Records, network: str) -> None:
        """Check that all logits and score maps of the latest pass were finite.

        Args:
            records: the records of its split.
            network: names the network in the message.

        Raises:
            TrainingError: some were not finite. The message names their images, which count as wrong.
        """
        count = int(self.results.get("not_finite", 0))
        if count:
            named = [records.name(int(index)) for index in self.curves["not_finite_images"] if index >= 0]
            raise TrainingError(
                f"{network} gives logits or score maps that are not finite for {count} of {len(records.labels)} images "
                f"({', '.join(named)}{', …' if count > len(named) else ''}), and they count as wrong. Try "
                "trainer.precision=32-true, or another checkpoint. allow_not_finite=true accepts these results"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the metrics and the selected thresholds to a checkpoint."""
        checkpoint.setdefault("wsolkit", {}).update(metrics=self.results, thresholds=self.evaluation.thresholds)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the selected thresholds from a checkpoint."""
        self.evaluation.thresholds = checkpoint["wsolkit"]["thresholds"]


def check_monitor(monitor: str | None, evaluation: Evaluation, records: Records) -> str:
    """Return the metric that selects the best checkpoint.

    Args:
        monitor: the metric in the settings. None means what the first protocol selects by: its `pseudo_max_box_acc`,
            `top1_cls`, or `max_box_acc`. Without boxes, the last means `pxap`, and without masks as well, `top1_cls`.
        evaluation: computes the metrics.
        records: the records of the split that selects the checkpoint.

    Raises:
        ConfigError: there is no such metric.
    """
    if monitor is None:
        first, metric = next(iter(evaluation.protocols.items()))
        if metric.protocol.selection == "classification":
            return "top1_cls"
        if metric.protocol.selection == "pseudo":
            return f"{first}/pseudo_max_box_acc"
        if len(records.boxes(0)):
            return f"{first}/max_box_acc"
        return "top1_cls" if records.mask(0) is None else f"{first}/pxap"
    if monitor not in evaluation.names:
        raise ConfigError(f"monitor={monitor}: expected one of {', '.join(evaluation.names)}")
    return monitor


def _precision(trainer: Trainer) -> AbstractContextManager[None]:
    """Return the run's precision context. Lightning enters it for the methods of the module, but not for callbacks."""
    return trainer.precision_plugin.val_step_context()


def _method(module: LightningModule) -> WSOLModule:
    assert isinstance(module, WSOLModule)
    return module
