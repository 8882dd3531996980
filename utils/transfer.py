"""Copies between the host and a GPU that do not make the host wait, or only once.

A copy runs beside the host only from or to page-locked memory. On a CPU all functions return what they are given.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of each tensor in a buffer


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on the device, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class CopyStream:
    """Copies to the device on a stream of its own, beside what the device computes.

    While the device has work left, the host is ahead of it: a batch that is copied when its turn comes arrives while
    the device computes on the one before it. So none has to be fetched early, and dropped where an epoch is stopped.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensor: Tensor) -> Tensor:
        """Returns a tensor on the device, for the current stream, which waits for it; the host does not."""
        if self._stream is None:
            return tensor.to(self._device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            copied = tensor.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        copied.record_stream(current)  # or its memory would be used again before the current stream is done
        return copied


def to_host(state: Any) -> Any:
    """Copies the tensors of nested containers to the host, and waits for the device once.

    Each keeps its dtype and strides, and has a storage of its own: `torch.save` writes the whole storage of a view.
    Tensors on the CPU are not copied. The device needs no memory for it; torch keeps the page-locked memory of the
    host, rounded up to a power of two, for the next time.
    """
    tensors = [tensor for tensor in _tensors(state) if tensor.is_cuda]
    return _replaced(state, tensors, _host_copies(tensors)) if tensors else state


def _host_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    buffer, offsets = _page_locked(tensors)
    for tensor, offset in zip(tensors, offsets, strict=True):
        _like(tensor, buffer[offset:]).copy_(tensor, non_blocking=True)
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    memory = buffer.numpy()  # each result keeps it alive
    return [
        _like(tensor, torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset))
        if tensor.nbytes
        else torch.empty_like(tensor, device="cpu")
        for tensor, offset in zip(tensors, offsets, strict=True)
    ]


def to_device(state: Any, device: torch.device) -> Any:
    """Copies the tensors of nested containers to the device, without waiting for the copies."""
    tensors = [tensor for tensor in _tensors(state) if tensor.device != device]
    if device.type != "cuda" or not tensors:
        return state
    buffer, offsets = _page_locked(tensors)
    results = []
    for tensor, offset in zip(tensors, offsets, strict=True):
        results.append(_like(tensor, buffer[offset:]).copy_(tensor).to(device, non_blocking=True))
    return _replaced(state, tensors, results)


def _page_locked(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Returns a page-locked buffer, in bytes, that holds these tensors, and where in it each begins."""
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    *offsets, total = accumulate(sizes, initial=0)
    return torch.empty(total, dtype=torch.uint8, pin_memory=torch.cuda.is_available()), offsets


def _like(tensor: Tensor, memory: Tensor) -> Tensor:
    """Returns a view of bytes as a tensor of the same shape, dtype and, if it has no gaps, strides."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return memory[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides)


def _tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def _replaced(state: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Any:
    """Returns new containers, with `results` in the place of `tensors`."""
    by_id = {id(tensor): result for tensor, result in zip(tensors, results, strict=True)}

    def replaced(value: Any) -> Any:
        if isinstance(value, Tensor):
            return by_id.get(id(value), value)
        if isinstance(value, dict):
            new = copy(value)  # of the same type, with the attributes of a state dict
            new.update({key: replaced(inner) for key, inner in value.items()})
            return new
        if isinstance(value, list | tuple):
            return type(value)(replaced(inner) for inner in value)
        return value

    return replaced(state)
