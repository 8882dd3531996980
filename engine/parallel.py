"""The network as it is trained: with its loss, and distributed."""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from utils.distributed import RankInfo


class NetworkWithLoss(nn.Module):
    """A network and its criterion as one module, so that the criterion's parameters are synchronised as well."""

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Returns the loss, a scalar, computed in float32 at least.

        Autocast does not ensure that for every criterion; a margin softmax would even cast its parameters to half
        precision.
        """
        outputs = self.network(images)
        with torch.autocast(images.device.type, enabled=False):
            return cast(Tensor, self.criterion(in_float32(outputs), targets))


def in_float32(outputs: Any) -> Any:
    """Returns a tensor, or each of a tuple, in float32 at least."""
    if isinstance(outputs, tuple):
        return tuple(map(in_float32, outputs))
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def wrap(network: nn.Module, criterion: nn.Module, cfg: CfgNode, rank_info: RankInfo) -> nn.Module:
    """Joins a network, compiled or not, and its criterion, both on the device; synchronises gradients."""
    forward = NetworkWithLoss(network, criterion)
    if rank_info.world_size == 1:
        return forward
    with warnings.catch_warnings():
        # torch 2.15 renames broadcast_buffers; the old name is the one that 2.11 knows too.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            forward,
            device_ids=[rank_info.device.index] if rank_info.device.type == "cuda" else None,
            broadcast_buffers=False,  # running statistics are averaged before they are used
            gradient_as_bucket_view=True,
            # A static graph does not allow no_sync().
            static_graph=cfg.TRAIN.ACCUMULATION_STEPS <= 1,
        )
