"""The layers that the networks have in common, under the names that the published checkpoints give them."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .reparam import Reparameterizable, conv_to_fc, fold_batch_norm, inject_, merge_kernels


class _BatchedLinear(torch.autograd.Function):
    """rows (S, M, I) times kernel (S, O, I) transposed, with a kernel gradient in the layout of the kernel.

    Autograd of `torch.bmm` would return it transposed; to copy it, and under autocast to convert it, with strides that
    miss the cache takes longer than the product for the kernel of a first stage.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        return torch.bmm(rows, kernel.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, kernel = ctx.saved_tensors
        return torch.bmm(grads[0], kernel), torch.bmm(grads[0].transpose(1, 2), rows)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of a matrix product with `x`, under autocast or not."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if enabled and x.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(device)
    return x.dtype


class GroupedFC(nn.Conv2d):
    """A fully-connected layer over the values of maps of one size, with a kernel for each group of C / groups channels.

    Its parameters are those of the published grouped 1x1 convolution over C * h * w channels; the product is one matrix
    multiplication for each group on a strided view of the input, which is many times faster.
    """

    def __init__(self, in_channels: int, out_channels: int, h: int, w: int, groups: int, bias: bool) -> None:
        super().__init__(in_channels * h * w, out_channels * h * w, 1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, h, w) -> (M, O, h, w), the result strided as (groups, M, O / groups * h * w)."""
        m, _, h, w = x.shape
        groups, values, dtype = self.groups, self.in_channels // self.groups, autocast_dtype(x)
        rows = x.reshape(m, groups, values).transpose(0, 1).to(dtype)
        kernel = self.weight.reshape(groups, -1, values).to(dtype)
        if self.bias is None:
            out: Tensor = _BatchedLinear.apply(rows, kernel)
        else:
            out = torch.baddbmm(self.bias.reshape(groups, 1, -1).to(dtype), rows, kernel.transpose(1, 2))
        return out.transpose(0, 1).reshape(m, self.out_channels // (h * w), h, w)

    def merged(self, factor: Tensor, kernel: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Returns the weight, in float64, of the layer whose outputs are scaled and that a convolution is added to.

        Args:
            factor: (O * h * w, 1), float64.
            kernel: (O, I / groups, kh, kw), float64, of the convolution; None adds nothing.
            size: (h, w) of the maps.
        """
        weight = self.weight.flatten(1).double() * factor
        if kernel is not None:
            weight = weight + conv_to_fc(kernel, size)
        return weight.view_as(self.weight)

    def merge_(self, factor: Tensor, kernel: Tensor | None, size: tuple[int, int]) -> None:
        """Makes the weight that of `merged`, in place, with hardly any additional memory."""
        self.weight.data = self.weight.contiguous()
        inject_(self.weight.flatten(1), factor, kernel, size)


class PartitionConv(nn.Conv2d):
    """A convolution of the maps that a `GroupedFC` could take: an FC that shares its kernel among the positions."""

    def __init__(self, channels: int, kernel_size: int, groups: int, bias: bool) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=bias)

    def merged(self, factor: Tensor, kernel: Tensor | None, size: tuple[int, int]) -> Tensor:
        """As that of `GroupedFC`, with a factor (O, 1) and a convolution that is no larger than this one."""
        weight = self.weight.double() * factor[:, :, None, None]
        return weight if kernel is None else merge_kernels([weight, kernel])

    def merge_(self, factor: Tensor, kernel: Tensor | None, size: tuple[int, int]) -> None:
        """Makes the weight that of `merged`, in place."""
        self.weight.copy_(self.merged(factor, kernel, size))


class ShareSetFC(GroupedFC):
    """A fully-connected layer over the h * w positions of a map, one kernel for each of S share-sets."""

    def __init__(self, share_sets: int, h: int, w: int, bias: bool) -> None:
        super().__init__(share_sets, share_sets, h, w, share_sets, bias)


