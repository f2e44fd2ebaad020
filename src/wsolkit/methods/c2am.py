"""C²AM: contrastive learning for a class-agnostic activation map (Xie et al., CVPR 2022).

A small head turns the feature map F [B, D, H, W] into one activation map, and without any labels it learns to divide
images into foreground and background:

    P = sigmoid(BatchNorm(Conv3×3(F))),    f = Σ_u P_u F_u / HW,    b = Σ_u (1 − P_u) F_u / HW

The foregrounds f of all images of a batch should be alike, and so should their backgrounds b. Foregrounds and
backgrounds should differ:

    L_between(b, f) = mean over i, j of −log(1 − cos(b_i, f_j))
    L_alike(x)      = mean over i, j of −log cos(x_i, x_j) · exp(−α · rank_ij)
    loss = L_alike(b) + L_between(b, f) + L_alike(f)

rank_ij is the place of x_j among the vectors most similar to x_i: −1 for x_i itself, 0 for the nearest other one, and
so on. Distant pairs, which may show different things, therefore count less. Cosines are clamped to [0.0005, 0.9995].

Nothing in the loss says which region is the foreground. After the first epoch, the one that covers the edges of the
images is taken for the background. The map P or 1 − P is the same for all classes.

F is the last map together with that of an earlier stage, for a ResNet layer4 and layer3, at stride 16.

What differs from the released code:
- C²AM has no classifier, and its authors take the class from another network. Here a linear classifier learns beside
  it, on features without a gradient. Labels therefore never reach the backbone or the map.
- The released code looks at the edges of one image at the end of the first epoch. This code looks at the whole last
  batch, so that one picture does not decide.
- Under DDP, pairs are those of the global batch.
- `FrozenC2AM` puts the same head on the patch tokens of a frozen transformer. TriLite descends from this form.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.backbones.tokens import TokenBackbone
from wsolkit.methods.base import Network, WSOLModule
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.maps import choose_classes
from wsolkit.methods.processes import gathered, summed
from wsolkit.methods.similarity import SimilarityWalk
from wsolkit.types import Classes, Localization, Tokens, TrainingBatch

_LOWEST, _HIGHEST = 0.0005, 0.9995  # The released code clamps cosines to this range.


def embeddings(feature: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Pool a feature map over foreground and background.

    Args:
        feature: F [B, D, H, W].
        activation: P [B, H, W] in [0, 1].

    Returns:
        foreground f and background b [B, D]. Both are divided by HW, whatever their areas.
    """
    with torch.autocast(feature.device.type, enabled=False):
        values, weights = feature.float().flatten(2), activation.float().flatten(1)[:, None]  # [B, D, N], [B, 1, N]
        shares = torch.cat([weights, 1 - weights], dim=1)  # [B, 2, N]
        foreground, background = (shares @ values.mT / values.shape[2]).unbind(dim=1)  # [B, 2, D] → two of [B, D]
    return foreground, background


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the clamped cosines [n, m] of vectors [n, D] and [m, D]."""
    unit, other = F.normalize(first.float(), dim=1), F.normalize(second.float(), dim=1)
    return (unit @ other.mT).clamp(_LOWEST, _HIGHEST)


def similarity_loss(embedding: Tensor, alpha: float) -> Tensor:
    """Compute L_alike, which makes vectors [B, D] of a batch alike, as a scalar.

    Args:
        embedding: [B, D].
        alpha: α, by which the weight of a pair falls with its rank.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        cosine = _cosines(embedding, embedding)
        place = cosine.detach().argsort(dim=1, descending=True).argsort(dim=1)  # 0 for the most similar one
        weight = torch.exp(-alpha * (place.float() - 1))
        return (-cosine.log() * weight).mean()


def dissimilarity_loss(background: Tensor, foreground: Tensor) -> Tensor:
    """Compute L_between, which makes vectors [B, D] of backgrounds and foregrounds differ, as a scalar."""
    with torch.autocast(background.device.type, enabled=False):
        return -(1 - _cosines(background, foreground)).log().mean()


def edge_share(activation: Tensor) -> Tensor:
    """Return the share [B] of positions along the four edges where maps [B, H, W] exceed 0.5."""
    inside = (activation > 0.5).float()
    edges = [inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]]
    return torch.stack([edge.mean(dim=1) for edge in edges]).mean(dim=0)


