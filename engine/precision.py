"""The precision of the forward pass: that of the weights, or mixed."""

from contextlib import AbstractContextManager, nullcontext

import torch

# The dtype of autocast by the value of AMP.
PRECISIONS = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
AUTO = "auto"  # bf16 on a GPU, off on a CPU


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Returns the context of a forward pass: autocast to `dtype`, or none for None."""
    return torch.autocast(device.type, dtype) if dtype is not None else nullcontext()
