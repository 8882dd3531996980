"""RepMLPNet in training: the layers of its units, computed with few passes over their maps.

Parameters, running statistics and, but for rounding, outputs and gradients are those of the layers applied one by one.
What differs, and why, is told in `training_ops.py`, which has the operations; here they are given the parameters.

Shapes: N partitions of images, C channels in groups of S share-sets, K = h * w positions.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import NoneType
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .layers import ConvNorm, PointwiseConv, ShareSetConv, ShareSetFC, autocast_dtype, local_branches
from .repmlp_block import FFNBlock, GlobalPerceptron, RepMLPBlock
from .training_ops import center, combine, convolve, feed_forward, homogeneous, normalize, wide

# Where the form gains, by `python -m benchmarks.training_form`. On a CPU: with more positions in all images than this.
# With fewer, its algebra of coefficients takes longer than the passes over the map that it saves.
MANY_ON_CPUS = 2**12
# On a GPU: with at least this many values, unless the network is compiled. The form moves half the bytes but has three
# times the launches, which take the host some 5 ms a unit instead of 2. An estimate: no GPU has shown it.
LARGE_ON_GPUS = 2**22


class UnitLayers(NamedTuple):
    """The layers of a unit: x + drop_path(block(prebn1(x))), then x + drop_path(ffn(prebn2(x)))."""

    prebn1: nn.Module
    block: RepMLPBlock
    prebn2: nn.Module
    ffn: FFNBlock
    drop_path: nn.Module


class BatchStatistics(NamedTuple):
    """Mean and biased variance (channels,) that a BatchNorm has computed from so many `values` of each channel."""

    norm: nn.BatchNorm2d
    mean: Tensor
    var: Tensor
    values: int


def suits(layers: UnitLayers, x: Tensor) -> bool:
    """Returns whether this form computes what the layers do with a map (N, C, H, W), and is worth it.

    It does for ordinary BatchNorms in training mode and for the layers that a network is built with. It does not for
    BatchNorms that are frozen or synchronised, for converted weights, for weights in half precision, nor for layers
    that others have put in, or with hooks.
    """
    return (
        _gains(x)
        and _is_as_built(layers, x)
        and not any(_is_altered(module) for part in layers for module in part.modules())
    )


def _gains(x: Tensor) -> bool:
    """Returns whether this form of a unit is faster for a map (N, C, H, W)."""
    if torch.compiler.is_compiling():
        return True
    return x.numel() >= LARGE_ON_GPUS if x.is_cuda else x.numel() > MANY_ON_CPUS * x.shape[1]


def _is_as_built(layers: UnitLayers, x: Tensor) -> bool:
    """Returns whether the layers are those of a new network, in training mode."""
    block, ffn = layers.block, layers.ffn
    branches = local_branches(block, block.branches)
    if not (
        (type(block), type(ffn), type(ffn.act)) == (RepMLPBlock, FFNBlock, nn.GELU)
        and type(layers.drop_path) in (DropPath, nn.Identity)
        and type(block.gp) in (GlobalPerceptron, NoneType)
        and type(block.fc3) is ShareSetFC
        and block.fc3.bias is None  # which converted weights have
        and block.constraint is None
        and ffn.act.approximate == "none"
        and all(_is_conv_norm(branch, ShareSetConv) for branch in branches)
        and all(_is_conv_norm(layer, PointwiseConv) for layer in (ffn.ffn_fc1, ffn.ffn_fc2))
        and all(p.dtype == wide(x.dtype) for part in layers for p in part.parameters())
    ):
        return False
    norms = [layers.prebn1, layers.prebn2, block.fc3_bn, *(b.bn for b in branches), ffn.ffn_fc1.bn, ffn.ffn_fc2.bn]
    alike = {(norm.momentum, norm.eps) for norm in norms if _is_ordinary(norm, x)}
    return len(alike) == 1 and all(_is_ordinary(norm, x) for norm in norms)


def _is_conv_norm(module: nn.Module, conv: type[nn.Conv2d]) -> bool:
    """Returns whether a module is a convolution of a kind, without bias, and one more layer, its BatchNorm."""
    return type(module) is ConvNorm and len(module) == 2 and type(module.conv) is conv and module.conv.bias is None


def _is_ordinary(norm: nn.Module, x: Tensor) -> TypeGuard[nn.BatchNorm2d]:
    """Returns whether a BatchNorm normalises a map (N, C, H, W) by its own statistics and tracks these."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and x.numel() > x.shape[1]  # one value of a channel has no variance, which is an error
        and norm.affine
        and norm.weight.dtype == wide(x.dtype)
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.running_var is not None
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
        and norm.eps > 0
    )