class ActivationHead(nn.Module):
    """Divides images into two regions, and knows which one is the background.

    Args:
        channels: D.

    Attributes:
        inverted: whether P is the background, as a scalar.
    """

    inverted: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(1)
        self.register_buffer("inverted", torch.tensor(False))

    def forward(self, feature: Tensor) -> Tensor:
        """Compute P [B, H, W] from a feature map [B, D, H, W]."""
        return self.norm(self.conv(feature)).float().sigmoid()[:, 0]  # type: ignore[no-any-return]

    def foreground(self, activation: Tensor) -> Tensor:
        """Turn P [B, H, W] into the foreground [B, 1, H, W], which is P or 1 − P."""
        return torch.where(self.inverted, 1 - activation, activation)[:, None]

    @torch.no_grad()
    def tell_background(self, activation: Tensor) -> None:
        """Take for the background what covers most of the edges of maps P [B, H, W], over all processes."""
        share = edge_share(activation)
        total, count = summed(torch.stack([share.sum(), torch.ones_like(share).sum()])).unbind()
        self.inverted.copy_(total > 0.5 * count)


def contrastive_losses(feature: Tensor, activation: Tensor, alpha: float) -> dict[str, Tensor]:
    """Compute the three terms of the loss over the global batch by name.

    Args:
        feature: F [B, D, H, W].
        activation: P [B, H, W].
        alpha: α of `similarity_loss`.
    """
    foreground, background = (gathered(part) for part in embeddings(feature, activation))
    return {
        "loss_background": similarity_loss(background, alpha),
        "loss_between": dissimilarity_loss(background, foreground),
        "loss_foreground": similarity_loss(foreground, alpha),
    }


