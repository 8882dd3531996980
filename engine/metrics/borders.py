"""Pixel accuracy by the distance to the borders of a network's partitions.

Source: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022, Fig. 6: predictions at the edges
of partitions are as good as elsewhere.
"""

from itertools import pairwise

import torch
from torch import Tensor

from utils import distributed
from utils.transfer import send

from .counts import count_each

Size = tuple[int, int]  # height, width in pixels
NEAREST = 4  # pixels that the first range holds: one position of the finest map
NO_BORDER = 2**30  # a distance


class BorderAccuracy:
    """Counts the pixels, and those that are right, in ranges of distance that double: 0-3, 4-7, 8-15, ...

    Args:
        partition: (height, width) of a partition in pixels of the test image; partitions tile it from its top left.
        device: of the counts.
    """

    def __init__(self, partition: Size, device: torch.device) -> None:
        self._partition, bounds = partition, [NEAREST]
        while bounds[-1] < max(partition):
            bounds.append(2 * bounds[-1])
        self._bounds = send(torch.tensor(bounds), device)
        self._counts = torch.zeros(2, len(bounds), dtype=torch.int64, device=device)  # right, all

    def update(self, right: Tensor, counted: Tensor) -> None:
        """Accumulates which pixels are right and which are counted, bool (N, H, W) each."""
        distances = border_distances((right.shape[1], right.shape[2]), self._partition, right.device)
        ranges = torch.bucketize(distances, self._bounds, right=True).expand_as(right)
        counted = counted & (distances != NO_BORDER)
        masks = (right & counted, counted)
        self._counts += torch.stack([count_each(ranges, mask, len(self._bounds)) for mask in masks])

    def compute(self) -> dict[str, float | None] | None:
        """Returns the accuracy in percent by range, over all processes; None without a border in any image.

        A range without pixels has None.
        """
        right, pixels = distributed.all_reduce_sum(self._counts).tolist()
        if not any(pixels):
            return None
        names = [f"{low}-{high - 1}" for low, high in pairwise([0, *self._bounds.tolist()])]
        return {name: 100 * r / n if n else None for name, r, n in zip(names, right, pixels, strict=True)}


def border_distances(size: Size, partition: Size, device: torch.device | None = None) -> Tensor:
    """Returns how many pixels lie between each pixel of an image and the nearest border of two partitions.

    Args:
        size: (H, W) of the image. Its own edges are no borders: there is no other partition behind them.
        partition: (h, w) of a partition.
        device: of the result.

    Returns:
        (H, W) int64, 0 for a pixel that touches a border; `NO_BORDER` everywhere in an image of one partition.
    """
    vertical, horizontal = (_line_distances(*sides, device) for sides in zip(size, partition, strict=True))
    return torch.minimum(vertical[:, None], horizontal)


def _line_distances(side: int, partition: int, device: torch.device | None) -> Tensor:
    """Returns the distances (side,) along one dimension to the lines at multiples of the partition's side."""
    at = torch.arange(side, device=device)
    offset = at % partition
    before = offset.where(at >= partition, NO_BORDER)
    after = (partition - 1 - offset).where(at - offset + partition < side, NO_BORDER)
    return torch.minimum(before, after)
