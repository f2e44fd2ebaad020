"""Frozen vision transformers, of which methods take the patch tokens.

timm gives the tokens after chosen blocks (`forward_intermediates`) for plain ViTs, DeiT, DINOv2 with and without
registers, DINOv3, EVA-02 and the image towers of CLIP and SigLIP. The number of prefix tokens (class token, registers),
the patch size and the native input size are timm's. The network keeps its native grid of position embeddings, and
interpolates it once to the size of the images. A network that was built for 224 pixels would shrink DINOv2's grid of
37×37 to 16×16, and enlarge this again for 448 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
import torch
from timm.models import eva, vision_transformer
from torch import Tensor, nn
from typing_extensions import Self

from wsolkit.backbones.pretrained import create, load
from wsolkit.backbones.weights import load_weights
from wsolkit.errors import ConfigError
from wsolkit.types import Tokens


class TokenBackbone(nn.Module):
    """A frozen timm vision transformer without its classifier. It stays in evaluation mode, and has no gradients.

    Args:
        model: timm's name, for example "vit_small_patch14_dinov2.lvd142m".
        pretrained: whether to take weights from timm's hub, unless `weights` is given.
        weights: a file of weights (safetensors or a state dict, in timm's names).
        blocks: the blocks after which patch tokens are taken, counted from the end: -1 is the last one. "last_quarter"
            is the first block of the last quarter, see `last_quarter`.
        norm: whether the final LayerNorm acts on the tokens. TriLite takes them before it.
        cache: where a run keeps the tokens of all images, so that it computes them once: "memory", or a folder that
            runs and processes share. None computes them in each epoch, with augmentation. See `wsolkit.data.tokens`.
        cache_flip: whether a cache also keeps the tokens of mirrored training images.
        options: further arguments of timm's model, for example depth, embed_dim, num_heads, patch_size.

    Raises:
        ConfigError: timm has no such model, the model has no patch tokens, or it has fewer blocks.
        CheckpointError: `weights` does not fit the model.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool,
        weights: str | None,
        blocks: Sequence[int] | Literal["last_quarter"],
        norm: bool,
        cache: str | None,
        cache_flip: bool,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.cache, self.cache_flip = cache, cache_flip
        network = _create(model, pretrained and weights is None, options)
        if weights is not None:
            source = eva if isinstance(network, eva.Eva) else vision_transformer
            given = {name: value for name, value in load_weights(weights).items() if not name.startswith("head")}
            load(network, source.checkpoint_filter_fn(given, network), classifier="head", source=weights)
        self.network = network.requires_grad_(False).eval()
        self.depth = len(network.blocks)
        self.patch_size = int(network.patch_embed.patch_size[0])
        self.embed_dim = int(network.embed_dim)
        self.pooled_dim = int(network.head_hidden_size)
        self.norm = norm
        self.has_class_token = getattr(network, "cls_token", None) is not None
        if blocks == "last_quarter":
            blocks = last_quarter(self.depth)
        wrong = [block for block in blocks if not -self.depth <= block <= -1]
        if wrong or not blocks or len(set(blocks)) < len(blocks):
            raise ConfigError(
                f"backbone.blocks={list(blocks)}: expected different numbers from -1 (the last block) to -{self.depth} "
                f"(the first one of '{model}')"
            )
        self.blocks = tuple(blocks)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, so that a frozen network has neither dropout nor stochastic depth."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tokens:
        """Compute the tokens of images [B, 3, H, W].

        `pooled` is the class token after the last block, with the final LayerNorm if `norm` is set. Without a class
        token, it is what timm's classifier would take.

        Raises:
            ConfigError: the patch size does not divide the images.
        """
        self.check_size(*image.shape[-2:])
        wanted = sorted({self.depth + block for block in self.blocks} | {self.depth - 1})
        final, found = self.network.forward_intermediates(
            image, indices=wanted, return_prefix_tokens=self.has_class_token, norm=self.norm
        )
        by_block = dict(zip(wanted, found, strict=True))
        if self.has_class_token:
            pooled = by_block[self.depth - 1][1][:, 0]
            by_block = {block: patches for block, (patches, _) in by_block.items()}
        else:
            pooled = self.network.forward_head(final, pre_logits=True)
        patches = torch.stack([by_block[self.depth + block] for block in self.blocks], dim=1)
        return Tokens(_rounded(pooled), _rounded(patches))

    def check_size(self, height: int, width: int) -> None:
        """Check that the patch size divides the sides of images.

        Raises:
            ConfigError: it does not.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"images of {width}×{height} pixels do not divide into patches of {self.patch_size}: "
                f"use multiples of {self.patch_size}"
            )


def last_quarter(depth: int) -> list[int]:
    """Return the first block of the last quarter of a network, counted from the end, in a list.

    >>> from wsolkit.backbones.tokens import last_quarter
    >>> last_quarter(12), last_quarter(24), last_quarter(2)
    ([-3], [-6], [-1])
    """
    return [-max(depth // 4, 1)]


def _rounded(values: Tensor) -> Tensor:
    """Round to half precision, as a cache keeps tokens, so that a run gives the same numbers with and without one."""
    largest = torch.finfo(torch.float16).max
    return values.float().clamp(-largest, largest).half().float()


def _create(model: str, pretrained: bool, options: Mapping[str, Any]) -> Any:
    """Create a timm model that accepts images of any size.

    Raises:
        ConfigError: it has no patch tokens, or is for one size of images only.
    """
    if timm.is_model(model):
        made = timm.model_entrypoint(model)
        family = made.__module__
        if family not in (vision_transformer.__name__, eva.__name__, "timm.models.deit"):
            raise ConfigError(
                f"'{model}' gives no patch tokens for images of any size: choose a ViT, DeiT, DINOv2, DINOv3, EVA-02, "
                "CLIP or SigLIP model of timm, for example vit_small_patch14_dinov2.lvd142m"
            )
    network: Any = create(model, pretrained, {"num_classes": 0, "dynamic_img_size": True, **options})
    sides = network.patch_embed.patch_size
    if sides[0] != sides[1]:
        raise ConfigError(f"'{model}' gives no square patch tokens: choose another model")
    return network
