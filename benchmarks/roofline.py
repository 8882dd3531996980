"""The limits of a machine, measured, and the work of a network, counted."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from models import RepMLPNet
from models.counts import count

# Sides of the square products that are tried. Larger ones are no faster, and take long.
SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes


@dataclass(frozen=True)
class Roofline:
    """What a device can do at most: FLOP/s of matrix multiplication by dtype, and bytes/s of a copy (read + write)."""

    peak: Mapping[str, float]
    bandwidth: float

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


def measure(device: str, dtypes: Mapping[str, torch.dtype], now: Callable[[], float], seconds: float = 0.3) -> Roofline:
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
    return Roofline(peak, 2 * COPIED[device] / _fastest(lambda: target.copy_(source), now, seconds))


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


def count_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns the FLOPs, two for each of the multiply-adds of `models.counts`, in one forward pass.

    Args:
        model: on any device; not changed.
        shape: of the input, (N, 3, H, W).
    """
    return 2 * count(model, shape).multiply_adds


def stage_elements(model: nn.Module, size: tuple[int, int]) -> int:
    """Returns the elements of the maps between the stages for one image of `size`: one map for each resolution.

    Raises:
        ValueError: neither a RepMLPNet nor a timm network that says what its stages are.
    """
    if isinstance(model, RepMLPNet):
        channels, stride = [model.conv_embedding.conv.out_channels], model.conv_embedding.conv.stride[0]
        channels += [cast(nn.Conv2d, embed.conv).out_channels for embed in model.embeds]
        stages = {stride * 2**i: c for i, c in enumerate(channels)}
    elif isinstance(info := getattr(model, "feature_info", None), list):
        stages = {stage["reduction"]: stage["num_chs"] for stage in info}
    else:
        raise ValueError(f"the stages of a {type(model).__name__} are not known")
    return sum(c * (size[0] // reduction) * (size[1] // reduction) for reduction, c in stages.items())


def inference_bytes(model: nn.Module, batch_size: int, size: tuple[int, int], width: int) -> int:
    """Returns the least memory traffic of one forward pass, in bytes.

    The model behind it: every weight is read once, the images are read and the logits written once, and the map of each
    stage is written once and read once. Everything else is assumed to stay in caches, so no real program gets below it.

    Args:
        model: a RepMLPNet, or a timm network.
        batch_size: images.
        size: their height and width.
        width: bytes of an element.
    """
    weights = sum(p.numel() for p in model.parameters())
    classes = int(cast(int, getattr(model, "num_classes", 0)))
    return width * (weights + batch_size * (3 * size[0] * size[1] + 2 * stage_elements(model, size) + classes))


def training_bytes(model: nn.Module, batch_size: int, size: tuple[int, int]) -> int:
    """Returns the least memory traffic of one step with AdamW, in bytes, everything in float32.

    Of each weight: read forward and backward, gradient written and read, two moments read and written, weight written,
    which makes 9. The images are read once, the map of each stage and its gradient are written once and read once.
    """
    weights = sum(p.numel() for p in model.parameters())
    return 4 * (9 * weights + batch_size * (3 * size[0] * size[1] + 4 * stage_elements(model, size)))
