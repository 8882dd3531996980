"""Peak memory, measured in a process of its own."""

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_fresh_process(function: Callable[..., Any], *args: object) -> Any:
    """Returns function(*args), computed in a new process, where nothing that ran before can hide a peak.

    Args:
        function: at the top of a module.
        *args: plain values.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def extra_peak(run: Callable[[], object], device: str = "cpu") -> int:
    """Runs something once; returns how far memory rose above what was in use before, at its peak, in bytes.

    On the CPU this is resident memory (VmHWM after, less VmRSS before), on a GPU what torch had allocated.
    """
    before = in_use(device)
    run()
    return peak(device) - before


def in_use(device: str = "cpu") -> int:
    """Returns the memory in use, in bytes, after giving back what is free, and starts a new peak from there.

    Raises:
        OSError: this is not Linux.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # only glibc keeps freed memory back, and only it has this
    # Without this right the peak is that of the whole process, which here has done nothing larger before.
    with suppress(PermissionError):
        CLEAR.write_text("5")
    return _status("VmRSS")


def peak(device: str = "cpu") -> int:
    """Returns the highest memory in use since the last `in_use`, in bytes."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(key: str) -> int:
    if not STATUS.exists():
        raise OSError("peak memory is read from /proc/self/status, which only Linux has")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
