"""The CIFAR-100 networks of the RepMLPNet paper have its parameters and multiply-adds, branch by branch."""

from math import prod
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.layers import ShareSetConv


class Published(NamedTuple):
    """Parameters and multiply-adds in millions, and what each branch adds, in ones; None is not published."""

    params: float
    operations: float
    branch_params: dict[int, int]
    branch_operations: dict[int, int | None]
    counts_statistics: bool


PUBLISHED = {
    "RepMLPNet-C100": Published(8.3, 468, {1: 720, 3: 2_640}, {1: 294_912, 3: 2_654_208}, counts_statistics=False),
    "ResMLP-C100": Published(7.1, 1812, {1: 60, 3: 156}, {1: None, 3: None}, counts_statistics=True),
}


def network(arch: str, branches: list[int]) -> nn.Module:
    with torch.device("meta"):
        return create_model(arch, num_classes=100, branches=branches).eval()


def size(model: nn.Module, statistics: bool) -> int:
    buffers = (value for value in model.buffers() if statistics and value.is_floating_point())
    return sum(value.numel() for value in (*model.parameters(), *buffers))


def branch_operations(model: nn.Module) -> int:
    """Counts every branch as a convolution; in truth one of size 1 is a multiplication, which counters leave out."""
    total = 0

    def count(conv: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        total += output.numel() * prod(conv.kernel_size)

    for module in model.modules():
        if isinstance(module, ShareSetConv):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 32, 32, device="meta"))
    return total


@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_network_without_branches(arch: str) -> None:
    model = network(arch, [])
    assert size(model, statistics=False) / 1e6 == pytest.approx(PUBLISHED[arch].params, abs=0.05)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 32, 32, device="meta"))
    assert counter.get_total_flops() / 2 // 1e6 == PUBLISHED[arch].operations


@pytest.mark.parametrize("arch", PUBLISHED)
@pytest.mark.parametrize("k", [1, 3])
def test_what_a_branch_adds(arch: str, k: int) -> None:
    published = PUBLISHED[arch]
    model, plain = network(arch, [k]), network(arch, [])
    added = size(model, published.counts_statistics) - size(plain, published.counts_statistics)
    assert added == published.branch_params[k]
    assert branch_operations(plain) == 0
    # One multiply-add for each tap, channel and position; every block of ResMLP has 256 channels of 16x16.
    assert branch_operations(model) == (published.branch_operations[k] or 12 * 256 * 16 * 16 * k * k)


@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_counter_sees_the_larger_branch_alike(arch: str) -> None:
    counts = []
    for branches in ([], [3]):
        with FlopCounterMode(display=False) as counter:
            network(arch, branches)(torch.empty(1, 3, 32, 32, device="meta"))
        counts.append(counter.get_total_flops() / 2)
    assert counts[1] - counts[0] == branch_operations(network(arch, [3]))
