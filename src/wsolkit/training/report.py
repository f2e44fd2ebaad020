"""Write the report of a run: pictures after each validation, and the whole report after the test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from omegaconf import DictConfig

from wsolkit.data.datamodule import WSOLDataModule
from wsolkit.data.dataset import WSOLDataset
from wsolkit.methods.base import WSOLModule
from wsolkit.metrics.evaluation import Outcome
from wsolkit.reporting.charts import (
    EPOCH_METRICS,
    Shown,
    charts,
    example_image,
    threshold_curves,
)
from wsolkit.reporting.gallery import localize_with, show
from wsolkit.reporting.images import ImageRow, ImageTables
from wsolkit.reporting.pictures import choose_examples, pixels, write_inside, write_report
from wsolkit.reporting.selection import chosen_epochs
from wsolkit.reporting.table import write_results
from wsolkit.reporting.terminal import picture
from wsolkit.system.names import readable
from wsolkit.training.evaluator import Evaluator


class Report(Callback):
    """Shows the same images after every validation, and writes the report and its charts after the test.

    It sends pictures, tables and curves to W&B, and pictures alone to TensorBoard.

    Args:
        folder: the run directory.
        count, names: select the examples, see `choose_examples`. After validation, names from other splits are ignored.
        listed: the number of images in images.csv and in W&B's tables, see `ImageTables`.
        title: describes the run.
        method: the name of the method in tables.
    """

    def __init__(
        self, folder: Path, count: int, names: Sequence[str], listed: int | None, title: str, method: str
    ) -> None:
        self.folder, self.count, self.names, self.title, self.method = folder, count, names, title, method
        self.listed = listed
        self._tables: ImageTables | None = None
        self.epochs: dict[str, list[float]] = {}
        """The numbers of the validation after each epoch, by name. "epoch" counts from 1."""

    @classmethod
    def of(cls, cfg: DictConfig, folder: Path, dataset: WSOLDataset, title: str, method: str) -> Report:
        """Build the report that the settings describe.

        Raises:
            ConfigError: no image has one of the names in `cfg.examples`.
        """
        choose_examples(dataset, cfg.num_examples, cfg.examples)
        return cls(folder, cfg.num_examples, cfg.examples, cfg.num_table_images, title, method)

    def state_dict(self) -> dict[str, Any]:
        """Return the lists that a resumed run continues."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the lists in a resumed run.

        The test also calls this with the best checkpoint, and the report then keeps its longer lists.
        """
        earlier = state_dict["epochs"]
        if len(earlier.get("epoch", ())) > len(self.epochs.get("epoch", ())):
            self.epochs = earlier

    def outcome(self, evaluator: Evaluator) -> Outcome:
        """Return the metrics of the latest pass, with the lists of the epochs and the epochs that would be chosen."""
        epochs = {f"epochs/{name}": values for name, values in self.epochs.items()}
        return Outcome(evaluator.results | chosen_epochs(evaluator.results, epochs), evaluator.curves | epochs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make W&B draw validation metrics against epochs."""
        for logger in _loggers(trainer, WandbLogger):
            for name in ("examples/val", *(f"val/{name}" for name in _evaluator(pl_module).evaluation.names)):
                logger.experiment.define_metric(name, step_metric="epoch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the numbers of a validation, and show its images."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            results = _evaluator(pl_module).results
            kept: dict[str, float] = {"epoch": trainer.current_epoch + 1}
            for name, value in results.items():
                # It keeps the metrics of the method, and not those of baselines.
                if name.rpartition("/")[2] in EPOCH_METRICS and name.count("/") < 2:
                    kept[name] = value
            if self.epochs.keys() != kept.keys():  # This is the first validation, or a resumed run has other protocols.
                self.epochs = {name: [] for name in kept}
            for name, value in kept.items():
                self.epochs[name].append(value)
        if not (_loggers(trainer, WandbLogger, TensorBoardLogger) and self.count > 0):
            return
        module, datamodule = _parts(trainer, pl_module)
        dataset = datamodule.dataset("val")
        normalization = datamodule.mean, datamodule.std
        evaluator = _evaluator(module)
        with picture("examples/val"):
            examples = show(
                localize_with(module, evaluator.evaluation),
                evaluator.evaluation,
                evaluator.results,
                dataset,
                choose_examples(dataset, self.count),
                module.description.class_names,
                normalization,
            )
            _log_examples(trainer, examples)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the tables of images."""
        module, datamodule = _parts(trainer, pl_module)
        self._tables = ImageTables(_evaluator(module).evaluation, datamodule.dataset("test"), self.listed)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the results first, and then the pictures."""
        module, datamodule = _parts(trainer, pl_module)
        class_names = module.description.class_names
        assert self._tables is not None
        evaluator = _evaluator(module)
        tables = self._tables.rows(evaluator.results, class_names)
        if not trainer.is_global_zero:
            return
        outcome = self.outcome(evaluator)
        write_results(self.folder, outcome, class_names, tables)
        examples = choose_examples(datamodule.dataset("test"), self.count, self.names)
        inside: Figure | None = None
        with picture(self.folder / "inside.png"):
            inside = write_inside(self.folder, module, datamodule, examples)
        write_report(
            self.folder,
            self.title,
            self.method,
            class_names,
            module.description.config,
            datamodule,
            evaluator.evaluation,
            outcome,
            localize_with(module, evaluator.evaluation),
            examples,
        )
        if _loggers(trainer, WandbLogger, TensorBoardLogger):
            figures = {f"charts/{name}": figure for name, figure in charts(*outcome).items()}
            _log_figures(trainer, figures if inside is None else figures | {"examples/inside": inside})
            _log_tables(trainer, tables, outcome)


def _loggers(trainer: Trainer, *kinds: type) -> list[Any]:
    """Return the loggers of some kinds, in the process that logs."""
    return [logger for logger in trainer.loggers if isinstance(logger, kinds) and trainer.is_global_zero]


def _log_examples(trainer: Trainer, examples: Sequence[Shown]) -> None:
    """Log the images of the validation as `examples/val`."""
    step = max(trainer.global_step - 1, 0)  # The numbers of the validation have the same step.
    pictures = [example_image(example) for example in examples]
    fits = ["" if math.isnan(example.iou) else f", IoU {example.iou:.2f}" for example in examples]
    captions = [f"{readable(example.label)}{fit}" for example, fit in zip(examples, fits, strict=True)]
    for logger in _loggers(trainer, WandbLogger):
        import wandb

        images = [wandb.Image(one, caption=said) for one, said in zip(pictures, captions, strict=True)]
        logger.log_metrics({"examples/val": images, "epoch": trainer.current_epoch}, step=step)
    for logger in _loggers(trainer, TensorBoardLogger):
        for example, one in zip(examples, pictures, strict=True):
            logger.experiment.add_image(f"examples/{readable(example.name)}", one, step, dataformats="HWC")


def _log_figures(trainer: Trainer, figures: Mapping[str, Figure]) -> None:
    """Log figures by name."""
    for name, figure in figures.items():
        with picture(f"{name} of the logger"):
            drawn = pixels(figure)
            for logger in _loggers(trainer, WandbLogger):
                logger.log_image(name, [drawn])
            for logger in _loggers(trainer, TensorBoardLogger):
                logger.experiment.add_image(name, drawn, trainer.global_step, dataformats="HWC")


def _log_tables(trainer: Trainer, tables: Mapping[str, Sequence[ImageRow]], outcome: Outcome) -> None:
    """Log tables to W&B as `images/<protocol>`, and the metrics at each threshold as `curves/<protocol>`."""
    for logger in _loggers(trainer, WandbLogger):
        import wandb

        for protocol, rows in tables.items():
            logger.log_table(f"images/{protocol}", list(ImageRow._fields), [list(row) for row in rows])
            thresholds, lines = threshold_curves(outcome.curves, protocol)
            plot = wandb.plot.line_series(
                thresholds, list(lines.values()), list(lines), title=f"{protocol}: percent at each τ", xname="threshold"
            )
            logger.log_metrics({f"curves/{protocol}": plot})


def _parts(trainer: Trainer, module: LightningModule) -> tuple[WSOLModule, WSOLDataModule]:
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(datamodule, WSOLDataModule)
    assert isinstance(module, WSOLModule)
    return module, datamodule


def _evaluator(module: LightningModule) -> Evaluator:
    assert isinstance(module, WSOLModule)
    return module.attached(Evaluator)
