"""What comes together over many updates: sums that stay on the device, which no step waits for, and the pace."""

import math
import time

import torch
from torch import Tensor

from .distributed import all_reduce_sum, gather_objects, rank, world_size


class Mean:
    """A weighted mean of numbers over all processes: sums on the device, reduced and divided once they are read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, value: Tensor, weight: int = 1) -> None:
        """Takes in a scalar that stands for `weight` items; one that is not finite is left out."""
        value = value.detach().to(torch.float64)
        finite = value.isfinite()
        self._sums += torch.stack((value.where(finite, 0.0), finite.to(torch.float64))) * weight

    def compute(self) -> float:
        """Returns the mean (nan of nothing); all processes must ask, and it waits for them and for the device."""
        total, count = all_reduce_sum(self._sums.clone()).tolist()
        return total / count if count else math.nan

    def reset(self) -> None:
        """Starts anew."""
        self._sums.zero_()

    def state(self) -> list[list[float]]:
        """Returns the sums of every process, for a checkpoint; all processes must ask."""
        return gather_objects(self._sums.tolist())

    def load_state(self, sums: list[list[float]] | list[float]) -> None:
        """Continues from `state`, or from the sums over all processes alone, as older checkpoints have them.

        Each process takes up its own; where their number has changed, one takes up those of all.
        """
        rows = torch.tensor(sums or [[0.0, 0.0]], dtype=torch.float64).view(-1, 2)
        if len(rows) != world_size():
            rows = torch.cat((rows.sum(0, keepdim=True), rows.new_zeros(world_size() - 1, 2)))
        self._sums.copy_(rows[rank()])


class Pace:
    """Updates and images, and the seconds that they took: those between `start` and `stop`, and no others."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Stops, and forgets everything."""
        self.updates = self.images = 0
        self._seconds = 0.0
        self._since: float | None = None

    def add(self, images: int) -> None:
        """Takes in an update on so many images of all processes."""
        self.updates += 1
        self.images += images

    def start(self) -> None:
        """Lets the seconds count from now on, unless they do already."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Lets the seconds count no longer. The device must have finished what was counted."""
        if self._since is not None:
            self._seconds, self._since = self._seconds + time.perf_counter() - self._since, None

    @property
    def images_per_second(self) -> float:
        """The rate until `stop`; nan of nothing."""
        return self.images / self._seconds if self._seconds else math.nan

    @property
    def seconds_per_update(self) -> float:
        """The mean until `stop`; nan of nothing."""
        return self._seconds / self.updates if self.updates else math.nan
