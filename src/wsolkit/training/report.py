"""The report of a run: pictures after each validation, and all that there is after the test."""

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
from wsolkit.reporting.table import write_results
from wsolkit.reporting.terminal import picture
from wsolkit.system.names import readable
from wsolkit.training.evaluator import Evaluator


class Report(Callback):
    """Shows the same images after every validation, and writes the report and its charts after the test.

    Pictures, tables and curves go to W&B and, but for tables and curves, to TensorBoard.

    Args:
        folder: run directory.
        count, names: which examples, see `choose_examples`; after validation, images of other splits are not named.
        listed: how many images images.csv and W&B's tables list, see `ImageTables`.
        title: what was run.
        method: its name in tables.
    """

    def __init__(
        self, folder: Path, count: int, names: Sequence[str], listed: int | None, title: str, method: str
    ) -> None:
        self.folder, self.count, self.names, self.title, self.method = folder, count, names, title, method
        self.listed = listed
        self._tables: ImageTables | None = None
        self.epochs: dict[str, list[float]] = {}
        """Numbers of the validation after each epoch, by name; "epoch" counts from 1."""

    @classmethod
    def of(cls, cfg: DictConfig, folder: Path, dataset: WSOLDataset, title: str, method: str) -> Report:
        """The report that settings describe.

        Raises:
            ConfigError: there is no image of a name in `cfg.examples`.
        """
        choose_examples(dataset, cfg.num_examples, cfg.examples)
        return cls(folder, cfg.num_examples, cfg.examples, cfg.num_table_images, title, method)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's hook: a resumed run continues the lists."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning's hook, of a resumed run; and of the test of the best checkpoint, which knows fewer epochs."""
        earlier = state_dict["epochs"]
        if len(earlier.get("epoch", ())) > len(self.epochs.get("epoch", ())):
            self.epochs = earlier

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: in W&B, what validation gives is drawn against epochs."""
        for logger in _loggers(trainer, WandbLogger):
            for name in ("examples/val", *(f"val/{name}" for name in _evaluator(pl_module).evaluation.names)):
                logger.experiment.define_metric(name, step_metric="epoch")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            results = _evaluator(pl_module).results
            kept: dict[str, float] = {"epoch": trainer.current_epoch + 1}
            for name, value in results.items():
                if name.rpartition("/")[2] in EPOCH_METRICS and name.count("/") < 2:  # of the method, not of baselines
                    kept[name] = value
            if self.epochs.keys() != kept.keys():  # the first; or a resumed run has other protocols
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
        """Lightning's hook."""
        module, datamodule = _parts(trainer, pl_module)
        self._tables = ImageTables(_evaluator(module).evaluation, datamodule.dataset("test"), self.listed)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: first the results, then the pictures."""
        module, datamodule = _parts(trainer, pl_module)
        class_names = module.description.class_names
        assert self._tables is not None
        evaluator = _evaluator(module)
        tables = self._tables.rows(evaluator.results, class_names)
        if not trainer.is_global_zero:
            return
        epochs = {f"epochs/{name}": values for name, values in self.epochs.items()}
        outcome = Outcome(evaluator.results, evaluator.curves | epochs)
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
    """Loggers of some kinds, in the process that logs."""
    return [logger for logger in trainer.loggers if isinstance(logger, kinds) and trainer.is_global_zero]


def _log_examples(trainer: Trainer, examples: Sequence[Shown]) -> None:
    """Log what validation has shown, as `examples/val`."""
    step = max(trainer.global_step - 1, 0)  # that of the validation's numbers
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
    """Log tables as `images/<protocol>`, and what is reached at each threshold as `curves/<protocol>`, to W&B."""
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
