"""python -m wsolkit.evaluate: evaluate a trained model, or score maps from another program, and write a report.

With checkpoint=PATH, the method, the backbone and the data set come from the checkpoint. `dataset=…` sets another data
set, `dataset.root=…` another folder, and `protocol=…` other protocols. `save_maps=DIR` writes the maps. With
score_maps=DIR dataset=…, the command reads the maps from files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wsolkit.errors import ConfigError
from wsolkit.settings.checks import check_config
from wsolkit.settings.command import run_command_on_checkpoint
from wsolkit.settings.compose import plain, save_config
from wsolkit.settings.conf import given_overrides
from wsolkit.settings.run_directory import one_run
from wsolkit.train import EvaluationSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from omegaconf import DictConfig
    from torch import Tensor

    from wsolkit.data.datamodule import WSOLDataModule
    from wsolkit.data.dataset import WSOLDataset
    from wsolkit.data.records import Split
    from wsolkit.interop.score_maps import ScoreMaps
    from wsolkit.metrics.evaluation import Evaluation
    from wsolkit.reporting.gallery import Localize
    from wsolkit.types import EvaluationBatch


@dataclass
class Settings(EvaluationSettings):
    """The settings of conf/evaluate.yaml."""

    checkpoint: str | None
    score_maps: str | None
    save_maps: str | None


@one_run
def evaluate(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Evaluate a checkpoint or a folder of score maps, and write a report into a run directory. Return the metrics."""
    if cfg.score_maps is not None:
        return evaluate_score_maps(cfg, folder)
    if cfg.checkpoint is None:
        raise ConfigError("required and not given: checkpoint. Add checkpoint=…, or score_maps=DIR")
    return evaluate_checkpoint(cfg, folder)


