"""BatchNorm over the images of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class CpuSyncBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, which knows GPUs only, for CPUs: two sums over all processes, differentiated through."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> (N, C, ...); every process gives the same number of elements."""
        if not self.training or not dist.is_initialized():
            return nn.BatchNorm2d.forward(self, input)
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = input.numel() / input.shape[1] * dist.get_world_size()
        mean = all_reduce(input.sum(dims)) / count
        centred = input - mean.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / count
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
    """Returns the network with every BatchNorm computing over all processes; names and values stay as they are."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = CpuSyncBatchNorm
    return model
