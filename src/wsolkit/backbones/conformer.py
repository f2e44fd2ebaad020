"""Conformer: a convolutional branch and a transformer branch that exchange features (Peng et al., ICCV 2021).

Each block computes, with conv map F and tokens T (class token, then patches):

    F, G ← ConvBlock(F)                                   G is the map inside, after the 3×3 convolution
    T ← TransformerBlock(T + [T_class, down(G)])          down: pooling, 1×1 convolution, LayerNorm, GELU
    F ← ConvBlock(F, up(T_patches))                       up: 1×1 convolution, BatchNorm, ReLU, nearest enlargement

The class token takes part in the sum with itself, and so enters a block doubled. A token that a method adds does the
same. There are no position embeddings. The first block has neither `down` nor `up`, and makes the patch tokens from the
stem's map. Stages begin where the conv map becomes half as large, after a third and two thirds of the blocks. The last
block halves it once more, and its spatial mean is the feature of the convolutional branch.

timm has no Conformer. The layout is that of the released code, whose weights load with their names unchanged.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from wsolkit.backbones.pretrained import load
from wsolkit.backbones.transformer import Features, Read, Transformer, append_token
from wsolkit.backbones.vit import read_block
from wsolkit.backbones.weights import StateDict, download_weights, load_weights
from wsolkit.errors import CheckpointError, ConfigError

_STEM = 64  # The stem has this many channels in every published Conformer.
_EXPANSION = 4
_EPSILON = 1e-6  # Of all norms but the stem's BatchNorm and the final LayerNorm, which have PyTorch's default of 1e-5.


class ConvBlock(nn.Module):
    """A residual bottleneck of 1×1, 3×3 and 1×1 convolutions.

    Args:
        inputs, outputs: the numbers of channels.
        stride: the stride of the 3×3 convolution.
        residual: whether the shortcut has a 1×1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, residual: bool) -> None:
        super().__init__()
        inner = outputs // _EXPANSION
        self.conv1 = nn.Conv2d(inputs, inner, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner, eps=_EPSILON)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner, eps=_EPSILON)
        self.conv3 = nn.Conv2d(inner, outputs, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs, eps=_EPSILON)
        self.residual = residual
        if residual:
            self.residual_conv = nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)
            self.residual_bn = nn.BatchNorm2d(outputs, eps=_EPSILON)

    def forward(self, x: Tensor, fused: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the output [B, outputs, h, w] and the map inside [B, outputs / 4, h, w] from a map [B, inputs, H, W].

        `fused` [B, outputs / 4, H, W] is added to the input of the 3×3 convolution.
        """
        inside = F.relu(self.bn1(self.conv1(x)))
        inside = F.relu(self.bn2(self.conv2(inside if fused is None else inside + fused)))
        shortcut = self.residual_bn(self.residual_conv(x)) if self.residual else x
        return F.relu(self.bn3(self.conv3(inside)) + shortcut), inside


class Squeeze(nn.Module):
    """`down`: turns a conv map into patch tokens.

    Args:
        channels: of the map.
        embed_dim: D.
        stride: the positions of the map that fall on the side of one patch.
    """

    def __init__(self, channels: int, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.conv_project = nn.Conv2d(channels, embed_dim, kernel_size=1)
        self.ln = nn.LayerNorm(embed_dim, eps=_EPSILON)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Compute patch tokens [B, N, D] from a map [B, C, H, W]."""
        # The published order is convolution, then pooling. Both are linear, and this order is cheaper.
        x = self.conv_project(F.avg_pool2d(x, self.stride) if self.stride > 1 else x)
        return F.gelu(self.ln(x.flatten(2).mT))  # [B, D, h, w] → [B, N, D]


class Expand(nn.Module):
    """`up`: turns patch tokens into a conv map. See `Squeeze` for the arguments."""

    def __init__(self, channels: int, embed_dim: int, stride: int) -> None:
        super().__init__()
        self.conv_project = nn.Conv2d(embed_dim, channels, kernel_size=1)
        self.bn = nn.BatchNorm2d(channels, eps=_EPSILON)
        self.stride = stride

    def forward(self, patches: Tensor) -> Tensor:
        """Compute a map [B, C, s·h, s·w] from patch tokens [B, D, h, w]."""
        x = F.relu(self.bn(self.conv_project(patches)))
        height, width = patches.shape[-2:]
        return F.interpolate(x, size=(self.stride * height, self.stride * width), mode="nearest")


class CoupledBlock(nn.Module):
    """One block of both branches, with the exchange between them.

    Args:
        inputs, outputs: the numbers of channels of the conv branch.
        downsample: whether the conv map becomes half as large here.
        last: whether the second half of the block makes it half as large once more.
        stride: the positions of the conv map that fall on the side of one patch.
        embed_dim, num_heads, mlp_ratio, drop_path: of the transformer block.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        downsample: bool,
        last: bool,
        stride: int,
        embed_dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.cnn_block = ConvBlock(inputs, outputs, 2 if downsample else 1, residual=downsample)
        self.fusion_block = ConvBlock(outputs, outputs, 2 if last else 1, residual=last)
        self.squeeze_block = Squeeze(outputs // _EXPANSION, embed_dim, stride)
        self.expand_block = Expand(outputs // _EXPANSION, embed_dim, stride)
        self.trans_block = _transformer_block(embed_dim, num_heads, mlp_ratio, drop_path)

    def forward(self, conv_map: Tensor, tokens: Tensor, read: Read | None, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compute the next conv map and tokens [B, ≥ 1 + N, D]. If the block is read, append its row to `rows`."""
        conv_map, inside = self.cnn_block(conv_map)
        patches = self.squeeze_block(inside)
        end = 1 + patches.shape[1]
        coming = torch.cat([tokens[:, :1], patches.to(tokens.dtype), tokens[:, end:]], dim=1)
        tokens = read_block(self.trans_block, coming + tokens, read, rows)
        stride = self.squeeze_block.stride
        height, width = inside.shape[-2] // stride, inside.shape[-1] // stride
        laid_out = tokens[:, 1:end].mT.reshape(tokens.shape[0], -1, height, width)  # [B, N, D] → [B, D, h, w]
        conv_map, _ = self.fusion_block(conv_map, self.expand_block(laid_out))
        return conv_map, tokens


class Conformer(Transformer):
    """A Conformer without its classifiers.

    Args:
        embed_dim: the width D of the tokens.
        depth: the number of blocks, a multiple of 3.
        num_heads: the number of attention heads.
        mlp_ratio: the width of the MLPs, in multiples of D.
        channels: the number of channels of the conv branch in its first third. It doubles twice.
        patch_size: the side of a patch in pixels, a multiple of 16.
        drop_path_rate: stochastic depth at the last transformer block. It grows linearly from 0 at the first. The conv
            branch has none.
        pretrained: whether to download the weights at `url`, unless `weights` is given.
        url: the address of the weights, or None if there are none for these sizes.
        weights: a file of weights, with the names of the Conformer's own code or of mmpretrain's.

    Raises:
        ConfigError: sizes do not fit each other, or there is nothing to download.
        CheckpointError: the weights cannot be downloaded, or do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        channels: int,
        patch_size: int,
        drop_path_rate: float,
        pretrained: bool,
        url: str | None,
        weights: str | None,
    ) -> None:
        super().__init__()
        _check_sizes(embed_dim, depth, num_heads, channels, patch_size)
        self.embed_dim, self.patch_size, self.num_prefix_tokens = embed_dim, patch_size, 1
        self.num_blocks = depth
        drop_paths = [drop_path_rate * index / (depth - 1) for index in range(depth)]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.conv1 = nn.Conv2d(3, _STEM, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_STEM)
        self.conv_1 = ConvBlock(_STEM, channels, stride=1, residual=True)
        self.trans_patch_conv = nn.Conv2d(_STEM, embed_dim, kernel_size=patch_size // 4, stride=patch_size // 4)
        self.trans_1 = _transformer_block(embed_dim, num_heads, mlp_ratio, drop_paths[0])
        inputs = channels
        for number in range(2, depth + 1):
            stage = (number - 1) * 3 // depth
            outputs = channels * 2**stage
            block = CoupledBlock(
                inputs,
                outputs,
                downsample=outputs != inputs,
                last=number == depth,
                stride=patch_size // 4 // 2**stage,
                embed_dim=embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=drop_paths[number - 1],
            )
            self.add_module(f"conv_trans_{number}", block)
            inputs = outputs
        self.trans_norm = nn.LayerNorm(embed_dim)
        self.branch_dim = inputs
        self.apply(_initialize)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.classifier_bias: Tensor | None = None
        self._branch_classifier: Mapping[str, Tensor] = {}
        if weights is None and pretrained:
            if url is None:
                raise ConfigError(
                    "backbone.pretrained=true: nobody published weights for this Conformer. Set "
                    "backbone.pretrained=false, or give a file with backbone.weights=FILE"
                )
            weights = str(download_weights(url))
        if weights is not None:
            self._load(conformer_names(load_weights(weights)), source=weights)

    def _load(self, state: StateDict, source: str) -> None:
        heads = {name: value for name, value in state.items() if name.startswith(("trans_cls_head.", "conv_cls_head."))}
        own = {name: value for name, value in state.items() if name not in heads}
        load(self, own, classifier="conv_cls_head", source=source)
        self.classifier_bias = heads.get("trans_cls_head.bias")
        self._branch_classifier = {
            part: heads[f"conv_cls_head.{part}"] for part in ("weight", "bias") if f"conv_cls_head.{part}" in heads
        }

    @property
    def depth(self) -> int:
        """Return the number of transformer blocks."""
        return self.num_blocks

    @property
    def class_token(self) -> nn.Parameter:
        """Return the class token [1, 1, D]."""
        return self.cls_token

    def features(self, image: Tensor, reads: Mapping[int, Read], extra: Tensor | None = None) -> Features:
        """Run all blocks, see `Transformer.features`."""
        self.check_size(image)
        stem = F.max_pool2d(F.relu(self.bn1(self.conv1(image))), kernel_size=3, stride=2, padding=1)
        patches = self.trans_patch_conv(stem).flatten(2).mT  # [B, D, h, w] → [B, N, D]
        class_token = self.cls_token.expand(image.shape[0], -1, -1).to(patches.dtype)
        tokens = append_token(torch.cat([class_token, patches], dim=1), extra)
        rows: list[Tensor] = []
        conv_map, _ = self.conv_1(stem)
        tokens = read_block(self.trans_1, tokens, reads.get(0), rows)
        for number in range(2, self.num_blocks + 1):
            block = self.get_submodule(f"conv_trans_{number}")
            conv_map, tokens = block(conv_map, tokens, reads.get(number - 1), rows)
        return Features(tokens, rows, conv_map.mean(dim=(2, 3)))

    def norm(self, tokens: Tensor) -> Tensor:
        """Apply the final LayerNorm."""
        return self.trans_norm(tokens)  # type: ignore[no-any-return]

    def branch_classifier(self, num_classes: int) -> nn.Linear:
        """Make the classifier of the conv branch.

        It starts from the one in the weights if that has as many classes (released code), and as new layers do if not.
        """
        classifier = nn.Linear(self.branch_dim, num_classes)
        _initialize(classifier)
        if "weight" in self._branch_classifier and len(self._branch_classifier["weight"]) == num_classes:
            classifier.load_state_dict(self._branch_classifier)
        return classifier


# mmpretrain's names of the parts of a transformer block. Its versions differ in those of the norms.
_MMPRETRAIN = {
    r"\.ln([12])\.": r".norm\1.",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}


def conformer_names(state: StateDict) -> StateDict:
    """Give the weights of a Conformer the names of its own code. Weights that have them already stay as they are.

    Args:
        state: weights of the Conformer's own code, or of mmpretrain (formerly mmclassification).

    Raises:
        CheckpointError: they belong to no Conformer.
    """
    state = {re.sub(r"^(backbone|head)\.", "", name): value for name, value in state.items()}
    if "trans_patch_conv.weight" not in state:
        raise CheckpointError(
            f"not the weights of a Conformer: entry trans_patch_conv.weight is missing. There are "
            f"{', '.join(sorted(state)[:4])}, …"
        )
    for theirs, own in _MMPRETRAIN.items():
        state = {re.sub(theirs, own, name): value for name, value in state.items()}
    return state


def conformer_sizes(state: StateDict) -> dict[str, Any]:
    """Return the arguments of `Conformer` that its weights determine: all sizes but the number of heads.

    Raises:
        KeyError: an entry is missing that tells a size.
    """
    embed_dim, _, side, _ = state["trans_patch_conv.weight"].shape
    numbers = [int(found[1]) for name in state if (found := re.match(r"conv_trans_(\d+)\.", name))]
    return {
        "embed_dim": embed_dim,
        "depth": max(numbers, default=1),
        "mlp_ratio": len(state["trans_1.mlp.fc1.weight"]) / embed_dim,
        "channels": len(state["conv_1.conv3.weight"]),
        "patch_size": 4 * side,
    }


def _check_sizes(embed_dim: int, depth: int, num_heads: int, channels: int, patch_size: int) -> None:
    for name, value, divisor in (
        ("depth", depth, 3),
        ("embed_dim", embed_dim, max(num_heads, 1)),
        ("channels", channels, _EXPANSION),
        ("patch_size", patch_size, 16),
    ):
        if value < divisor or value % divisor:
            of_heads = ", backbone.num_heads" if name == "embed_dim" else ""
            raise ConfigError(f"backbone.{name}={value}: expected a multiple of {divisor}{of_heads}")


def _transformer_block(embed_dim: int, num_heads: int, mlp_ratio: float, drop_path: float) -> Block:
    norm = functools.partial(nn.LayerNorm, eps=_EPSILON)
    return Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=norm)


def _initialize(layer: nn.Module) -> None:
    """Initialize a layer as the released code does. Norms keep PyTorch's values."""
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
