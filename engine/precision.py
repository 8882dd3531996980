"""The precision of the forward pass: that of the weights, or mixed."""

from contextlib import AbstractContextManager, nullcontext

import torch

# The dtype of autocast by the value of AMP.
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"  # bf16 on a GPU, off on a CPU


def dtype_of(amp: str, device: torch.device) -> torch.dtype | None:
    """Returns the dtype of autocast for a value of AMP; None for no autocast."""
    return PRECISIONS[precision_name(amp, device)]


def precision_name(amp: str, device: torch.device) -> str:
    """Returns the key of `PRECISIONS` that a value of AMP stands for."""
    if amp == AUTO:
        return "bf16" if device.type == "cuda" else "off"
    return amp


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Returns the context of a forward pass: autocast to `dtype`, or none for None."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
