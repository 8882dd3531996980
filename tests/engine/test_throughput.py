"""Images per second: positive, in order, and counted over whole batches."""

from contextlib import nullcontext

import torch
from torch import nn

from engine.throughput import Throughput, throughput


class Counting(nn.Module):
    """Counts its forward passes, and whether any kept a graph for the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.passes, self.graphs = 0, 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        result = self.linear(images)
        self.graphs += result.requires_grad
        return result


def test_the_numbers_are_positive_and_ordered():
    result = throughput(Counting(), torch.ones(8, 4), nullcontext())
    assert 0 < result.slowest <= result.images_per_second <= result.fastest


def test_every_pass_runs_without_a_graph():
    model = Counting()
    throughput(model, torch.ones(8, 4), nullcontext(), warmup=2, repeats=5)
    assert (model.passes, model.graphs) == (7, 0)


def test_throughput_as_text():
    assert str(Throughput(100.25, 90.5, 110.75)) == "100.2 img/s (slowest 90.5, fastest 110.8)"
