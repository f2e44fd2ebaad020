"""DA-WSOL: weakly supervised object localization as domain adaptation (Zhu et al., CVPR 2022).

The classifier learns on averaged image features, the source domain, and is then applied to the features of positions,
the target domain. Their distributions differ. In training, 3-means divides the positions of each image into three
clusters: the universum T_u, which shows no class (0), positions that are like the image feature (1), and the target T_t
(2). S holds the image feature and some positions of cluster 1, and T as many positions of cluster 2:

    loss = CE + β MMD(S, T) + ω mean(T_u)

MMD is the maximum mean discrepancy with a sum of five Gaussian kernels, estimated in linear time over neighbouring
pairs of samples. Images whose clusters 1 or 2 are too small are left out of it. The last term lowers the features of
the universum.

The clusters start at the mean of all earlier universum centres, at the image feature, and at a running mean for the
class. The latter starts with the feature of the class's first image. It takes in the centre of cluster 1 of each image,
as the released code has it.

What differs from the released code:
- It clusters one image after the other on the CPU, until nothing changes, and moves the running means after each image.
  Here all images of a batch are clustered together, with a fixed number of iterations, and the running means move after
  the batch.
- Under DDP, the running means take in the images of all processes, and the means of the losses are over the global
  batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from wsolkit.backbones.cnn import CNN
from wsolkit.errors import ConfigError
from wsolkit.methods.cam import CAMModule, CAMNetwork, HeadSettings
from wsolkit.methods.classification import classification_loss
from wsolkit.methods.memory import move_memory
from wsolkit.methods.processes import gathered, weighted_mean
from wsolkit.types import TrainingBatch

_KERNELS = (0.25, 0.5, 1.0, 2.0, 4.0)  # the bandwidths of the kernels, as factors (released)


def mmd(source: Tensor, target: Tensor) -> Tensor:
    """Compute the maximum mean discrepancy, the mean over images, as a scalar. It may be negative.

    Args:
        source, target: samples [B, K, D].
    """
    return mmd_of_images(source, target).mean()


def mmd_of_images(source: Tensor, target: Tensor) -> Tensor:
    """Compute what `mmd` averages, [B], in time linear in the number of samples.

    The bandwidth is the mean squared distance between the samples of an image, without a gradient.
    """
    with torch.autocast(source.device.type, enabled=False):
        source, target = source.float(), target.float()
        both = torch.cat([source, target], dim=1).detach()  # [B, 2K, D]
        count = both.shape[1]
        # Σ over all pairs of ‖x − y‖² is 2n Σ ‖x − mean‖².
        spread = 2 * count * (both - both.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
        bandwidth = (spread / (count**2 - count)).clamp(min=torch.finfo(torch.float32).tiny)
        next_source, next_target = source.roll(-1, dims=1), target.roll(-1, dims=1)

        def kernel(first: Tensor, second: Tensor) -> Tensor:
            distance = (first - second).square().sum(dim=2) / bandwidth[:, None]  # [B, K]
            return torch.stack([(-distance / factor).exp() for factor in _KERNELS]).sum(dim=0)

        within = kernel(source, next_source) + kernel(target, next_target)
        across = kernel(source, next_target) + kernel(next_source, target)
        return (within - across).mean(dim=1)


@torch.no_grad()
def k_means(points: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Cluster the points of each image.

    As in scikit-learn, an empty cluster takes the point that is farthest from the centre of its own cluster.

    Args:
        points: [B, N, D], at least as many as clusters.
        centres: where the clusters start, [B, k, D].
        iterations: how often the centres move.

    Returns:
        the cluster of each point, int64 [B, N], and the centres [B, k, D].
    """
    with torch.autocast(points.device.type, enabled=False):
        points, centres = points.float(), centres.float()
        numbers = torch.arange(centres.shape[1], device=points.device)

        def nearest() -> tuple[Tensor, Tensor]:
            # One product for each cluster, so that two centres at one place have exactly the same distances. The first
            # of them then takes the points.
            products = torch.cat([points @ centre.mT for centre in centres.split(1, dim=1)], dim=2)  # [B, N, k]
            distances = centres.square().sum(dim=2)[:, None] - 2 * products  # without ‖x‖², which is the same for all
            least, clusters = distances.min(dim=2)
            return clusters, least + points.square().sum(dim=2)

        for _ in range(iterations):
            clusters, distances = nearest()
            empty = (clusters[:, :, None] != numbers).all(dim=1)  # [B, k]
            farthest = distances.topk(len(numbers), dim=1).indices
            taken = farthest.gather(1, (empty.cumsum(dim=1) - 1).clamp(min=0))  # the point for each empty cluster
            for number in range(len(numbers)):
                moves = (torch.arange(points.shape[1], device=points.device) == taken[:, number, None]) & empty[
                    :, number, None
                ]
                clusters = torch.where(moves, number, clusters)
            members = (clusters[:, :, None] == numbers).float()
            counts = members.sum(dim=1)[:, :, None]  # [B, k, 1]
            centres = torch.where(counts > 0, members.mT @ points / counts.clamp(min=1), centres)
        return nearest()[0], centres


