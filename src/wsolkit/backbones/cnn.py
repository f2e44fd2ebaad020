"""Open up convolutional networks of timm as chains of named stages, with larger maps.

Localization needs finer maps than classification. The papers remove strides from the last stages of a pretrained
network, without dilation, and keep its weights.

Where a position of a map lies: maps are enlarged as if each position sat in the middle of its cell of s×s pixels.
Mostly this is wrong. A 3×3 convolution with stride 2 and padding 1 on each side is centred on pixels 0, 2, 4, …, and
not between pairs of pixels. In a ResNet this adds up to (s − 1) / 2 pixels towards the top left, so objects are found
half a cell too far to the bottom right. The papers accept this. `align` moves the maps back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, freeze_batch_norm_2d
from timm.models.efficientnet import EfficientNet
from timm.models.inception_v3 import InceptionB, InceptionV3
from timm.models.resnet import ResNet
from timm.models.vgg import VGG
from torch import Tensor, nn

from wsolkit.backbones.pretrained import create, load
from wsolkit.backbones.weights import load_weights
from wsolkit.errors import ConfigError

BatchNorm = Literal["running", "frozen"]


class Linear(NamedTuple):
    """A classifier with weight [C, D] and bias [C]."""

    weight: Tensor
    bias: Tensor


class CNN(nn.Module):
    """A timm network without its classifier, as a chain of stages.

    These are the stages, in order, and the possible strides:

    - ResNet: stem, layer1.0, layer1.1, …, layer4.2; 32 as pretrained, 16, 8, 4.
    - VGG: conv1, pool1, conv2, …, pool4, conv5, without the last pooling; 16, 8 (pool4 then does nothing), 4, ….
    - MobileNetV2, EfficientNet: stem, blocks.0.0, …, blocks.6.0, conv_head; 32 as pretrained, 16, 8, ….
    - Inception V3 up to Mixed_6e, by the names of its layers, padded as in SPG (Zhang et al., ECCV 2018); 8, which
      gives SPG's 28×28 maps of 224 pixels, or 16.

    `layer4` or `blocks.6` also name the last of their parts.

    Args:
        model: timm's name, for example "resnet50.tv_in1k".
        stride: the image pixels per position of the last map. Strides are removed from the last stage backwards.
        batch_norm: "running" normalises each training batch by itself and keeps running statistics. "frozen" keeps
            statistics, scales and shifts as they were loaded.
        align: whether `aligned` moves maps to the true positions in the image.
        channels_last: whether the memory holds maps position by position instead of channel by channel. The numbers are
            the same, 1.3 to 1.7 times faster on a CPU.
        pretrained: whether to take ImageNet weights from timm's hub, unless `weights` is given.
        weights: a file of weights (safetensors or a state dict, in timm's names).
        options: further arguments of timm's model.

    Attributes:
        classifier: the classifier of the weights, if they have a linear one on the last map, or None.
        names: the names of the stages.
        channels: the number of channels of the last map.
        offset: the number of pixels by which the positions of the last map lie right of and below the middle of their
            cells.

    Raises:
        ConfigError: timm has no such model, it belongs to none of these families, or it cannot have the stride.
        CheckpointError: `weights` does not fit the model.
    """

    def __init__(
        self,
        model: str,
        stride: int,
        batch_norm: BatchNorm,
        align: bool,
        channels_last: bool,
        pretrained: bool,
        weights: str | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        pretrained = pretrained and weights is None
        network = create(model, pretrained, options)
        stages, head = _open(network, model)
        self.classifier: Linear | None = None
        if weights is not None:
            state = load_weights(weights)
            load(network, state, classifier=head, source=weights)
            if {f"{head}.weight", f"{head}.bias"} <= state.keys():
                self.classifier = Linear(state[f"{head}.weight"], state[f"{head}.bias"])
        elif pretrained:
            linear = network.get_submodule(head)
            assert isinstance(linear, nn.Linear)
            self.classifier = Linear(linear.weight.detach().clone(), linear.bias.detach().clone())
        if isinstance(network, VGG | InceptionV3):
            self.classifier = None  # Other layers come before the classifier, so it does not classify the last map.
        _set_stride(stages, stride, model)
        self.names = tuple(stages)
        self.stride, self.align = stride, align
        self.offset = _offset(stages.values())
        self.stages = nn.Sequential(*stages.values())
        if batch_norm == "frozen":
            freeze_batch_norm_2d(self.stages)
        with torch.no_grad():
            self.channels = int(self.stages.eval()(torch.zeros(1, 3, 64, 64)).shape[1])
        self.stages.train()
        if channels_last:  # Convolutions take their layout from the weights.
            self.stages.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the last map [B, D, h, w] of an image [B, 3, H, W]."""
        return self.stages(image)  # type: ignore[no-any-return]

    def maps(
        self, image: Tensor, stages: Sequence[str], changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the last map [B, D, h, w] of an image [B, 3, H, W], and the maps after some stages in order.

        Args:
            image: the image.
            stages: the stages whose maps are returned.
            changes: functions that change the maps after stages, by the names of the stages.
        """
        wanted = [self.places(stage)[-1] for stage in stages]
        changed = {self.places(stage)[-1]: change for stage, change in (changes or {}).items()}
        kept: dict[int, Tensor] = {}
        for place, stage in enumerate(self.stages):
            image = stage(image)
            if place in changed:
                image = changed[place](image)
            if place in wanted:
                kept[place] = image
        return image, [kept[place] for place in wanted]

    @torch.no_grad()
    def widths(self, stages: Sequence[str]) -> list[int]:
        """Return the number of channels after each of some stages.

        Raises:
            ConfigError: there is no such stage.
        """
        training = self.training
        _, kept = self.eval().maps(next(self.parameters()).new_zeros(1, 3, 64, 64), stages)
        self.train(training)
        return [int(maps.shape[1]) for maps in kept]

    def pool_after(self, stage: str) -> None:
        """Add 2×2 max pooling as a stage "pool" behind a stage, so that all later maps have half the sides.

        Raises:
            ConfigError: there is no such stage.
        """
        place = self.places(stage)[-1] + 1
        self.names = (*self.names[:place], "pool", *self.names[place:])
        self.stages = nn.Sequential(*self.stages[:place], nn.MaxPool2d(2), *self.stages[place:])
        self.stride *= 2
        self.offset = _offset(self.stages)

    def aligned(self, maps: Tensor, stage: str | None = None) -> Tensor:
        """Return maps [B, K, h, w] unchanged. With `align`, move them by `offset` and refine them to [B, K, 2h, 2w].

        They become finer, because moving them by less than a cell would blur them.

        Args:
            maps: the maps.
            stage: the stage after which there are maps of this size, or None for the last map.
        """
        if not self.align:
            return maps
        seen = self.stages if stage is None else self.split(stage)[0]
        offset, stride = _offset(seen), math.prod(map(_stride, seen))
        axes = []
        for count in (2 * maps.shape[-2], 2 * maps.shape[-1]):
            middles = (
                torch.arange(count, device=maps.device) + 0.5
            ) / count  # The positions of the finer cells, on a scale where the image goes from 0 to 1.
            axes.append(2 * (middles - 2 * offset / (stride * count)) - 1)
        y, x = torch.meshgrid(*axes, indexing="ij")
        grid = torch.stack([x, y], dim=-1).expand(maps.shape[0], -1, -1, -1)
        return F.grid_sample(maps.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)

    def split(self, stage: str) -> tuple[nn.Sequential, nn.Sequential]:
        """Split the chain after a stage. Both parts share their layers with the network."""
        following = self.places(stage)[-1] + 1
        return self.stages[:following], self.stages[following:]

    def places(self, stage: str) -> list[int]:
        """Return the links of the chain, counted from 0, that form a stage.

        Raises:
            ConfigError: there is no such stage.
        """
        places = [place for place, name in enumerate(self.names) if name == stage or name.startswith(f"{stage}.")]
        if not places:
            raise ConfigError(f"the backbone has no stage '{stage}'; choose from: {', '.join(self.names)}")
        return places


def _open(network: nn.Module, model: str) -> tuple[dict[str, nn.Module], str]:
    """Return the stages of a network by name, and the name of its classifier."""
    if isinstance(network, ResNet):
        stem = [network.get_submodule(name) for name in ("conv1", "bn1", "act1", "maxpool")]
        stages: dict[str, nn.Module] = {"stem": nn.Sequential(*stem)}
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            stages |= {f"{layer}.{place}": block for place, block in network.get_submodule(layer).named_children()}
        return stages, "fc"
    if isinstance(network, VGG):
        return _open_vgg(network), "head.fc"
    if isinstance(network, EfficientNet):
        stages = {"stem": nn.Sequential(network.conv_stem, network.bn1)}
        for stage, blocks in network.blocks.named_children():
            stages |= {f"blocks.{stage}.{place}": block for place, block in blocks.named_children()}
        return stages | {"conv_head": nn.Sequential(network.conv_head, network.bn2)}, "classifier"
    if isinstance(network, InceptionV3):
        return _open_inception(network), "fc"
    raise ConfigError(
        f"'{model}' is not a convolutional network that can be opened up: choose a ResNet, a VGG, an Inception V3, a "
        "MobileNetV2 or an EfficientNet"
    )


def _open_vgg(network: VGG) -> dict[str, nn.Module]:
    stages: dict[str, nn.Module] = {}
    layers: list[nn.Module] = []
    for layer in network.features:
        if not isinstance(layer, nn.MaxPool2d):
            layers.append(layer)
            continue
        number = len(stages) // 2 + 1
        stages |= {f"conv{number}": nn.Sequential(*layers), f"pool{number}": layer}
        layers = []
    del stages["pool5"]
    return stages


class _PaddedInceptionB(nn.Module):
    """timm's InceptionB with one pixel of padding in its three branches that have a stride: 28 → 14, or 28 → 28."""

    def __init__(self, block: InceptionB) -> None:
        super().__init__()
        self.convolution = block.branch3x3
        self.convolutions = nn.Sequential(block.branch3x3dbl_1, block.branch3x3dbl_2, block.branch3x3dbl_3)
        for strided in (block.branch3x3, block.branch3x3dbl_3):
            strided.conv.padding = (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, kernel_size=3, stride=self.convolution.conv.stride, padding=1)
        return torch.cat([self.convolution(x), self.convolutions(x), pooled], dim=1)


def _open_inception(network: InceptionV3) -> dict[str, nn.Module]:
    names = network.layer_names[: network.layer_names.index("Mixed_6e") + 1]
    stages = {name: network.get_submodule(name) for name in names}
    network.Conv2d_1a_3x3.conv.padding = (1, 1)
    for pool in ("Pool1", "Pool2"):
        stages[pool] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1, ceil_mode=True)
    return stages | {"Mixed_6a": _PaddedInceptionB(network.Mixed_6a)}


def _set_stride(stages: dict[str, nn.Module], wanted: int, model: str) -> None:
    possible = [math.prod(map(_stride, stages.values()))]
    for name, stage in list(stages.items())[:0:-1]:
        if possible[-1] == wanted:
            return
        if _stride(stage) > 1:
            possible.append(possible[-1] // _stride(stage))
            stages[name] = _without_stride(stage)
    if possible[-1] != wanted:
        raise ConfigError(f"backbone.stride={wanted}: '{model}' can have {', '.join(map(str, possible))}")


def _stride(stage: nn.Module) -> int:
    """Return the factor by which a stage reduces the sides of a map."""
    if isinstance(stage, nn.Sequential):
        return math.prod(_stride(layer) for layer in stage)
    return max((_of(layer) for layer in stage.modules()), default=1)


def _of(layer: nn.Module) -> int:
    if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        return 1
    return layer.stride if isinstance(layer.stride, int) else int(layer.stride[0])


def _offset(stages: Iterable[nn.Module]) -> float:
    """Return by how many pixels the positions after some stages lie right of and below the middle of their cells."""
    offset, reached = 0.0, 1
    for stage in stages:
        # Parallel branches move in the same way, so one is enough. (A ResNet-D's shortcuts differ and do not count.)
        main = stage.convolution if isinstance(stage, _PaddedInceptionB) else stage
        for name, layer in main.named_modules():
            if "downsample" in name or not isinstance(layer, nn.Conv2d | nn.MaxPool2d):
                continue
            kernel, stride = (v if isinstance(v, int) else int(v[0]) for v in (layer.kernel_size, layer.stride))
            padding = layer.padding if isinstance(layer.padding, int) else int(layer.padding[0])
            if isinstance(layer, Conv2dSame):
                # This is TensorFlow's padding, on sides that the stride divides.
                padding = max(kernel - stride, 0) // 2
            offset += reached * ((kernel - 1) / 2 - padding - (stride - 1) / 2)
            reached *= stride
    return offset


def _without_stride(stage: nn.Module) -> nn.Module:
    """Make a stage keep the sides of a map: set the stride of convolutions to one, and leave out pooling."""
    if isinstance(stage, nn.MaxPool2d | nn.AvgPool2d):
        return stage if _of(stage) == 1 else nn.Identity()
    if isinstance(stage, nn.Conv2d):
        stage.stride = (1, 1)
    for name, layer in stage.named_children():
        stage.add_module(name, _without_stride(layer))
    return stage
