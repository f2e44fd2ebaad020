"""Choose a threshold τ from localization maps alone, where no boxes say which one is best.

Otsu's threshold (IEEE Trans. SMC, 1979) divides values into two groups, so that the groups' means lie as far apart as
possible for their sizes. Here, the values are those of all maps of a split together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

BINS = 256


class MapValues(Metric):
    """Counts the values of localization maps, and gives Otsu's threshold.

    The state is one histogram, which sums across processes.

    >>> import torch
    >>> from wsolkit.metrics.map_values import MapValues
    >>> metric = MapValues()
    >>> metric.update(torch.tensor([[[0.1, 0.2], [0.8, 1.0]]]))
    >>> 0.2 < metric.compute().item() < 0.8
    True
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: Tensor) -> None:
        """Count localization maps of any shape, with values in [0, 1]."""
        places = (maps.float() * BINS).long().clamp(0, BINS - 1)
        self.counts += torch.bincount(places.flatten(), minlength=BINS)

    def compute(self) -> Tensor:
        """Return Otsu's threshold in [0, 1), a float64 scalar, or NaN if no map was counted."""
        return otsu_threshold(self.counts)


def otsu_threshold(counts: Tensor) -> Tensor:
    """Return Otsu's threshold of a histogram.

    Where several thresholds are equally good, because no value lies between them, the result is the middle one.

    Args:
        counts: the numbers of values in n equal parts of [0, 1], [n].

    Returns:
        a float64 scalar in [0, 1), the edge between two parts, or NaN if the values lie in fewer than two parts.
    """
    counts = counts.double().cpu()
    middles = (torch.arange(len(counts), dtype=torch.float64) + 0.5) / len(counts)
    below = counts.cumsum(0)[:-1]  # The values up to each edge.
    above = counts.sum() - below
    sums = (counts * middles).cumsum(0)
    between = (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2 * below * above
    between = between.masked_fill((below == 0) | (above == 0), -1)
    best = between.max()
    if best < 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    edges = torch.arange(1, len(counts), dtype=torch.float64)[between >= best * (1 - 1e-12)]
    return edges[(len(edges) - 1) // 2] / len(counts)
