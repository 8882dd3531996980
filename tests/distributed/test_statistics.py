"""The running statistics after an epoch: their mean over all processes, as timm takes it, in one reduction."""

from typing import Any, NamedTuple

import pytest
import torch
from distributed_ranks import in_ranks
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.statistics import RunningStatistics
from utils.distributed import RankInfo


class Found(NamedTuple):
    """Of one process."""

    own: dict[str, Tensor]
    averaged: dict[str, Tensor]
    of_timm: dict[str, Tensor]
    reductions: int


class Reductions(TorchDispatchMode):
    """Counts the reductions over all processes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += str(func) == "c10d.allreduce_.default"
        return func(*args, **(kwargs or {}))


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.named_buffers()}


def averages(process: RankInfo) -> Found:
    """Averages statistics that differ between the processes, in our way and in that of timm."""
    norms = (nn.BatchNorm2d(3), nn.BatchNorm1d(7), nn.BatchNorm2d(2, track_running_stats=False), nn.GroupNorm(1, 2))
    network = nn.Sequential(*norms).double()
    generator = torch.Generator().manual_seed(process.rank)
    for value in network.buffers():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype))
        else:
            value.fill_(process.rank)
    own = buffers(network)
    with Reductions() as reductions:
        RunningStatistics(*network).average()
    averaged = buffers(network)
    for name, value in network.named_buffers():
        value.copy_(own[name])
    if process.world_size > 1:
        distribute_bn(network, process.world_size, reduce=True)
    return Found(own, averaged, buffers(network), reductions.count)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_reduction_gives_the_mean_of_all_processes(world_size):
    ranks = in_ranks(averages, world_size)
    for rank in ranks:
        assert rank.reductions == (world_size > 1)
        for name, value in rank.averaged.items():
            if name.endswith("num_batches_tracked"):
                assert torch.equal(value, rank.own[name])
            else:
                mean = torch.stack([other.own[name] for other in ranks]).mean(0)
                assert torch.equal(value, ranks[0].averaged[name])
                torch.testing.assert_close(value, mean, rtol=1e-15, atol=0)
                torch.testing.assert_close(value, rank.of_timm[name], rtol=1e-15, atol=0)
