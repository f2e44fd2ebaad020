"""Give a network an evaluation batch, at one size or several, by the rules of a protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from wsolkit.localization.maps import central_crop, min_max, ten_crops
from wsolkit.types import Classes, EvaluationBatch, Localization, View

if TYPE_CHECKING:
    from wsolkit.localization.protocol import Input


def network_input(batch: EvaluationBatch, way: Input) -> Tensor:
    """Return the images [B, 3, S, S] of a batch that the network sees, at the size that it is trained at."""
    image: Tensor = batch["image"]
    return image if way == "resize" else central_crop(_uncropped(batch), image.shape[-1])


def network_mask(batch: EvaluationBatch, way: Input) -> Tensor | None:
    """Return the masks [B, S, S] of what `network_input` shows, or None."""
    mask = batch["uncropped_mask"]
    if way == "resize" or mask is None:
        return batch["mask"] if way == "resize" else None
    return central_crop(mask, batch["image"].shape[-1])


def images_to(batch: EvaluationBatch, like: Tensor) -> EvaluationBatch:
    """Return a batch with its images, or their tokens, on the device and in the type of a tensor."""
    images = {key: batch.get(key) for key in ("image", "uncropped", "views", "uncropped_views")}
    return {**batch, **apply_to_collection(images, Tensor, lambda tensor: tensor.to(like))}


def network_views(batch: EvaluationBatch, way: Input) -> list[View]:
    """Return a batch at each size of the evaluation, mirrored or not, as the network sees it."""
    views = batch.get("views")
    if not views:
        return [View(network_input(batch, way), False)]
    if way == "resize":
        return views
    kept = batch["image"].shape[-1] / _uncropped(batch).shape[-1]
    return [
        View(central_crop(whole.image, round(whole.image.shape[-1] * kept)), whole.mirrored)
        for whole in batch["uncropped_views"]
    ]


def localize_views(
    views: Sequence[View], localize: Callable[[Any, Classes], Localization], classes: Classes
) -> Localization:
    """Localize in one view of a batch, or average over several.

    The logits are those of the first size, and means over it and its mirror image, since networks classify best at the
    size that they were trained at. The maps are resized to the finest grid, bilinearly, turned back where the view
    is mirrored, scaled to [0, 1] in each view so that all views count equally, and averaged.

    Args:
        views: see `network_views`.
        localize: see `WSOLModule.localize`.
        classes: as for `localize`. A function of the logits gets those of the first size.
    """
    if len(views) == 1 and not views[0].mirrored:
        return localize(views[0].image, classes)
    # Which classes are meant may depend on the logits, so the maps of all classes are kept until these are known.
    asked: Classes = classes if isinstance(classes, Tensor) else "all"
    found = [localize(view.image, asked) for view in views]
    first = [each.logits for each in found if each.maps.shape[-2:] == found[0].maps.shape[-2:]]
    logits = torch.stack(first).mean(dim=0)
    grid = max((each.maps.shape[-2:] for each in found), key=lambda shape: shape[0] * shape[1])
    mean = torch.zeros((), device=logits.device)
    for view, each in zip(views, found, strict=True):
        maps = F.interpolate(each.maps.float(), size=grid, mode="bilinear", align_corners=False)
        mean = mean + min_max(maps.flip(-1) if view.mirrored else maps) / len(views)
    if isinstance(classes, Tensor) or classes == "all":
        return Localization(logits, mean)
    chosen = logits.argmax(dim=1, keepdim=True) if classes is None else classes(logits)
    agnostic = mean.shape[1] == 1 and logits.shape[1] > 1
    index = torch.zeros_like(chosen) if agnostic else chosen
    return Localization(logits, mean.gather(1, index[:, :, None, None].expand(-1, -1, *grid)))


def ten_crop_probabilities(batch: EvaluationBatch, classify: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean of the softmax over four corners, the centre, and their mirror images, [B, C].

    It is NaN for an image with logits that are not finite.
    """
    crops = ten_crops(_uncropped(batch), batch["image"].shape[-1])
    logits = torch.stack([classify(crop).float() for crop in crops])  # [10, B, C]
    finite = logits.isfinite().all(dim=0).all(dim=1, keepdim=True)
    return logits.softmax(dim=2).mean(dim=0).masked_fill(~finite, torch.nan)


def _uncropped(batch: EvaluationBatch) -> Tensor:
    uncropped = batch["uncropped"]
    if uncropped is None:
        raise ValueError(
            "a protocol crops its input, but the batch has no 'uncropped' images, which WSOLDataModule makes"
        )
    return uncropped
