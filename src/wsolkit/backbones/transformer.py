"""What methods ask of a backbone with transformer blocks, whatever else the backbone consists of.

A method says in which blocks it reads a token's row of attention scores, and which token it adds to the sequence. The
backbone runs all of its blocks, and returns the tokens and the rows. A method therefore works on any such backbone: on
a plain vision transformer, or on a Conformer, whose tokens exchange features with a convolutional branch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wsolkit.errors import ConfigError

Gate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(row, q, k, v) → (q, k, v): how a method changes attention once it knows a token's row of scores."""


class Read(NamedTuple):
    """What a method reads in a block: the row of scores of a token, by its index. -1 is the last one.

    gate: changes q, k and v after the row is known, or None.
    """

    token: int
    gate: Gate | None = None


class Features(NamedTuple):
    """What a backbone makes of a batch of images.

    tokens: [B, ≥ 1 + N, D] after the last block and before the final LayerNorm: class token, patches, added token.
    rows: for each block that was read, in order, the scores [B, h, ≥ 1 + N] before softmax, float32.
    branch: the pooled feature [B, E] of a second branch that takes part in classification, or None.
    """

    tokens: Tensor
    rows: list[Tensor]
    branch: Tensor | None


class Transformer(nn.Module, ABC):
    """A backbone with transformer blocks, without its classifier.

    Attributes:
        embed_dim: the width D of the tokens.
        patch_size: the side of a patch in pixels.
        num_prefix_tokens: the number of tokens before the patches, of which the class token is the first.
        classifier_bias: the bias [classes] of the tokens' classifier in the weights, or None.
    """

    embed_dim: int
    patch_size: int
    num_prefix_tokens: int
    classifier_bias: Tensor | None

    @property
    @abstractmethod
    def depth(self) -> int:
        """Return the number of transformer blocks."""

    @property
    @abstractmethod
    def class_token(self) -> nn.Parameter:
        """Return the class token [1, 1, D]."""

    @abstractmethod
    def features(self, image: Tensor, reads: Mapping[int, Read], extra: Tensor | None = None) -> Features:
        """Run all blocks on an image [B, 3, H, W].

        Args:
            image: a batch of normalised images.
            reads: what to read, by the index of the block.
            extra: a token [1, 1, D] to add at the end of the sequence, or None.

        Raises:
            ConfigError: the patch size does not divide the image.
        """

    @abstractmethod
    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final LayerNorm."""

    def branch_classifier(self, num_classes: int) -> nn.Linear | None:
        """Make the classifier of `Features.branch`, or return None if the backbone has no second branch."""
        return None

    def check_size(self, image: Tensor) -> None:
        """Check that the patch size divides the sides of an image [B, 3, H, W].

        Raises:
            ConfigError: it does not.
        """
        height, width = image.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"images of {width}×{height} pixels do not divide into patches of {self.patch_size}: "
                f"use multiples of {self.patch_size}"
            )

    def patches(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Take the patch tokens out of [B, ≥ 1 + N, D], in the layout of the image: [B, D, H/p, W/p]."""
        return self.grid(tokens, image).permute(0, 3, 1, 2)

    def grid(self, row: Tensor, image: Tensor) -> Tensor:
        """Take the patch entries out of [B, ≥ 1 + N, …], in the layout of the image: [B, H/p, W/p, …]."""
        height, width = (side // self.patch_size for side in image.shape[-2:])
        # Always shape[0] and not len(), which would fix the batch size of exported programs.
        patches = row[:, self.num_prefix_tokens : self.num_prefix_tokens + height * width]
        return patches.reshape(row.shape[0], height, width, *row.shape[2:])  # [B, N, …] → [B, H, W, …]


def append_token(tokens: Tensor, extra: Tensor | None) -> Tensor:
    """Add a token [1, 1, D] at the end of each sequence of [B, N, D]. None adds nothing."""
    if extra is None:
        return tokens
    return torch.cat([tokens, extra.expand(tokens.shape[0], -1, -1).to(tokens.dtype)], dim=1)
