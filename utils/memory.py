"""Out of memory on one line: what was asked for, what was in use, and what to lower."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import distributed

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# What torch says where it refuses memory, and where the CUDA libraries do.
_ON_CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes|bad_alloc")
_IN_CUDA = re.compile(r"CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_SIZE = r"([\d.]+ (?:bytes|[KMG]iB))"


class OutOfMemory(OSError):
    """The device, or the machine, has no memory left."""


@contextmanager
def clear_about_memory(remedy: str) -> Iterator[None]:
    """Turns the error of an allocation that failed, on a GPU or on the host, into one of a line that ends in `remedy`.

    With several processes, the line begins with the rank.

    Raises:
        OutOfMemory: such an error; all others pass as they are.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        what = _describe(error)
        if what is None:
            raise
        who = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
        raise OutOfMemory(f"{who}{what}: {remedy}") from error


def _describe(error: RuntimeError | MemoryError) -> str | None:
    """Returns what was asked for and what was in use; None for an error of another kind."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return _describe_gpu(text)
    if _IN_CUDA.search(text):
        return f"the GPU is out of memory ({_IN_CUDA.findall(text)[0]})"
    found = _ON_CPU.search(text)
    if found or isinstance(error, MemoryError):
        asked = f", asked for {readable(int(found[1]))} more" if found and found[1] else ""
        return f"the machine is out of memory: this process uses {readable(_resident())} of {readable(_total())}{asked}"
    return None


def _describe_gpu(text: str) -> str:
    """Returns the figures in the message of torch's allocator, those that its version gives."""

    def figure(pattern: str) -> str | None:
        found = re.search(pattern.replace("SIZE", _SIZE), text)
        return found[1] if found else None

    asked, total, free = figure("Tried to allocate SIZE"), figure("capacity of SIZE"), figure("of which SIZE is free")
    allocated, unused = figure("SIZE is allocated by PyTorch"), figure("SIZE is reserved by PyTorch but unallocated")
    parts = [
        asked and f"asked for {asked} more",
        allocated and f"tensors use {allocated}",
        unused and f"{unused} are reserved but unused",
        total and free and f"{free} of {total} are free",
    ]
    gpu = re.search(r"GPU (\d+)", text)
    line = f"GPU {gpu[1] if gpu else torch.cuda.current_device()} is out of memory: {', '.join(filter(None, parts))}"
    # torch names expandable segments only where they are off.
    if asked and unused and _bytes(unused) >= _bytes(asked) and "expandable_segments:True" in text:
        line += "; what is reserved would do, but is in pieces: set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    return line


def readable(size: float) -> str:
    """Returns bytes in the unit that torch would choose: `7.00 GiB`."""
    unit = next((name for name in ("GiB", "MiB", "KiB") if size >= UNITS[name]), "bytes")
    return f"{size:.0f} bytes" if unit == "bytes" else f"{size / UNITS[unit]:.2f} {unit}"


def _bytes(size: str) -> float:
    number, unit = size.split()
    return float(number) * UNITS[unit]


def _resident() -> int:
    """Returns the memory that this process uses now, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _total() -> int:
    """Returns the memory of the machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