class C2AMNetwork(CAMNetwork):
    """A CAM network with an activation head. Its classifier sends no gradient into the backbone.

    Args:
        cam: the arguments of `CAMNetwork`.
        stages: the stages whose maps are put together as F. All are averaged down to the size of the last one.
    """

    passes: ClassVar[tuple[str, ...]] = ("parts",)

    def __init__(self, backbone: CNN, *cam: Any, stages: Sequence[str]) -> None:
        super().__init__(backbone, *cam)
        self.stages = tuple(stages)
        training = backbone.training
        with torch.no_grad():
            maps = backbone.eval().maps(torch.zeros(1, 3, 64, 64), self.stages)[1]
        backbone.train(training)
        self.activation = ActivationHead(sum(one.shape[1] for one in maps))

    def parts(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return the parts of the network.

        Args:
            image: [B, 3, H, W].

        Returns:
            the feature that is classified [B, D', h, w], F [B, D, h, w], P [B, h, w], and a feature map of each stage
            that the post-process needs.
        """
        last, maps = self.backbone.maps(image, [*self.stages, *self._stages])
        own = [F.adaptive_avg_pool2d(one, last.shape[-2:]) for one in maps[: len(self.stages)]]  # type: ignore[arg-type]
        feature = torch.cat(own, dim=1)
        return self.head(last.detach()), feature, self.activation(feature), maps[len(self.stages) :]

    def features(self, image: Tensor) -> Tensor:
        """Compute the map [B, D', h, w] that is classified, from an image [B, 3, H, W]."""
        return self.parts(image)[0]

    @torch.no_grad()
    def localize(self, image: Tensor, classes: Classes) -> Localization:
        """Localize as `WSOLModule.localize` says. Every class has the same map."""
        last, _, activation, stages = self.parts(image)
        logits = self.logits(last)
        chosen = choose_classes(classes, logits)
        top = logits.argmax(dim=1, keepdim=True)  # A post-process from gradients asks for a class.
        maps = self.refined(self.activation.foreground(activation), image, last, stages, top)
        return Localization(logits, maps.expand(-1, 1 if chosen is None else chosen.shape[1], -1, -1))


class C2AM(CAMModule):
    """C²AM on a convolutional network, in training and evaluation.

    Args:
        stages: see `C2AMNetwork`.
        alpha: α, see `similarity_loss`.
        classifier_lr_factor: the factor of the learning rate for the classifier and the layers before it.
        head: see `HeadSettings`.
    """

    network: C2AMNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        stages: Sequence[str],
        alpha: float,
        classifier_lr_factor: float,
        **head: Unpack[HeadSettings],
    ) -> None:
        network = functools.partial(C2AMNetwork, stages=stages)
        super().__init__(backbone, num_classes, "average_first", head, network)
        self.alpha = alpha
        self.classifier_lr_factor = classifier_lr_factor

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the three terms of the loss, and the cross-entropy of the classifier beside it."""
        last, feature, activation, _ = self.network.parts(batch["image"])
        return _losses(self, self.network.activation, feature, activation, self.network.logits(last), batch)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameter groups, of which the classifier is one."""
        own = [*self.network.head.parameters(), *self.network.classifier.parameters()]
        apart = {id(parameter) for parameter in own}
        groups = [
            {**group, "params": [one for one in group["params"] if id(one) not in apart]}
            for group in super().parameter_groups()
        ]
        classifier = {"name": "classifier", "params": own, "lr_factor": self.classifier_lr_factor}
        return [*(group for group in groups if group["params"]), classifier]


class FrozenC2AMNetwork(Network):
    """A frozen backbone with an activation head on its patch tokens, and a classifier of the pooled feature.

    Args:
        backbone: gives the tokens. The first one of its blocks is used.
        num_classes: C.
    """

    passes: ClassVar[tuple[str, ...]] = ("tokens",)

    def __init__(self, backbone: TokenBackbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.activation = ActivationHead(backbone.embed_dim)
        self.classifier = nn.Linear(backbone.pooled_dim, num_classes)

    def tokens(self, image: Tensor | Tokens) -> Tokens:
        """Return the tokens of images [B, 3, H, W], unless they are given already."""
        return image if isinstance(image, Tokens) else self.backbone(image)

    def forward(self, image: Tensor | Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the logits [B, C], F [B, D, h, w] and P [B, h, w]."""
        tokens = self.tokens(image)
        feature = tokens.patches[:, 0]
        return self.classifier(tokens.pooled).float(), feature, self.activation(feature)


class FrozenC2AM(WSOLModule):
    """C²AM on a frozen transformer, in training and evaluation.

    Args:
        alpha: α, see `similarity_loss`.
        classifier_lr_factor: the factor of the learning rate for the classifier.
        postprocess: refines the maps, or None.
    """

    network: FrozenC2AMNetwork

    def __init__(
        self,
        backbone: TokenBackbone,
        num_classes: int,
        alpha: float,
        classifier_lr_factor: float,
        postprocess: SimilarityWalk | None,
    ) -> None:
        super().__init__(FrozenC2AMNetwork(backbone, num_classes))
        self.alpha = alpha
        self.classifier_lr_factor = classifier_lr_factor
        self.postprocess = postprocess

    def forward(self, image: Tensor | Tokens) -> Tensor:
        """Compute the logits [B, C] of normalised images [B, 3, H, W] or of their tokens."""
        return self.network.classifier(self.network.tokens(image).pooled).float()  # type: ignore[no-any-return]

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the three terms of the loss, and the cross-entropy of the classifier beside it."""
        logits, feature, activation = self.network(batch["image"])
        return _losses(self, self.network.activation, feature, activation, logits, batch)

    @torch.no_grad()
    def localize(self, image: Tensor | Tokens, classes: Classes = None) -> Localization:
        """Localize as `WSOLModule.localize` says. Every class has the same map."""
        logits, feature, activation = self.network(image)
        maps = self.network.activation.foreground(activation)
        if self.postprocess is not None:
            maps = self.postprocess(maps, feature)
        chosen = choose_classes(classes, logits)
        return Localization(logits, maps.expand(-1, 1 if chosen is None else chosen.shape[1], -1, -1))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups for the optimizer. Weight decay acts on all trained parameters."""
        own = self.network
        return [
            {"name": "activation", "params": list(own.activation.parameters())},
            {"name": "classifier", "params": list(own.classifier.parameters()), "lr_factor": self.classifier_lr_factor},
        ]


def _losses(
    module: C2AM | FrozenC2AM,
    head: ActivationHead,
    feature: Tensor,
    activation: Tensor,
    logits: Tensor,
    batch: TrainingBatch,
) -> dict[str, Tensor]:
    if module.training and module.current_epoch == 0:  # The last batch of the first epoch has the last word.
        head.tell_background(activation)
    losses = contrastive_losses(feature, activation, module.alpha)
    losses["loss_cls"] = classification_loss(logits, batch)
    watched = {"area_foreground": head.foreground(activation).mean().detach()}
    return {"loss": torch.stack(list(losses.values())).sum(), **losses, **watched}
