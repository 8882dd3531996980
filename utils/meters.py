"""Sums that stay on the device, so that a training step never waits for it."""

import time

import torch
from torch import Tensor

from .distributed import all_reduce_sum, rank


class Mean:
    """A weighted mean of numbers over all processes: sums on the device, reduced and divided once somebody looks."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, value: Tensor, weight: int = 1) -> None:
        """Takes in a scalar that stands for `weight` items; one that is not finite is left out."""
        value = value.detach().to(torch.float64)
        finite = value.isfinite()
        self._sums += torch.stack((value.where(finite, 0.0), finite.to(torch.float64))) * weight

    def compute(self) -> float:
        """Returns the mean (0.0 of nothing); all processes must ask, and it waits for them and for the device."""
        total, count = all_reduce_sum(self._sums.clone()).tolist()
        return total / count if count else 0.0

    def reset(self) -> None:
        """Starts anew."""
        self._sums.zero_()

    def state(self) -> list[float]:
        """Returns the sums over all processes, for a checkpoint; all processes must ask."""
        return all_reduce_sum(self._sums.clone()).tolist()

    def load_state(self, sums: list[float]) -> None:
        """Goes on from `state`; one process takes it up for all."""
        self._sums.copy_(torch.tensor(sums if rank() == 0 else [0.0, 0.0], dtype=torch.float64))


class Stopwatch:
    """Seconds since the last look."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Returns the seconds since the last lap and starts the next one."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return seconds
