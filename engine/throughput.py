"""How many images a second a network answers."""

import statistics
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Throughput:
    """Median over the timed batches, with the fastest and the slowest."""

    images_per_second: float
    slowest: float
    fastest: float

    def __str__(self) -> str:
        return f"{self.images_per_second:.1f} img/s (slowest {self.slowest:.1f}, fastest {self.fastest:.1f})"


@torch.inference_mode()
def throughput(
    model: nn.Module, images: Tensor, autocast: AbstractContextManager, warmup: int = 3, repeats: int = 10
) -> Throughput:
    """Times forward passes one by one.

    Args:
        model: in evaluation mode, on the device of `images`.
        images: (N, C, H, W).
        autocast: precision of the forward pass.
        warmup: passes that are not timed, for caches, autotuning and compilation.
        repeats: passes that are timed.
    """

    def seconds() -> float:
        start = time.perf_counter()
        with autocast:
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    for _ in range(warmup):
        seconds()
    rates = [len(images) / seconds() for _ in range(repeats)]
    return Throughput(statistics.median(rates), min(rates), max(rates))
