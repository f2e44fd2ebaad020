"""What every method shares: the training loop's hooks, optimizer, evaluation, and what a checkpoint carries."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule
from torch import Tensor, distributed, nn

import wsolkit
from wsolkit.metrics.evaluation import Evaluation, outcome
from wsolkit.metrics.norms import NormHistogram
from wsolkit.optim import Schedule, build_optimizer, weight_decay_groups
from wsolkit.seeding import derive_seed
from wsolkit.types import Classes, EvaluationBatch, Localization, PlainConfig, TrainingBatch


@dataclass(frozen=True)
class Training:
    """How a module is trained and what its checkpoints say of it.

    optimizer: parameter groups → optimizer; seed: of the noise in each step (dropout, stochastic depth);
    config, class_names, and mean and std of the network's input: stored in checkpoints as plain containers.
    """

    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
    schedule: Schedule
    seed: int
    config: PlainConfig = field(default_factory=dict)
    class_names: Sequence[str] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()


class Network(nn.Module):
    """A method's network, which runs without Lightning.

    Attributes:
        passes: names of the functions in which it computes: what `torch.compile` compiles, and a profile counts as the
            forward pass.
    """

    passes: ClassVar[tuple[str, ...]] = ("forward",)


class WSOLModule(LightningModule, ABC):
    """A localization method in training: subclasses say `losses()` and `localize()`.

    Args:
        network: image [B, 3, H, W] → logits [B, C] among others.
        training: optimizer, schedule, seed, and what checkpoints carry.
        evaluation: metrics of validation and test.
        no_weight_decay: names of parameters exempt from weight decay besides the one-dimensional ones.
    """

    def __init__(
        self, network: Network, training: Training, evaluation: Evaluation, no_weight_decay: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.network: Network = network
        self.training_settings = training
        self.evaluation = evaluation
        self.norm_histogram = NormHistogram()
        self.no_weight_decay = tuple(no_weight_decay)
        self.results: dict[str, float] = {}
        """Numbers of the latest validation or test pass, by name."""
        self.curves: dict[str, list[Any]] = {}
        """Curves and tables of that pass, by name."""
        self.shown: dict[str, float] = {}
        """Losses as they were last logged, for the progress bar."""
        self._losses = _Losses()
        self._steps_before = 0

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [B, 3, H, W] → logits [B, C]."""

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Terms of the loss by name, scalars; "loss" is their total, which is minimised.

        Names that do not begin with "loss" are of what else there is to watch.
        """

    @abstractmethod
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Logits [B, C] and raw score maps [B, K, h, w] at the network's resolution, without gradients.

        Args:
            image: normalised, [B, 3, H, W].
            classes: whose maps: [B, K]; a function of the logits that returns them; None: each image's top class;
                "all": K = C, or 1 where all classes have the same map.
        """

    def inside(self, image: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Maps from within the method to look at, by name: a series [B, n, h, w] each; none unless a method has some.

        Args:
            image: normalised, [B, 3, H, W].
            classes: whose maps, where they differ by class: [B].
        """
        return {}

    def norms(self, image: Tensor) -> Tensor | None:
        """Lengths of the feature vectors that are classified, scaled to [0, 1] over space: [B, h, w]; None: not shown.

        Args:
            image: normalised, [B, 3, H, W].
        """
        return None

    def on_train_start(self) -> None:
        """Lightning's hook: the losses of the step that a resumed run goes on from are logged already."""
        self._steps_before = self.trainer.global_step

    def on_train_batch_start(self, batch: TrainingBatch, batch_idx: int) -> None:
        """Seed the step's noise by seed, step and rank, so that a resumed run draws what an unbroken one drew."""
        self._steps_before = self.trainer.global_step
        seed = derive_seed(self.training_settings.seed, self._steps_before, batch_idx, self.global_rank)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # the other takes a millisecond to note it for a GPU to come
        else:
            torch.manual_seed(seed)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Lightning's hook: compute the losses."""
        losses = self.losses(batch)
        self._losses.add(losses)
        return losses["loss"]

    def on_train_batch_end(self, outputs: Any, batch: TrainingBatch, batch_idx: int) -> None:
        """Lightning's hook."""
        self.log_losses()

    def log_losses(self) -> None:
        """Log the losses of every `log_every_n_steps`-th step, those of the last part of its batch, once.

        Not by `self.log`, which would wait for the device in every step, for the progress bar.
        """
        step = self.trainer.global_step
        if step == self._steps_before or step % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        self._steps_before = step
        self.shown = self._losses.latest()
        row = {f"{logged_name(name)}_step": value for name, value in self.shown.items()}
        for logger in self.loggers:
            logger.log_metrics({"epoch": float(self.current_epoch)} | row, step=step - 1)

    def on_train_epoch_end(self) -> None:
        """Lightning's hook: log the mean of each loss over the epoch."""
        sums = self._losses.sums(self.device)
        means = {f"{logged_name(name)}_epoch": total / count for name, (total, count) in sums.items()}
        self._losses = _Losses()
        self.log_dict(means, logger=False)
        for logger in self.loggers:  # now: Lightning would do it after the checkpoint is written
            row = {"epoch": float(self.current_epoch)} | {name: mean.item() for name, mean in means.items()}
            logger.log_metrics(row, step=self.global_step - 1)

    def on_validation_start(self) -> None:
        """Lightning's hook: all processes evaluate one network, with the BatchNorm statistics of the first."""
        if distributed.is_available() and distributed.is_initialized():
            for buffer in self.network.buffers():
                distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Lightning's hook: localize and count."""
        self.evaluation.update(batch, self.localize, self)

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Lightning's hook: localize and count; and the norms of features, if the method shows them."""
        self.validation_step(batch, batch_idx)
        norms = self.norms(batch["image"])
        if norms is not None:
            self.norm_histogram.update(norms, batch)

    def on_validation_epoch_end(self) -> None:
        """Lightning's hook: log the metrics as `val/…`, and select the thresholds that were best."""
        self.evaluation.thresholds = {}
        self._log_evaluation("val")
        self.evaluation.select(self.results)

    def on_test_epoch_end(self) -> None:
        """Lightning's hook: log the metrics as `test/…`, at the thresholds selected in validation, if any."""
        self._log_evaluation("test")
        self.curves |= outcome(self.norm_histogram.compute()).curves
        self.norm_histogram.reset()

    def _log_evaluation(self, stage: str) -> None:
        computed = self.evaluation.compute()  # summed over all processes: nothing is left to synchronise
        self.evaluation.reset()
        self.results, self.curves = outcome(computed)
        self.log_dict({f"{stage}/{name}": value for name, value in self.results.items()})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer: see `wsolkit.optim`."""
        return weight_decay_groups(self, self.no_weight_decay)

    def configure_optimizers(self) -> Any:
        """Lightning's hook: one optimizer over the groups of parameters, one schedule stepping with it."""
        settings, trainer = self.training_settings, self.trainer

        def factor(step: int) -> float:
            # Not `trainer.estimated_stepping_batches`: that starts to load data, before a resumed run knows its epoch.
            steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) if step else 1
            return settings.schedule(step / steps, trainer.max_epochs or 1)

        optimizer = build_optimizer(settings.optimizer, self.parameter_groups())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: add what a user of the checkpoint needs, as plain containers."""
        checkpoint["wsolkit"] = {
            "version": wsolkit.__version__,
            "config": self.training_settings.config,
            "class_names": list(self.training_settings.class_names),
            "mean": list(self.training_settings.mean),
            "std": list(self.training_settings.std),
            "metrics": self.results,
            "thresholds": self.evaluation.thresholds,
            "losses": self._losses.sums(self.device),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: take over the thresholds that were selected, and the losses of an epoch's first steps."""
        self.evaluation.thresholds = checkpoint["wsolkit"]["thresholds"]
        sums: dict[str, Tensor] = checkpoint["wsolkit"]["losses"]  # over all processes; here it is one's own
        self._losses = _Losses(sums if self.global_rank == 0 else {name: torch.zeros(2) for name in sums})


