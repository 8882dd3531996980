"""What a training makes of its machine: speed, waiting for data, TFLOP/s, share of the peak, memory."""

import logging
import resource
from dataclasses import dataclass

import torch
from torch import nn

from models.counts import count
from utils import accelerators
from utils.distributed import RankInfo
from utils.meters import Pace

from .run import Run

MIB = 2**20
# Forward, gradients of the inputs, gradients of the weights: each as many operations.
PASSES = 3


@dataclass(frozen=True)
class Workload:
    """What an image costs and what the device of a process can do; None for what is not known.

    Attributes:
        flops: floating point operations of one image in training.
        peak: TFLOP/s of the device in the precision of the training.
    """

    flops: float | None = None
    peak: float | None = None


@dataclass(frozen=True)
class Usage:
    """The figures of a report; `str()` is the end of its log line. What is not known is None, or nan.

    Attributes:
        images_per_second: over all processes.
        data_seconds: that this process waited for its batches, in each update.
        data_share: the same as a part of its time, 0 to 1.
        tflops: TFLOP/s of this process.
        peak_share: the same as a part of the peak, 0 to 1.
        memory: peak in MiB: of tensors on the GPU, or of this process on a CPU.
        reserved: peak in MiB of what torch's allocator has taken from the GPU.
    """

    images_per_second: float
    data_seconds: float
    data_share: float
    tflops: float | None
    peak_share: float | None
    memory: float
    reserved: float | None

    def as_dict(self) -> dict[str, float]:
        """Returns the figures that are known, by the name of their curve."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        parts = [
            f"{self.images_per_second:.1f} img/s",
            f"data {self.data_seconds:.3f} s ({100 * self.data_share:.0f} %)",
        ]
        if self.tflops is not None:
            share = f" ({100 * self.peak_share:.1f} % of the peak)" if self.peak_share is not None else ""
            parts.append(f"{self.tflops:.3g} TFLOP/s{share}")
        reserved = f" ({self.reserved:.0f} reserved)" if self.reserved is not None else ""
        return "  ".join([*parts, f"mem {self.memory:.0f} MiB{reserved}"])


def usage(pace: Pace, workload: Workload, rank_info: RankInfo) -> Usage:
    """Returns the figures since the reset of a stopped pace; those of memory since the start of the process."""
    device, tflops, share = rank_info.device, None, None
    if workload.flops is not None:
        tflops = workload.flops * pace.images_per_second / rank_info.world_size / 1e12
        share = tflops / workload.peak if workload.peak else None
    cuda = device.type == "cuda"
    memory = (
        torch.cuda.max_memory_allocated(device) if cuda else 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return Usage(
        images_per_second=pace.images_per_second,
        data_seconds=pace.waiting_per_update,
        data_share=pace.waiting_share,
        tflops=tflops,
        peak_share=share,
        memory=memory / MIB,
        reserved=torch.cuda.max_memory_reserved(device) / MIB if cuda else None,
    )


def workload_of(run: Run, network: nn.Module, logger: logging.Logger) -> Workload:
    """Counts the work of a training image, and looks the peak of the device up; logs both.

    The work is that of `models.counts`, two operations for each multiply-add of convolutions and matrix products in one
    forward pass of the network in evaluation, times `PASSES`. What gradient checkpointing computes again is not
    counted, nor are the loss, a teacher, and a head that is for training alone.
    """
    size, channels = run.task.train_size, run.task.channels
    try:
        flops = PASSES * 2.0 * count(network, (1, channels, *size)).multiply_adds
    except (RuntimeError, TypeError, ValueError) as error:  # of an operator that meta does not have
        reason = str(error).split("\n")[0]
        logger.info(f"the work of {run.task.arch} can't be counted, the log has no TFLOP/s: {reason}")
        return Workload()
    peak, source = _peak(run)
    known = f"; peak of {source}: {peak:g} TFLOP/s" if peak else ""
    logger.info(f"{flops / 1e9:.2f} GFLOP for an image of {size[0]}x{size[1]}, forward and backward{known}")
    return Workload(flops, peak or None)


def _peak(run: Run) -> tuple[float, str]:
    """Returns the peak of the device in TFLOP/s, 0 if it is not known, and where it is from."""
    if run.cfg.PEAK_TFLOPS:
        return run.cfg.PEAK_TFLOPS, "PEAK_TFLOPS"
    if run.rank_info.device.type != "cuda":
        return 0.0, ""
    name, precision = torch.cuda.get_device_name(run.rank_info.device), precision_of_products(run.dtype)
    row = accelerators.find(name)
    return (row.peak(precision), f"{name} in {precision}") if row else (0.0, "")


def precision_of_products(dtype: torch.dtype | None) -> str:
    """Returns in which precision a GPU multiplies matrices, as in `Accelerator`; `dtype` is that of autocast."""
    if dtype is not None:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