def draw_members(points: Tensor, member: Tensor, count: int) -> Tensor:
    """Draw points of each image at random, without putting any back.

    Args:
        points: [B, N, D].
        member: which points can be drawn, bool [B, N].
        count: the number of points. If an image has fewer, the others are not members, or are drawn again.

    Returns:
        [B, count, D].
    """
    places = torch.arange(count, device=points.device) % points.shape[1]
    order = (torch.rand(member.shape, device=points.device) + member).argsort(dim=1, descending=True)
    return points.gather(1, order[:, places, None].expand(-1, -1, points.shape[2]))


class DAWSOLNetwork(CAMNetwork):
    """A CAM network with running means, at which clusters start.

    Args:
        cam: the arguments of `CAMNetwork`.

    Attributes:
        targets, visits: the running mean of each class [C, D], and how many features it took in [C].
        universum, universum_visits: the same of the universum, [1, D] and [1].
    """

    targets: Tensor
    visits: Tensor
    universum: Tensor
    universum_visits: Tensor

    def __init__(self, backbone: CNN, num_classes: int, *cam: Any) -> None:
        super().__init__(backbone, num_classes, *cam)
        width = self.classifier.in_channels
        for name, rows in (("targets", num_classes), ("universum", 1)):
            self.register_buffer(name, torch.zeros(rows, width))
        for name, rows in (("visits", num_classes), ("universum_visits", 1)):
            self.register_buffer(name, torch.zeros(rows))

    @torch.no_grad()
    def cluster(self, points: Tensor, label: Tensor, iterations: int, learn: bool) -> Tensor:
        """Divide the positions of images into universum, source and target.

        Args:
            points: the features of the positions [B, N, D].
            label: [B].
            iterations: see `k_means`.
            learn: whether the running means take in the centres, with the images of all processes.

        Returns:
            0, 1 or 2 for each position, int64 [B, N].
        """
        own, everyone = points.mean(dim=1), gathered(label)

        def first(visits: Tensor) -> Tensor:
            return (visits == 0).float()

        targets, _ = move_memory(self.targets, self.visits, everyone, gathered(own), first)
        visits = self.visits.clone()
        visits[everyone] = visits[everyone].clamp(min=1)
        starts = torch.stack([self.universum.expand_as(own), own, targets[label]], dim=1)  # [B, 3, D]
        clusters, centres = k_means(points, starts, iterations)
        if learn:
            centres = gathered(centres)

            def running(visits: Tensor) -> Tensor:
                return 1 / (visits + 1)

            found = move_memory(targets, visits, everyone, centres[:, 1], running)
            of_universum = move_memory(
                self.universum, self.universum_visits, torch.zeros_like(everyone), centres[:, 0], running
            )
            for buffer, value in zip(
                (self.targets, self.visits, self.universum, self.universum_visits), (*found, *of_universum), strict=True
            ):
                buffer.copy_(value)
        return clusters


class DAWSOL(CAMModule):
    """DA-WSOL in training and evaluation.

    Args:
        start_epoch: the first epoch, counted from 0, with the two further losses.
        adaptation_weight, universum_weight: β and ω.
        samples: K, the number of samples of each of source and target.
        iterations: see `k_means`.
        head: see `HeadSettings`.

    Raises:
        ConfigError: there are fewer than two samples, or no iterations.
    """

    network: DAWSOLNetwork

    def __init__(
        self,
        backbone: CNN,
        num_classes: int,
        start_epoch: int,
        adaptation_weight: float,
        universum_weight: float,
        samples: int,
        iterations: int,
        **head: Unpack[HeadSettings],
    ) -> None:
        if samples < 2 or iterations < 1:
            raise ConfigError(
                f"method.samples={samples} and method.iterations={iterations}: expected two samples or more, and one "
                "iteration or more"
            )
        super().__init__(backbone, num_classes, "average_first", head, DAWSOLNetwork)
        self.start_epoch = start_epoch
        self.adaptation_weight = adaptation_weight
        self.universum_weight = universum_weight
        self.samples = samples
        self.iterations = iterations

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return the cross-entropy and, from `start_epoch` on, the unweighted `loss_adaptation` and `loss_universum`.

        `share_adapted` is the share of images whose clusters are large enough for `loss_adaptation`.
        """
        network, label = self.network, batch["label"]
        feature = network.features(batch["image"])
        losses = {"loss_cls": classification_loss(network.logits(feature), batch)}
        if self.current_epoch < self.start_epoch:
            return {"loss": losses["loss_cls"], **losses}
        points = feature.float().flatten(2).mT  # [B, D, h, w] → [B, N, D]
        clusters = network.cluster(points, label, self.iterations, learn=self.training)
        universum, alike, target = (clusters == number for number in range(3))
        enough = (alike.sum(dim=1) >= self.samples - 1) & (target.sum(dim=1) >= self.samples)
        source = torch.cat([points.mean(dim=1, keepdim=True), draw_members(points, alike, self.samples - 1)], dim=1)
        distances = mmd_of_images(source, draw_members(points, target, self.samples))
        losses["loss_adaptation"] = weighted_mean(distances, enough.float())
        losses["loss_universum"] = weighted_mean(points.mean(dim=2).flatten(), universum.float().flatten())
        total = losses["loss_cls"] + self.adaptation_weight * losses["loss_adaptation"]
        total = total + self.universum_weight * losses["loss_universum"]
        return {"loss": total, **losses, "share_adapted": enough.float().mean()}
