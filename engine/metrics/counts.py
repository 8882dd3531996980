"""Counts on the device."""

import torch
from torch import Tensor


def count_each(numbers: Tensor, counted: Tensor, upper: int) -> Tensor:
    """Returns how often each number occurs, (upper,) int64.

    `torch.bincount` would make the host wait for the largest number, and an index by a mask for the size of its result.

    Args:
        numbers: int64, any shape, each 0 to `upper` - 1 where it is counted.
        counted: bool, the same shape, which of them to count.
        upper: of the numbers, exclusive.
    """
    cells = numbers.where(counted, upper).flatten()
    counts = torch.zeros(upper + 1, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, cells, torch.ones_like(cells))[:upper]
