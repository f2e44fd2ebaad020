"""Define what all methods share. A subclass defines how its network is trained and how it localizes.

A method knows neither its optimizer nor its metrics. `wsolkit.build_module` attaches them, so that Lightning's Trainer
can train and evaluate the module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from lightning import Callback, LightningModule
from torch import Tensor, nn

import wsolkit
from wsolkit.checkpoint import Checkpoint
from wsolkit.errors import ConfigError
from wsolkit.methods.parameters import weight_decay_groups
from wsolkit.types import Classes, Description, EvaluationBatch, Localization, TrainingBatch

_Kind = TypeVar("_Kind", bound=Callback)


class Network(nn.Module):
    """A method's network, which runs without Lightning.

    Attributes:
        passes: the names of its forward functions. `torch.compile` compiles them, and a profile counts them as the
            forward pass.
    """

    passes: ClassVar[tuple[str, ...]] = ("forward",)


class WSOLModule(LightningModule, ABC):
    """A localization method. Subclasses define `losses()` and `localize()`.

    Args:
        network: maps an image [B, 3, H, W] to logits [B, C], among others.
        no_weight_decay: names of parameters that are exempt from weight decay, besides the one-dimensional ones.

    Attributes:
        description: describes the model in checkpoints.
        optimization: makes the optimizer and its schedule, None until it is attached.
        augment: changes each training batch, see `conf/augment`. None leaves it as it is.
        watch_losses: a function that is called with the losses of each batch, None until it is attached.
        callbacks: the callbacks that Lightning runs with the module, for example the evaluation.
    """

    chosen_apart: ClassVar[Mapping[str, str]] = {}
    """The metrics that choose the best weights of parts, by the prefix of their names. The rest follows the monitor."""

    maps_are_probabilities: bool = False
    """Whether score maps are probabilities that a position shows the object.

    Their values then fall into two groups, between which a threshold can be chosen without boxes.
    """

    pairs: ClassVar[bool] = False
    """Whether the images 2k and 2k + 1 of a training batch must have the same class."""

    model_settings: ClassVar[Sequence[str]] = ()
    """The settings that name checkpoints whose models become parts of the module, and come in its argument `models`."""

    targets: Sequence[str] = ()
    """What training learns beside the labels: the settings of the data set that name it, such as "train_boxes"."""

    start_setting: ClassVar[str | None] = None
    """The setting that names a checkpoint of the same method, from whose weights training starts, see `start_from`."""

    def __init__(self, network: Network, no_weight_decay: Sequence[str] = ()) -> None:
        super().__init__()
        self.network: Network = network
        self.no_weight_decay = tuple(no_weight_decay)
        self.description = Description()
        self.optimization: Callable[[WSOLModule], Any] | None = None
        self.augment: Callable[[TrainingBatch], TrainingBatch] | None = None
        self.watch_losses: Callable[[Mapping[str, Tensor]], None] | None = None
        self.callbacks: list[Callback] = []

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Compute the logits [B, C] of a normalised image [B, 3, H, W]."""

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the terms of the loss as scalars by name. "loss" is their total, which training minimises.

        Names that do not begin with "loss" are quantities to watch.
        """

    @abstractmethod
    def localize(self, image: Tensor, classes: Classes = None) -> Localization:
        """Compute logits [B, C] and raw score maps [B, K, h, w] at the network's resolution, without gradients.

        Args:
            image: a normalised image [B, 3, H, W].
            classes: the classes of the maps: indices [B, K]; a function of the logits that returns them; None for the
                top class of each image; "all" for K = C, or K = 1 if all classes have the same map.
        """

    def inside(self, image: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return maps from inside the method by name, a series [B, n, h, w] each. Most methods have none.

        Args:
            image: a normalised image [B, 3, H, W].
            classes: the classes [B] of the maps, if these differ by class.
        """
        return {}

    def norms(self, image: Tensor) -> Tensor | None:
        """Return the norms of the feature vectors that are classified, scaled to [0, 1] over space, [B, h, w].

        The result is None if the method does not show them.

        Args:
            image: a normalised image [B, 3, H, W].
        """
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups for the optimizer, see `wsolkit.methods.parameters`."""
        return weight_decay_groups(self, self.no_weight_decay)

    def start_from(self, checkpoint: Checkpoint) -> None:
        """Take the weights that training starts from, as `start_setting` says.

        Raises:
            CheckpointError: they do not fit.
        """
        checkpoint.load_into(self)

    def attached(self, kind: type[_Kind]) -> _Kind:
        """Return the attached callback of a class."""
        return next(callback for callback in self.callbacks if isinstance(callback, kind))

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Compute the losses, and show them to who watches before anything can stop the run."""
        losses = self.losses(batch if self.augment is None else self.augment(batch))
        if self.watch_losses is not None:
            self.watch_losses(losses)
        return losses["loss"]

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Do nothing. The evaluation is a callback, because each protocol feeds the network in its own way."""

    test_step = validation_step

    def configure_callbacks(self) -> list[Callback]:
        """Give Lightning the attached callbacks."""
        return self.callbacks

    def configure_optimizers(self) -> Any:
        """Give Lightning the optimizer and its schedule.

        Raises:
            ConfigError: no optimizer was attached.
        """
        if self.optimization is None:
            raise ConfigError("the module has no optimizer: build it with wsolkit.build_module, or set `optimization`")
        return self.optimization(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the model to a checkpoint, as plain containers, in `checkpoint["wsolkit"]`."""
        said = self.description
        checkpoint["wsolkit"] = checkpoint.get("wsolkit", {}) | {
            "version": wsolkit.__version__,
            "config": said.config,
            "class_names": list(said.class_names),
            "mean": list(said.mean),
            "std": list(said.std),
            **({"parts": dict(said.parts)} if said.parts else {}),
        }
