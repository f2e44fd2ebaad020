"""What every method shares: a subclass says how its network is trained and how it localizes.

A method knows neither optimizer nor metrics. `wsolkit.build_module` attaches them, so that Lightning's Trainer can
train and evaluate the module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from lightning import Callback, LightningModule
from torch import Tensor, nn

import wsolkit
from wsolkit.errors import ConfigError
from wsolkit.methods.parameters import weight_decay_groups
from wsolkit.types import Classes, EvaluationBatch, Localization, PlainConfig, TrainingBatch

_Kind = TypeVar("_Kind", bound=Callback)


class Network(nn.Module):
    """A method's network, which runs without Lightning.

    Attributes:
        passes: names of the functions in which it computes. `torch.compile` compiles them, and a profile counts them as
            the forward pass.
    """

    passes: ClassVar[tuple[str, ...]] = ("forward",)


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of its model: settings, class names by label, mean and std of the network's input."""

    config: PlainConfig = field(default_factory=dict)
    class_names: Sequence[str] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()


class WSOLModule(LightningModule, ABC):
    """A localization method: subclasses say `losses()` and `localize()`.

    Args:
        network: image [B, 3, H, W] → logits [B, C] among others.
        no_weight_decay: names of parameters exempt from weight decay besides the one-dimensional ones.

    Attributes:
        description: what checkpoints say of the model.
        optimization: makes the optimizer and its schedule; None until it is attached.
        callbacks: what Lightning runs beside the module, such as the evaluation.
    """

    def __init__(self, network: Network, no_weight_decay: Sequence[str] = ()) -> None:
        super().__init__()
        self.network: Network = network
        self.no_weight_decay = tuple(no_weight_decay)
        self.description = Description()
        self.optimization: Callable[[WSOLModule], Any] | None = None
        self.callbacks: list[Callback] = []

    @abstractmethod
    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [B, 3, H, W] → logits [B, C]."""

    @abstractmethod
    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Terms of the loss by name, scalars; "loss" is their total, which is minimised.

        A name that does not begin with "loss" is of a quantity to watch.
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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer: see `wsolkit.methods.parameters`."""
        return weight_decay_groups(self, self.no_weight_decay)

    def attached(self, kind: type[_Kind]) -> _Kind:
        """The callback of a class that was attached to the module."""
        return next(callback for callback in self.callbacks if isinstance(callback, kind))

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> dict[str, Any]:
        """Compute the total loss, and pass its terms on to the callbacks."""
        losses = self.losses(batch)
        return {"loss": losses["loss"], "terms": {name: value.detach() for name, value in losses.items()}}

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Compute nothing: the evaluation is a callback, since each protocol feeds the network in its own way."""

    test_step = validation_step

    def configure_callbacks(self) -> list[Callback]:
        """Give Lightning what was attached."""
        return self.callbacks

    def configure_optimizers(self) -> Any:
        """Give Lightning the optimizer and its schedule.

        Raises:
            ConfigError: none was attached.
        """
        if self.optimization is None:
            raise ConfigError("the module has no optimizer: build it with wsolkit.build_module, or set `optimization`")
        return self.optimization(self)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the model, as plain containers, to what callbacks say in `checkpoint["wsolkit"]`."""
        said = self.description
        checkpoint["wsolkit"] = checkpoint.get("wsolkit", {}) | {
            "version": wsolkit.__version__,
            "config": said.config,
            "class_names": list(said.class_names),
            "mean": list(said.mean),
            "std": list(said.std),
        }
