"""BatchNorm over the images of all processes."""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradient on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """What torch's SyncBatchNorm does on GPUs alone, for CPUs: two sums over all processes, differentiated through."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...); every process gives the same number of elements."""
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = input.numel() / input.shape[1] * dist.get_world_size()
        mean = _SumOverProcesses.apply(input.sum(dims)) / count
        centred = input - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                momentum = 0.1 if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
                self.num_batches_tracked.add_(1)
        out = centred * (variance + self.eps).rsqrt().view(shape)
        return out * self.weight.view(shape) + self.bias.view(shape)


def synchronise_batch_norms(model: nn.Module) -> nn.Module:
    """Returns the network with every BatchNorm computing over all processes; names and values stay as they are.

    Raises:
        ValueError: on a CPU, a BatchNorm that is not a plain one of two dimensions.
    """
    if next(model.parameters()).device.type != "cpu":
        return convert_sync_batchnorm(model)  # timm's, which knows its norms with an activation within, too
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CpuSyncBatchNorm
        elif isinstance(module, _BatchNorm):
            raise ValueError(f"TRAIN.SYNC_BN on CPUs is for BatchNorm2d only, not for {type(module).__name__}")
    return model