def evaluate_checkpoint(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Evaluate `cfg.checkpoint`."""
    import lightning

    from wsolkit.build import build_datamodule, build_evaluator, build_model
    from wsolkit.checkpoint import read_checkpoint
    from wsolkit.data.classes import warn_of_numbers
    from wsolkit.interop.score_maps import ScoreMaps
    from wsolkit.reporting.summary import method_name, print_summary, title
    from wsolkit.settings.restore import restore
    from wsolkit.system.libraries import quieten_libraries
    from wsolkit.training.report import Report
    from wsolkit.training.tokens import cache_tokens
    from wsolkit.training.trainer import running

    checkpoint = read_checkpoint(cfg.checkpoint)
    cfg = restore(cfg, checkpoint, given_overrides())
    check_config(cfg, Settings)
    quieten_libraries()
    lightning.seed_everything(cfg.seed, verbose=False)
    warn_of_numbers(checkpoint.class_names, checkpoint.path)
    datamodule = build_datamodule(cfg, checkpoint.class_names)
    datamodule.read("val", "test")  # This names a broken data set before the command builds anything.
    report = Report.of(cfg, folder, datamodule.dataset("test"), title(cfg, checkpoint.config), method_name(cfg))
    module = build_model(cfg, checkpoint.class_names)
    checkpoint.load_into(module)
    evaluator = build_evaluator(cfg, module)
    module.callbacks = [evaluator]

    saved = None if cfg.save_maps is None else ScoreMaps(cfg.save_maps)
    with running(cfg, folder, module, [report]) as trainer:
        if trainer.is_global_zero:
            save_config(cfg, folder)
        cache_tokens(module, datamodule, trainer, ("val", "test") if datamodule.selects else ("test",))
        if datamodule.selects:
            evaluator.evaluation.on_maps = _writer(saved, datamodule.dataset("val"))
            trainer.validate(module, datamodule, verbose=False)  # The validation selects the thresholds.
        evaluator.evaluation.on_maps = _writer(saved, datamodule.dataset("test"))
        trainer.test(module, datamodule, verbose=False)
    if trainer.is_global_zero:
        chosen_on = evaluator.evaluation.chosen_on(datamodule.held_out)
        print_summary(folder, report.title, report.method, chosen_on, report.outcome(evaluator))
        if not cfg.allow_not_finite:
            evaluator.check_finite(datamodule.dataset("test").records, f"the network of '{checkpoint.path}'")
    return evaluator.results


def _writer(folder: ScoreMaps | None, dataset: WSOLDataset) -> Callable[[EvaluationBatch, list[Tensor]], None] | None:
    """Return a function that writes the maps of a split's batches to files, or None without a folder."""
    if folder is None:
        return None

    def write(batch: EvaluationBatch, maps: list[Tensor]) -> None:
        for index, score in zip(batch["index"].tolist(), maps, strict=True):
            folder.write(dataset.records.name(index), score.cpu().numpy())

    return write


def evaluate_score_maps(cfg: DictConfig, folder: Path) -> dict[str, float]:
    """Evaluate the maps in `cfg.score_maps`."""
    from wsolkit.build import build_datamodule, build_protocols
    from wsolkit.interop.score_maps import ScoreMaps
    from wsolkit.metrics.evaluation import Evaluation, outcome
    from wsolkit.reporting.images import ImageTables
    from wsolkit.reporting.pictures import choose_examples, write_report
    from wsolkit.reporting.summary import print_summary
    from wsolkit.reporting.table import write_results
    from wsolkit.system.libraries import quieten_libraries

    if cfg.checkpoint is not None or cfg.save_maps is not None:
        raise ConfigError("score_maps=… evaluates maps from files. It goes with neither checkpoint=… nor save_maps=…")
    check_config(cfg, Settings)
    quieten_libraries()
    protocols = build_protocols(cfg)
    maps = ScoreMaps(cfg.score_maps)
    maps.check(protocols)
    datamodule = build_datamodule(cfg)
    datamodule.read("val", "test")
    test = datamodule.dataset("test")
    # This names a missing image before the evaluation.
    examples = choose_examples(test, cfg.num_examples, cfg.examples)
    class_names = list(test.records.classes)
    evaluation = Evaluation(protocols, len(class_names))
    if datamodule.selects:
        evaluation.pseudo_boxes = datamodule.pseudo_boxes
        _count(evaluation, maps, datamodule, "val", cfg.trainer.enable_progress_bar)
        evaluation.select(outcome(evaluation.compute()).results)
        evaluation.reset()
        evaluation.pseudo_boxes = None
    tables = ImageTables(evaluation, test, cfg.num_table_images)
    _count(evaluation, maps, datamodule, "test", cfg.trainer.enable_progress_bar)
    result = outcome(evaluation.compute())

    save_config(cfg, folder)
    write_results(folder, result, class_names, tables.rows(result.results, class_names))
    heading, row = f"score maps of {cfg.score_maps}, {cfg.dataset.name}", "score maps"
    localize = _localize(evaluation, maps, test)
    write_report(folder, heading, row, class_names, plain(cfg), datamodule, evaluation, result, localize, examples)
    print_summary(folder, heading, row, evaluation.chosen_on(datamodule.held_out), result)
    return result.results


def _read(evaluation: Evaluation, maps: ScoreMaps, batch: EvaluationBatch, dataset: WSOLDataset) -> list[Tensor]:
    """Read the maps of a batch."""
    import torch

    names, sizes = map(dataset.records.name, batch["index"].tolist()), evaluation.map_sizes(batch)
    return [torch.from_numpy(maps.read(name, size)) for name, size in zip(names, sizes, strict=True)]


def _count(evaluation: Evaluation, maps: ScoreMaps, datamodule: WSOLDataModule, split: Split, shown: bool) -> None:
    """Update the metrics with the maps of a split."""
    from rich.progress import track

    loader = datamodule.val_dataloader() if split == "val" else datamodule.test_dataloader()
    for batch in track(loader, f"Evaluating {split}", disable=not shown):
        evaluation.update_maps(batch, _read(evaluation, maps, batch, datamodule.dataset(split)))


def _localize(evaluation: Evaluation, maps: ScoreMaps, dataset: WSOLDataset) -> Localize:
    """Return a function that gives the report its maps from files, without a predicted class."""
    first = next(iter(evaluation.protocols.values()))

    def localize(batch: EvaluationBatch) -> tuple[list[Tensor], list[int | None]]:
        return first.at_size(_read(evaluation, maps, batch, dataset), batch), [None] * len(batch["label"])

    return localize


def main() -> None:
    """Run the command."""
    run_command_on_checkpoint(
        "evaluate", evaluate, with_protocol=False, stopped="nothing is kept, and the same command starts anew"
    )


if __name__ == "__main__":
    main()