def _is_altered(module: nn.Module) -> bool:
    """Returns whether calling a module does more than its class says."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(bool, hooks)) or "forward" in vars(module) or _has_any_global_hook()


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Applies a BatchNorm to a map (N, C, H, W), an ordinary one in training with sums over all of a GPU."""
    if not _is_ordinary(norm, x) or _is_altered(norm):
        return cast(Tensor, norm(x))
    x = x.contiguous()
    _, y, _, mean, var = normalize(x.flatten(2), norm.weight, norm.bias, norm.eps)
    _track([BatchStatistics(norm, mean, var, x.numel() // x.shape[1])])
    return y.view(x.shape)


def apply(layers: UnitLayers, x: Tensor) -> Tensor:
    """Applies a unit that `suits`: (N, C, H, W) -> (N, C, H, W), and updates the running statistics."""
    block, dtype = layers.block, autocast_dtype(x)
    with _without_autocast(x.device.type):
        partitions = block._partition(x.to(dtype)).contiguous()
        positions, first = _mix_positions(layers, partitions, _drop_path(layers.drop_path, x))
        gate = _for_partitions(_drop_path(layers.drop_path, x), partitions)
        out, second = _mix_channels(layers, positions, gate)
    _track([*first, *second])
    return block._restore(out.view(partitions.shape), x.shape)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Returns a context without autocast, on any device: there is none on `meta`."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _drop_path(drop_path: nn.Module, x: Tensor) -> Tensor:
    """Draws what drop path multiplies the branch of every image with, (images, 1)."""
    factors: Tensor = drop_path(torch.ones(x.shape[0], 1, 1, 1, dtype=wide(x.dtype), device=x.device))
    return factors.flatten(1)


def _for_partitions(per_image: Tensor, partitions: Tensor) -> Tensor:
    """Repeats what belongs to images (images, ...) for each of their partitions (N, ...)."""
    parts = partitions.shape[0] // per_image.shape[0]
    return per_image if parts == 1 else per_image.repeat_interleave(parts, 0)


def _mix_positions(layers: UnitLayers, x: Tensor, drop_path: Tensor) -> tuple[Tensor, list[BatchStatistics]]:
    """Applies `prebn1` and the RepMLP block, beside the shortcut: (N, C, h, w) -> X, see `combine`."""
    block, norm = layers.block, cast(nn.BatchNorm2d, layers.prebn1)
    (n, c, h, w), sets = x.shape, block.share_sets
    flat, y, rows, mean, var = normalize(x.view(n, c, h * w), norm.weight, norm.bias, norm.eps)
    scale = norm.weight * (var + norm.eps).rsqrt()
    shift = torch.addcmul(norm.bias, mean, scale, value=-1)
    statistics = [BatchStatistics(norm, mean, var, x.numel() // c)]
    gate = _for_partitions(drop_path, x)
    if block.gp is not None:
        image_means = torch.addcmul(shift, rows.view(drop_path.shape[0], -1, c).mean(1), scale)
        gate = gate * _for_partitions(block.gp(image_means[..., None, None]).flatten(1), x)
    gate = gate.expand(n, c)
    factor, offset = torch.ones_like(gate), torch.zeros_like(gate)
    if 1 in block.branches:
        (branch,) = local_branches(block, [1])
        scale_1, shift_1, of_branch = _one_by_one(branch, norm.bias, scale.square() * var, x.numel() // sets)
        statistics.append(of_branch)
        factor = torch.addcmul(factor, gate, scale_1 * scale)
        offset = gate * torch.addcmul(shift_1, scale_1, shift)
    larger = local_branches(block, [k for k in block.branches if k > 1])
    kernels = [b.conv.weight.to(x.dtype).repeat(c // sets, 1, 1, 1) for b in larger]
    fc3 = block.fc3.weight.to(x.dtype).view(sets, h * w, h * w)
    maps = convolve(y.view(n, c, h, w), fc3, kernels)
    norms = [cast(nn.BatchNorm2d, block.fc3_bn), *(b.bn for b in larger)]
    weights, biases = torch.stack([m.weight for m in norms]), torch.stack([m.bias for m in norms])
    positions, means, variances = combine(flat, factor, offset, gate, weights, biases, norm.eps, maps)
    batch = zip(norms, means, variances, strict=True)
    return positions, statistics + [BatchStatistics(*moments, x.numel() // sets) for moments in batch]


def _one_by_one(branch: ConvNorm, mean: Tensor, var: Tensor, values: int) -> tuple[Tensor, Tensor, BatchStatistics]:
    """Returns what the 1x1 branch does to each channel: scale (C,) and shift (C,), and its batch statistics.

    Args:
        branch: multiplies each share-set by a number, and normalises it.
        mean: of the channels of its input, (C,).
        var: their variances, (C,).
        values: of each share-set.
    """
    weight, norm = branch.conv.weight.flatten(), branch.bn
    groups, sets = len(mean) // len(weight), len(weight)
    mean_of_set = mean.view(groups, sets).mean(0)
    var_of_set = var.view(groups, sets).mean(0) + mean.view(groups, sets).var(0, correction=0)
    batch = BatchStatistics(norm, weight * mean_of_set, weight.square() * var_of_set, values)
    scale = weight * norm.weight * (batch.var + norm.eps).rsqrt()
    shift = torch.addcmul(norm.bias, scale, mean_of_set, value=-1)
    return scale.repeat(groups), shift.repeat(groups), batch


def _mix_channels(layers: UnitLayers, positions: Tensor, gate: Tensor) -> tuple[Tensor, list[BatchStatistics]]:
    """Applies `prebn2` and the FFN, beside the shortcut: X -> (N, C, K); gate is (N, 1)."""
    ffn, dtype, norm = layers.ffn, positions.dtype, cast(nn.BatchNorm2d, layers.prebn2)
    norm1, norm2 = ffn.ffn_fc1.bn, ffn.ffn_fc2.bn
    positions, mean, covariance, constant = center(positions, norm.bias)
    var, kernel = covariance.diagonal().clamp_min(0), ffn.ffn_fc1.conv.weight.flatten(1)
    weight = kernel * (norm.weight * (var + norm.eps).rsqrt())
    var1 = ((weight @ covariance) * weight).sum(1).clamp_min(0)
    weight = weight * (norm1.weight * (var1 + norm1.eps).rsqrt()).unsqueeze(1)
    first = homogeneous(weight, torch.addmv(norm1.bias, weight, mean, alpha=-1)).to(dtype)
    second = ffn.ffn_fc2.conv.weight.flatten(1).to(dtype)
    out, mean2, var2 = feed_forward(positions, constant, first, second, norm2.weight, norm2.bias, norm2.eps, gate)
    batch = (norm, mean + constant, var), (norm1, kernel @ norm.bias, var1), (norm2, mean2, var2)
    return out, [BatchStatistics(*s, positions.shape[1]) for s in batch]


@torch.no_grad()
def _track(statistics: Sequence[BatchStatistics]) -> None:
    """Updates the running statistics of BatchNorms, all of one momentum, as each would by itself."""
    norms = [s.norm for s in statistics]
    batch = [s.mean for s in statistics]
    batch += torch._foreach_mul([s.var for s in statistics], [s.values / (s.values - 1) for s in statistics])
    running = [cast(Tensor, norm.running_mean) for norm in norms] + [cast(Tensor, norm.running_var) for norm in norms]
    batch = [b.to(r.dtype) for b, r in zip(batch, running, strict=True)]
    torch._foreach_lerp_(running, batch, cast(float, norms[0].momentum))
    torch._foreach_add_([cast(Tensor, norm.num_batches_tracked) for norm in norms], 1)
