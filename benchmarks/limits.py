"""The limits of a device: measured here, or those of its maker's data sheet."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from utils.accelerators import Accelerator

# Sides of the square products that are tried. Larger ones are no faster, and take long.
SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes
PRECISIONS = ("fp32", "tf32", "bf16")  # of a data sheet


@dataclass(frozen=True)
class Roofline:
    """What a device can do at most: FLOP/s of matrix multiplication by precision, and bytes/s of its memory.

    Measured, the bandwidth is that of a copy, read and write.
    """

    peak: Mapping[str, float]
    bandwidth: float

    @classmethod
    def measure(
        cls, device: str, dtypes: Mapping[str, torch.dtype], now: Callable[[], float], seconds: float = 0.3
    ) -> "Roofline":
        """Measures a device: the best rate of any product tried, and of copying a block too large for a cache.

        Args:
            device: `cpu` (with the threads that torch is set to) or `cuda`.
            dtypes: which to measure, by name.
            now: the clock.
            seconds: to spend on each product and on the copy.
        """
        peak = {}
        for name, dtype in dtypes.items():
            rates = []
            for side in SIDES[device]:
                a, b, out = (torch.zeros(side, side, dtype=dtype, device=device).normal_() for _ in range(3))
                rates.append(2 * side**3 / _fastest(partial(torch.mm, a, b, out=out), now, seconds))
            peak[name] = max(rates)
        source = torch.ones(COPIED[device] // 4, device=device)
        target = torch.empty_like(source)
        return cls(peak, 2 * COPIED[device] / _fastest(lambda: target.copy_(source), now, seconds))

    @classmethod
    def from_data_sheet(cls, accelerator: Accelerator) -> "Roofline":
        """Returns the limits that the maker of a GPU states."""
        return cls({name: 1e12 * accelerator.peak(name) for name in PRECISIONS}, accelerator.bandwidth)

    def limit(self, flops: float, traffic: float, dtype: str) -> float:
        """Returns the seconds that this work takes at least; `traffic` in bytes."""
        return max(flops / self.peak[dtype], traffic / self.bandwidth)

    def best(self, other: "Roofline") -> "Roofline":
        """Returns the higher limits of two measurements of one device."""
        peak = {dtype: max(value, other.peak[dtype]) for dtype, value in self.peak.items()}
        return Roofline(peak, max(self.bandwidth, other.bandwidth))

    def __str__(self) -> str:
        peaks = ", ".join(f"{value / 1e9:.0f} GFLOP/s {dtype}" for dtype, value in self.peak.items())
        return f"{peaks} (matrix multiplication), {self.bandwidth / 1e9:.1f} GB/s (copy, read + write)"


def _fastest(run: Callable[[], Tensor], now: Callable[[], float], seconds: float) -> float:
    """Returns the shortest seconds of a run, of at least three within about `seconds`."""
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = now()
        run()
        times.append(now() - start)
    return max(min(times), 1e-9)
