"""The precision of a forward pass: that of the weights, or mixed."""

from contextlib import AbstractContextManager, nullcontext

import torch

# Mixed precision by the words that users have for it.
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"  # bf16 on a GPU, off on a CPU


def resolve_amp(amp: str, device: torch.device) -> str:
    """Returns the key of `PRECISIONS` that a setting, one of these keys or `AUTO`, means on a device."""
    if amp == AUTO:
        return "bf16" if device.type == "cuda" else "off"
    return amp


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Returns the precision of a forward pass: that of the weights for None, else mixed with `dtype`."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
