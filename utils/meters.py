"""Meters over many updates: means whose sums stay on the device, and throughput."""

import math
import time

import torch
from torch import Tensor

from .distributed import all_reduce_sum, gather_objects, rank, world_size
from .transfer import send


class Mean:
    """A weighted mean over all processes: sums on the device, reduced and divided when they are read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, value: Tensor, weight: int = 1) -> None:
        """Adds a scalar that is the mean of `weight` items; a non-finite one is skipped."""
        value = value.detach().to(torch.float64)
        finite = value.isfinite()
        self._sums += torch.stack((value.where(finite, 0.0), finite.to(torch.float64))) * weight

    def compute(self) -> float:
        """Returns the mean (nan if empty); a collective operation, which waits for the device."""
        total, count = all_reduce_sum(self._sums.clone()).tolist()
        return total / count if count else math.nan

    def reset(self) -> None:
        """Clears the sums."""
        self._sums.zero_()

    def state(self) -> list[list[float]]:
        """Returns the sums of every process, for a checkpoint; a collective operation."""
        return gather_objects(self._sums.tolist())

    def load_state(self, sums: list[list[float]] | list[float]) -> None:
        """Restores `state`, or the sums over all processes, which older checkpoints hold instead.

        Each process restores its own sums; if the number of processes has changed, rank 0 restores those of all.
        """
        rows = torch.tensor(sums or [[0.0, 0.0]], dtype=torch.float64).view(-1, 2)
        if len(rows) != world_size():
            rows = torch.cat((rows.sum(0, keepdim=True), rows.new_zeros(world_size() - 1, 2)))
        self._sums = send(rows[rank()], self._sums.device)


class Pace:
    """Counts updates and images, the seconds between `start` and `stop`, and those of them spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Stops and clears all counts."""
        self.updates = self.images = 0
        self._seconds = self._waited = 0.0
        self._since: float | None = None

    def add(self, images: int) -> None:
        """Counts an update on this number of images over all processes."""
        self.updates += 1
        self.images += images

    def wait(self, seconds: float) -> None:
        """Counts seconds in which the loop waited for data; the clock runs meanwhile."""
        self._waited += seconds

    def start(self) -> None:
        """Starts the clock, unless it runs already."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock. The device must have finished the counted updates."""
        if self._since is not None:
            self._seconds, self._since = self._seconds + time.perf_counter() - self._since, None

    @property
    def images_per_second(self) -> float:
        """The rate until `stop`; nan if empty."""
        return self.images / self._seconds if self._seconds else math.nan

    @property
    def seconds_per_update(self) -> float:
        """The mean until `stop`; nan if empty."""
        return self._seconds / self.updates if self.updates else math.nan

    @property
    def waiting_per_update(self) -> float:
        """The mean seconds of waiting for data; nan if empty."""
        return self._waited / self.updates if self.updates else math.nan

    @property
    def waiting_share(self) -> float:
        """The part of the time until `stop` that was spent waiting for data, 0 to 1; nan if empty."""
        return self._waited / self._seconds if self._seconds else math.nan
