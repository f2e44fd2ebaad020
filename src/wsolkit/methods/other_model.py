"""What methods share that contain the model of another checkpoint, which they do not train."""

from __future__ import annotations

import torch
from torch import Tensor

from wsolkit.errors import ConfigError
from wsolkit.methods.base import WSOLModule
from wsolkit.types import Description


def check_classes(setting: str, model: WSOLModule | None, num_classes: int) -> None:
    """Check that a contained model knows as many classes as the data set has.

    Args:
        setting: the setting of the method that names the model's checkpoint.
        model: the model, or None if there is none.
        num_classes: the number of classes of the data set.

    Raises:
        ConfigError: it knows another number.
    """
    known = num_classes if model is None else len(model.description.class_names)
    if known != num_classes:
        raise ConfigError(
            f"method.{setting} knows {known} classes, and the data set has {num_classes}: train it on the same data set"
        )


def normalised_for(other: Description, image: Tensor, own: Description) -> Tensor:
    """Normalise images [B, 3, H, W], which are normalised for one model, for another model.

    Args:
        other: the description of the model that will see them.
        image: the images.
        own: the description of the model that they are normalised for.
    """
    if (tuple(own.mean), tuple(own.std)) == (tuple(other.mean), tuple(other.std)):
        return image
    mean, std, its_mean, its_std = (
        torch.tensor(values, dtype=image.dtype).to(image.device, non_blocking=True)[:, None, None]
        for values in (own.mean, own.std, other.mean, other.std)
    )
    return (image * std + mean - its_mean) / its_std


def logits_of(other: WSOLModule, image: Tensor, own: Description) -> Tensor:
    """Compute another model's logits [B, C], float32, of images [B, 3, H, W] that are normalised for one's own."""
    return other(normalised_for(other.description, image, own)).float()  # type: ignore[no-any-return]
