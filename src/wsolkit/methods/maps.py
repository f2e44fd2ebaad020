"""Choose the score maps of classes, and make them from tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from wsolkit.types import Classes


def choose_classes(classes: Classes, logits: Tensor) -> Tensor | None:
    """Turn the `classes` argument of `localize` into indices [B, K]. None stands for all classes."""
    if classes == "all":
        return None
    if classes is None:
        return logits.argmax(dim=1, keepdim=True)
    return classes(logits) if callable(classes) else classes


def select_maps(maps: Tensor, classes: Tensor | None) -> Tensor:
    """Pick the maps [B, K, h, w] of classes [B, K] from maps [B, C, h, w]. None picks all of them."""
    if classes is None:
        return maps
    return maps.gather(1, classes[:, :, None, None].expand(-1, -1, *maps.shape[-2:]))


def class_logits(semantic: Tensor, classifier: nn.Linear | None, branch: Tensor | None) -> Tensor:
    """Add the logits of a backbone's second branch to the spatial mean of semantic maps: logits [B, C], float32.

    Args:
        semantic: semantic maps [B, C, h, w].
        classifier: the classifier of the second branch, or None if the backbone has none.
        branch: the pooled feature [B, E] of that branch, or None.
    """
    logits = semantic.float().mean(dim=(2, 3))
    return logits if classifier is None or branch is None else logits + classifier(branch).float()


def semantic_head(embed_dim: int, num_classes: int, init: Literal["default", "he"]) -> nn.Conv2d:
    """Make the transformer methods' classifier, which maps patch tokens [B, D, H, W] to semantic maps [B, C, H, W].

    Args:
        embed_dim: D.
        num_classes: C.
        init: "default" is PyTorch's own for convolutions (released code). "he" is He et al., as SCM's paper says.
    """
    head = nn.Conv2d(embed_dim, num_classes, kernel_size=3, padding=1)
    if init == "he":
        nn.init.kaiming_normal_(head.weight, mode="fan_out", nonlinearity="relu")
        assert head.bias is not None
        nn.init.zeros_(head.bias)
    return head
