"""HaS: Hide-and-Seek (Singh & Lee, ICCV 2017).

In training, each image is divided into squares of g×g pixels from its top left corner. Each square is hidden with a
probability p, that is, its pixels are set to 0. In a normalised image this is the mean of the data set. The network
then has to classify by whichever parts of the object are left. The method only changes images. `method=has` is CAM
that trains on such images, and `augment=has` hides parts of the images of any other method.

The paper draws g for each image from 0 (nothing is hidden), 16, 32, 44 and 56. The code of Choe et al. (CVPR 2020)
has one g. `cells=[g]` is that. That code confuses height and width, which makes no difference to its square images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wsolkit.errors import ConfigError
from wsolkit.types import TrainingBatch


def hide(image: Tensor, hidden: Tensor, cell: int) -> Tensor:
    """Set squares of images to 0.

    Args:
        image: normalised images [B, 3, H, W].
        hidden: which squares are hidden, bool [B, ⌈H/g⌉, ⌈W/g⌉]. The image cuts those at its right and lower border.
        cell: g, the side of a square in pixels.
    """
    height, width = image.shape[-2:]
    cell = int(cell)
    pixels = hidden.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)[:, None, :height, :width]
    return image.masked_fill(pixels, 0)


class HideAndSeek:
    """Hides squares of the images of a training batch.

    Args:
        cells: the sides of the squares in pixels. One of them is drawn for each image. 0 hides nothing.
        drop_rate: p, the probability of each square to be hidden.

    Raises:
        ConfigError: a setting is out of its range.
    """

    def __init__(self, cells: Sequence[int], drop_rate: float) -> None:
        if not cells or min(cells) < 0:
            raise ConfigError(f"augment.cells={list(cells)}: expected one or more sides in pixels, such as [44], or 0")
        if not 0 <= drop_rate <= 1:
            raise ConfigError(f"augment.drop_rate={drop_rate}: expected a probability from 0 to 1")
        self.cells = tuple(cells)
        self.drop_rate = drop_rate

    def __call__(self, batch: TrainingBatch) -> TrainingBatch:
        """Return the batch with parts of its images hidden."""
        image: Tensor = batch["image"]
        count, _, height, width = image.shape
        choice = torch.randint(len(self.cells), (count, 1, 1), device=image.device)
        for number, cell in enumerate(self.cells):
            if cell > 0:
                size = (count, -(-height // cell), -(-width // cell))
                hidden = torch.rand(size, device=image.device) <= self.drop_rate
                image = hide(image, hidden & (choice == number), cell)
        return {**batch, "image": image}
