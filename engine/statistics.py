"""The running statistics of networks as one flat tensor, to copy, restore, gather and average."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.distributed import all_reduce_sum, world_size
from utils.transfer import send


class RunningStatistics:
    """Running means and variances of every BatchNorm of some networks; the tensors themselves, not copies."""

    def __init__(self, *networks: nn.Module) -> None:
        norms = (m for network in networks for m in network.modules() if isinstance(m, _BatchNorm))
        self._tensors = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]

    def read(self) -> Tensor:
        """Returns a copy of all of them, (n,); n is 0 if there are none."""
        return torch.cat([t.reshape(-1) for t in self._tensors]) if self._tensors else torch.empty(0)

    def write(self, flat: Tensor) -> None:
        """Restores the values that `read` returned."""
        if self._tensors:
            pieces = send(flat, self._tensors[0].device).split([t.numel() for t in self._tensors])
            torch._foreach_copy_(self._tensors, [p.view_as(t) for p, t in zip(pieces, self._tensors, strict=True)])

    def average(self) -> None:
        """Replaces them by their means over all processes; a collective operation, one reduction for all."""
        if self._tensors and world_size() > 1:
            self.write(all_reduce_sum(self.read()) / world_size())