class _Losses:
    """Sums of the losses of an epoch, which stay on the device: Lightning's own are no part of its checkpoints.

    Args:
        sums: of the epoch's first steps, as from `sums`.
    """

    def __init__(self, sums: Mapping[str, Tensor] | None = None) -> None:
        sums = sums or {}
        self._names = tuple(sums)
        self._sum = torch.tensor([float(total) for total, _ in sums.values()])
        self._count = max((int(count) for _, count in sums.values()), default=0)
        self._latest = self._sum

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add a batch's, scalars."""
        self._latest = torch.stack([value.detach().float() for value in losses.values()])
        if tuple(losses) == self._names:
            self._sum = self._latest + self._sum.to(self._latest.device)
            self._count += 1
        else:  # the first of an epoch, or of a run that goes on with other terms
            self._names, self._sum, self._count = tuple(losses), self._latest, 1

    def latest(self) -> dict[str, float]:
        """The last batch's; waits for the device."""
        return dict(zip(self._names, self._latest.tolist(), strict=True))

    def sums(self, device: torch.device) -> dict[str, Tensor]:
        """Sum and number of each loss's values in this epoch, over all processes, who talk through a device: [2]."""
        sums = torch.stack([self._sum, torch.full_like(self._sum, self._count)], dim=1).to(device)  # [losses, 2]
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        return dict(zip(self._names, sums.unbind(), strict=True))


def logged_name(term: str) -> str:
    """Where a value of `losses` is logged: terms of the loss as `train/…`, what else a method shows as `method/…`."""
    return f"{'train' if term.startswith('loss') else 'method'}/{term}"


def choose_classes(classes: Classes, logits: Tensor) -> Tensor | None:
    """Resolve the `classes` argument of `localize` to indices [B, K]; None: of all classes."""
    if classes == "all":
        return None
    if classes is None:
        return logits.argmax(dim=1, keepdim=True)
    return classes(logits) if callable(classes) else classes


def select_maps(maps: Tensor, classes: Tensor | None) -> Tensor:
    """Pick the maps of chosen classes: [B, C, h, w] and [B, K] → [B, K, h, w]; None: all of them."""
    if classes is None:
        return maps
    return maps.gather(1, classes[:, :, None, None].expand(-1, -1, *maps.shape[-2:]))


def semantic_head(embed_dim: int, num_classes: int, init: Literal["default", "he"]) -> nn.Conv2d:
    """The transformer methods' classifier: patch tokens [B, D, H, W] → semantic maps [B, C, H, W].

    Args:
        init: "default": PyTorch's own for convolutions (released code); "he": He et al., as SCM's paper says.
    """
    head = nn.Conv2d(embed_dim, num_classes, kernel_size=3, padding=1)
    if init == "he":
        nn.init.kaiming_normal_(head.weight, mode="fan_out", nonlinearity="relu")
        assert head.bias is not None
        nn.init.zeros_(head.bias)
    return head