class ShareSetConv(nn.Conv2d):
    """A depth-wise convolution in which channel c of C uses kernel c mod S."""

    def __init__(self, share_sets: int, kernel_size: int) -> None:
        super().__init__(share_sets, share_sets, kernel_size, padding=kernel_size // 2, groups=share_sets, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N * C / S, S, h, w)."""
        c, h, w = x.shape[1:]
        s = self.groups
        if self.kernel_size == (1, 1):
            return x.reshape(-1, s, h, w) * self.weight.reshape(s, 1, 1)
        # One kernel for each channel: many times faster than S groups over N * C / S maps.
        return F.conv2d(x, self.weight.repeat(c // s, 1, 1, 1), padding=self.padding, groups=c).reshape(-1, s, h, w)


class ConvNorm(nn.Sequential):
    """A convolution and its BatchNorm, under the names that the published checkpoints give them."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        if act is not None:
            self.act = act


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of one image (1, C, H, W) as a matrix product, which is faster than a convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, H, W) -> (1, O, H, W)."""
        return torch.mm(self.weight.flatten(1), x.reshape(x.shape[1], -1)).view(1, -1, *x.shape[2:])


def check_kernel_sizes(branches: Sequence[int]) -> None:
    """Raises ValueError where parallel local convolutions of these sizes can't be merged, or would share a name."""
    if any(k % 2 == 0 or k < 1 for k in branches) or len(set(branches)) < len(branches):
        raise ValueError(f"local convolutions need different, odd kernel sizes, not {tuple(branches)}")


def fold_branches(branches: Sequence[ConvNorm]) -> tuple[Tensor, Tensor]:
    """Returns, in float64, the one convolution that equals parallel ones with their BatchNorms.

    Args:
        branches: at least one; convolutions of the same channels with odd kernels.

    Returns:
        The kernel (O, I, kh, kw), of the largest height and width, and the bias (O,).
    """
    folded = [fold_batch_norm(branch.conv.weight.double(), None, branch.bn) for branch in branches]
    kernels, biases = zip(*folded, strict=True)
    return merge_kernels(kernels), torch.stack(biases).sum(0)


class PartitionBlock(Reparameterizable):
    """Base of the RepMLP blocks of both papers: an FC over partitions, `fc3`, and convolutions that merge into it.

    A subclass sets `fc3`, with `fc3_bn` behind it, and gives `add_branches` the convolutions. A convolution may take
    the place of the FC, if none of the others is larger.

    Args:
        h: height of a partition.
        w: width of a partition.
        branches: kernel sizes of the Local Perceptron's convolutions; may be empty.
        deploy: build the structure that `local_inject` leaves.

    Raises:
        ValueError: kernel sizes that are even, or the same twice.
    """

    fc3: GroupedFC | PartitionConv
    fc3_bn: nn.Module

    def __init__(self, h: int, w: int, branches: Sequence[int], deploy: bool) -> None:
        super().__init__()
        check_kernel_sizes(branches)
        self.h, self.w, self.deploy = h, w, deploy
        self.branches = () if deploy else tuple(branches)

    def add_branches(self, conv: Callable[[int], nn.Conv2d]) -> None:
        """Adds a convolution without bias, `conv(kernel_size)`, and its BatchNorm for every branch."""
        for k in self.branches:
            self.add_module(f"repconv{k}", ConvNorm(conv(k)))

    def _local_branches(self) -> list[ConvNorm]:
        return [cast(ConvNorm, self.get_submodule(f"repconv{k}")) for k in self.branches]

    def _partition(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N * H/h * W/w, C, h, w)."""
        n, c, height, width = x.shape
        if (height, width) == (self.h, self.w):
            return x
        if height % self.h or width % self.w:
            raise ValueError(f"a {height}x{width} map can't be divided into {self.h}x{self.w} partitions")
        x = x.reshape(n, c, height // self.h, self.h, width // self.w, self.w)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, self.h, self.w)

    def _restore(self, partitions: Tensor, shape: torch.Size) -> Tensor:
        """Undoes `_partition`, towards a given shape (N, C, H, W)."""
        n, c, height, width = shape
        if (height, width) == (self.h, self.w):
            return partitions
        x = partitions.reshape(n, height // self.h, width // self.w, c, self.h, self.w)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(shape)

    def _terms(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns, in float64, what makes the equal FC: a factor (O*h*w, 1) for FC3, a bias (O*h*w,), a convolution.

        Where FC3 is a convolution, factor and bias have a value for each of its O channels.
        """
        assert isinstance(self.fc3_bn, _BatchNorm)
        ones = torch.ones(self.fc3.out_channels, 1, dtype=torch.float64, device=self.fc3.weight.device)
        factor, bias = fold_batch_norm(ones, None, self.fc3_bn)
        if not self.branches:
            return factor, bias, None
        kernel, shift = fold_branches(self._local_branches())
        return factor, bias + shift.repeat_interleave(len(bias) // len(shift)), kernel

    def get_equivalent_fc3(self) -> tuple[Tensor, Tensor]:
        """Returns the FC that equals FC3, its BatchNorm and all branches: kernel and bias in the shapes of `fc3`'s.

        Fused in float64 and cast back to the parameter's dtype; differentiable, for quantisation-aware training.
        """
        if self.deploy:
            assert self.fc3.bias is not None
            return self.fc3.weight, self.fc3.bias
        factor, bias, kernel = self._terms()
        dtype = self.fc3.weight.dtype
        return self.fc3.merged(factor, kernel, (self.h, self.w)).to(dtype), bias.to(dtype)

    @torch.no_grad()
    def local_inject(self) -> None:
        """Locality Injection, in place; does nothing where it is already done.

        Computes what `get_equivalent_fc3` does, but into the weight itself, with hardly any additional memory.
        A state dict taken before shares the weight: copy it first if it is still needed.
        """
        if self.deploy:
            return
        factor, bias, kernel = self._terms()
        self.fc3.merge_(factor, kernel, (self.h, self.w))
        self.fc3.bias = nn.Parameter(bias.to(self.fc3.weight.dtype), self.fc3.weight.requires_grad)
        self.fc3_bn = nn.Identity().train(self.training)
        for k in self.branches:
            delattr(self, f"repconv{k}")
        self.branches, self.deploy = (), True
