"""BatchNorm over the images of all processes."""

from typing import Any, cast

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce of a tensor, and of its gradient in the backward pass."""

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


class _CpuSyncBatchNorm(_BatchNorm):
    """SyncBatchNorm for CPUs, which torch has for GPUs only: two differentiable sums over all processes."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape and dtype; N may differ between processes.

        Raises:
            ValueError: all processes together have fewer than two values per channel.
        """
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        # Half precision is summed in float32, as in torch's BatchNorm.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        others = [dim for dim in range(x.dim()) if dim != 1]
        per_channel = [-1 if dim == 1 else 1 for dim in range(x.dim())]
        sums = _over_processes(torch.cat((x.sum(others), x.new_tensor([x.numel() / x.shape[1]]))))
        count = sums[-1].detach()
        if count < 2:
            raise ValueError(f"BatchNorm in training needs more than one value per channel, not {int(count)}")
        mean = sums[:-1] / count
        centred = x - mean.view(per_channel)
        variance = _over_processes(centred.square().sum(others)) / count
        self._track(mean, variance * (count / (count - 1)))
        out = centred * (variance + self.eps).rsqrt().view(per_channel)
        if self.affine:
            out = out * self.weight.view(per_channel) + self.bias.view(per_channel)
        return out.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Updates the running statistics, if there are any, by a batch's mean and unbiased variance (C,)."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class CpuSyncBatchNorm1d(_CpuSyncBatchNorm, nn.BatchNorm1d):
    """Over vectors (N, C) and sequences (N, C, L)."""


class CpuSyncBatchNorm2d(_CpuSyncBatchNorm, nn.BatchNorm2d):
    """Over maps (N, C, H, W)."""


ON_CPUS: dict[type[nn.Module], type[_CpuSyncBatchNorm]] = {
    nn.BatchNorm1d: CpuSyncBatchNorm1d,
    nn.BatchNorm2d: CpuSyncBatchNorm2d,
}


def _over_processes(tensor: Tensor) -> Tensor:
    return cast(Tensor, _SumOverProcesses.apply(tensor))


def synchronise_batch_norms(model: nn.Module) -> nn.Module:
    """Returns the network with every BatchNorm synchronised over all processes, under its old name and values.

    Raises:
        ValueError: on a CPU, a BatchNorm that is not in `ON_CPUS`.
    """
    if next(model.parameters()).device.type != "cpu":
        return convert_sync_batchnorm(model)  # timm's also converts BatchNormAct2d
    for module in model.modules():
        if type(module) in ON_CPUS:
            module.__class__ = ON_CPUS[type(module)]
        elif isinstance(module, _BatchNorm):
            known = " and ".join(kind.__name__ for kind in ON_CPUS)
            raise ValueError(f"TRAIN.SYNC_BN on CPUs is for {known}, not for {type(module).__name__}")
    return model
