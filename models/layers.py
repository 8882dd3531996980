"""The layers that the networks have in common, under the names that the published checkpoints give them."""

import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
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


def product_for_onnx(columns: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the product of each of S kernels with its rows of `columns`, as a 1x1 convolution of S groups.

    What an exported ONNX file holds in place of matrix products: tools that quantize take a convolution with a scale
    for each output, but no kernel on the left of a product, nor a batch of kernels.

    Args:
        columns: (S * I, n).
        kernel: (S * O, I).
        bias: (S * O,) or None.

    Returns:
        (S * O, n), contiguous.
    """
    groups = len(columns) // kernel.shape[1]
    return F.conv2d(columns[None, :, :, None], kernel[:, :, None, None], bias, groups=groups).view(len(kernel), -1)


class GroupedFC(nn.Conv2d):
    """A fully-connected layer over the values of maps of one size, with a kernel for each group of C / groups channels.

    Its parameters are those of the published grouped 1x1 convolution over C * h * w channels; the product is one matrix
    multiplication for each group on a strided view of the input, which is many times faster.
    """

    def __init__(self, in_channels: int, out_channels: int, h: int, w: int, groups: int, bias: bool) -> None:
        super().__init__(in_channels * h * w, out_channels * h * w, 1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, h, w) -> (M, O, h, w), the result strided as (groups, M, O / groups * h * w)."""
        return self.apply_kernel(x, self.weight, self.bias)

    def apply_kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Does what `forward` does with another weight and bias, in the shapes of its own."""
        m, _, h, w = x.shape
        if torch.onnx.is_in_onnx_export():
            columns = product_for_onnx(x.flatten(1).t(), weight.flatten(1), bias)
            return columns.t().reshape(m, -1, h, w)
        groups, values, dtype = self.groups, self.in_channels // self.groups, autocast_dtype(x)
        rows = x.reshape(m, groups, values).transpose(0, 1).to(dtype)
        kernel = weight.reshape(groups, -1, values).to(dtype)
        if bias is None:
            out: Tensor = _BatchedLinear.apply(rows, kernel)
        else:
            out = torch.baddbmm(bias.reshape(groups, 1, -1).to(dtype), rows, kernel.transpose(1, 2))
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

    def apply_kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Does what `forward` does with another weight and bias, in the shapes of its own."""
        return F.conv2d(x, weight, bias, padding=self.padding, groups=self.groups)

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
            dtype = autocast_dtype(x)  # as for a convolution: autocast leaves products of two dtypes in the wider one
            return x.reshape(-1, s, h, w).to(dtype) * self.weight.reshape(s, 1, 1).to(dtype)
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
        if torch.onnx.is_in_onnx_export():  # as in `product_for_onnx`
            return super().forward(x)
        return torch.mm(self.weight.flatten(1), x.reshape(x.shape[1], -1)).view(1, -1, *x.shape[2:])


def check_kernel_sizes(branches: Sequence[int]) -> None:
    """Raises ValueError where parallel local convolutions of these sizes can't be merged, or would share a name."""
    if any(k % 2 == 0 or k < 1 for k in branches) or len(set(branches)) < len(branches):
        raise ValueError(f"local convolutions need different, odd kernel sizes, not {tuple(branches)}")


def local_branches(block: nn.Module, kernel_sizes: Sequence[int]) -> list[ConvNorm]:
    """Returns the parallel convolutions of a block with their BatchNorms, in the order of their kernel sizes."""
    return [cast(ConvNorm, block.get_submodule(f"repconv{k}")) for k in kernel_sizes]


def fold_branches(branches: Sequence[ConvNorm]) -> tuple[Tensor, Tensor]:
    """Returns, in float64, the one convolution that equals parallel ones with their BatchNorms.

    Args:
        branches: at least one; convolutions of the same channels with odd kernels.

    Returns:
        The kernel (O, I, kh, kw), of the largest height and width, and the bias (O,).
    """
    folded = [fold_batch_norm(branch.conv.weight.double(), branch.conv.bias, branch.bn) for branch in branches]
    kernels, biases = zip(*folded, strict=True)
    return merge_kernels(kernels), torch.stack(biases).sum(0)


def is_batch_norm(module: nn.Module | None, channels: int) -> bool:
    """Returns whether a module is a BatchNorm of so many channels, and no activation, as timm has it."""
    return isinstance(module, _BatchNorm) and module.num_features == channels and not any(module.children())


def check_own_weight(name: str, layer: nn.Module) -> None:
    """Raises ValueError where the weight of a layer is computed from others: writing to it would change nothing."""
    if "weight" not in dict(layer.named_parameters(recurse=False)):
        raise ValueError(
            f"{name} is {describe_module(layer)}: its weight is no parameter, as under a parametrization. Remove that "
            "first (torch.nn.utils.parametrize.remove_parametrizations), or use `qat.constrain` instead"
        )


def check_branch(name: str, branch: nn.Module, kernel_size: int) -> None:
    """Raises ValueError where a branch is not a convolution of this size, which keeps the map's, and a BatchNorm."""
    layers = dict(branch.named_children())
    conv, bn = layers.get("conv"), layers.get("bn")
    sound = (
        isinstance(branch, ConvNorm)
        and len(layers) == 2
        and isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.padding) == ((kernel_size,) * 2, (kernel_size // 2,) * 2)
        and conv.stride == conv.dilation == (1, 1)
        and is_batch_norm(bn, conv.out_channels)
    )
    if not sound:
        raise ValueError(
            f"{name} is {describe_module(branch)}: a convolution of {kernel_size}x{kernel_size} that keeps the size of "
            "the map, and its BatchNorm, belong there"
        )


def check_layers(block: nn.Module, branches: Sequence[int], others: Collection[str]) -> None:
    """Raises ValueError where a block has something else than these local branches and layers of these names."""
    for k in branches:
        check_branch(f"repconv{k}", block.get_submodule(f"repconv{k}"), k)
    known = {*others, *(f"repconv{k}" for k in branches)}
    for name, module in block.named_children():
        if name not in known:
            raise ValueError(f"{name} is {describe_module(module)}: nothing of that name belongs there")


def describe_module(module: nn.Module | None) -> str:
    """Returns a module in one line, as messages name it."""
    return " ".join(repr(module).split())


class PartitionBlock(Reparameterizable):
    """Base of the RepMLP blocks of both papers: an FC over partitions, `fc3`, and convolutions that merge into it.

    A subclass sets `fc3`, with `fc3_bn` after it, and gives `add_branches` the convolutions. A convolution may take
    the place of the FC, if none of the others is larger.

    Args:
        h: height of a partition.
        w: width of a partition.
        branches: kernel sizes of the Local Perceptron's convolutions; may be empty.
        deploy: build the structure that `local_inject` leaves.

    Attributes:
        constraint: applied to the equivalent kernel in the forward pass; None for none. `qat.constrain` sets
            it.

    Raises:
        ValueError: kernel sizes that are even, or the same twice.
    """

    fc3: GroupedFC | PartitionConv
    fc3_bn: nn.Module
    constraint: Callable[[Tensor], Tensor] | None

    def __init__(self, h: int, w: int, branches: Sequence[int], deploy: bool) -> None:
        super().__init__()
        check_kernel_sizes(branches)
        self.h, self.w = h, w
        self.branches = () if deploy else tuple(branches)
        self.constraint = None

    @property
    def deploy(self) -> bool:  # type: ignore[override]  # follows from the layers, so that none of them is overlooked
        """Whether nothing is left to inject: FC3 has a bias, no BatchNorm, no branches and no constraint."""
        plain = self.fc3.bias is not None and isinstance(self.fc3_bn, nn.Identity)
        return plain and not self.branches and self.constraint is None

    def add_branches(self, conv: Callable[[int], nn.Conv2d]) -> None:
        """Adds a convolution without bias, `conv(kernel_size)`, and its BatchNorm for every branch."""
        for k in self.branches:
            self.add_module(f"repconv{k}", ConvNorm(conv(k)))

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

    @abstractmethod
    def norm_channels(self) -> int:
        """Returns the number of channels of a BatchNorm after FC3."""

    @abstractmethod
    def other_layers(self) -> set[str]:
        """Returns the names of the layers besides FC3, its BatchNorm and the branches.

        Raises:
            ValueError: one of them is of another kind than the block's own.
        """

    def check_structure(self) -> None:
        """Raises ValueError where something stands in the block that Locality Injection would not count."""
        norm, channels = self.fc3_bn, self.norm_channels()
        check_own_weight("fc3", self.fc3)
        if not isinstance(norm, nn.Identity) and not is_batch_norm(norm, channels):
            raise ValueError(
                f"fc3_bn is {describe_module(norm)}: a BatchNorm of {channels} channels, or nothing, belongs there"
            )
        check_layers(self, self.branches, {"fc3", "fc3_bn", "constraint", *self.other_layers()})

    def insert_bn(self) -> None:
        """Puts a BatchNorm after the FC3 of the deploy structure, in place, to be trained; `local_inject` folds it.

        In evaluation mode it is the identity at first; `inserted_bn.calibrate` makes it so in training mode too. Does
        nothing where one has been inserted already.

        Raises:
            ValueError: the block is in its training structure.
        """
        self.check_structure()
        if self.fc3.bias is None or self.branches or self.constraint is not None:
            raise ValueError("a BatchNorm can be inserted into the deploy structure only: convert the network first")
        if not isinstance(self.fc3_bn, nn.Identity):
            return
        norm = nn.BatchNorm2d(self.norm_channels()).to(self.fc3.weight).train(self.training)
        nn.init.constant_(norm.weight, math.sqrt(1 + norm.eps))  # its running variance is 1
        self.fc3_bn = norm

    def _terms(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns, in float64, what makes the equal FC: a factor (O*h*w, 1) for FC3, a bias (O*h*w,), a convolution.

        Where FC3 is a convolution, factor and bias have a value for each of its O channels.
        """
        outputs = self.fc3.out_channels
        factor = torch.ones(outputs, 1, dtype=torch.float64, device=self.fc3.weight.device)
        bias = factor.new_zeros(outputs) if self.fc3.bias is None else self.fc3.bias.double()
        if isinstance(self.fc3_bn, _BatchNorm):
            factor, bias = fold_batch_norm(factor, bias, self.fc3_bn)
        if not self.branches:
            return factor, bias, None
        kernel, shift = fold_branches(local_branches(self, self.branches))
        return factor, bias + shift.repeat_interleave(len(bias) // len(shift)), kernel

    def get_equivalent_fc3(self) -> tuple[Tensor, Tensor]:
        """Returns the FC that equals FC3, its BatchNorm and all branches: kernel and bias in the shapes of `fc3`'s.

        Fused in float64 and cast back to the parameter's dtype; differentiable, for quantization-aware training. A
        `constraint` is not applied.

        Raises:
            ValueError: something else stands in the block, see `check_structure`.
        """
        self.check_structure()
        if self.deploy:
            assert self.fc3.bias is not None
            return self.fc3.weight, self.fc3.bias
        factor, bias, kernel = self._terms()
        dtype = self.fc3.weight.dtype
        return self.fc3.merged(factor, kernel, (self.h, self.w)).to(dtype), bias.to(dtype)

    def _constrained_fc3(self, x: Tensor, constraint: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies the equivalent FC, its kernel constrained: (M, C, h, w) -> (M, O, h, w)."""
        kernel, bias = self.get_equivalent_fc3()
        return self.fc3.apply_kernel(x, constraint(kernel), bias)

    @torch.no_grad()
    def local_inject(self) -> None:
        """Locality Injection, in place; does nothing where it is already done.

        Computes what `get_equivalent_fc3` does, but into the weight itself, with hardly any additional memory. A
        constraint is applied to the kernel, and removed.
        A state dict taken before shares the weight: copy it first if it is still needed.

        Raises:
            ValueError: something else stands in the block, see `check_structure`.
        """
        self.check_structure()
        if self.deploy:
            return
        if self.constraint is not None:  # by the very computation of the forward pass, since rounding may follow
            kernel, bias = self.get_equivalent_fc3()
            self.fc3.weight.data = self.constraint(kernel).contiguous()
        else:
            factor, bias, taps = self._terms()
            self.fc3.merge_(factor, taps, (self.h, self.w))
        self.fc3.bias = nn.Parameter(bias.to(self.fc3.weight.dtype), self.fc3.weight.requires_grad)
        self.fc3_bn = nn.Identity().train(self.training)
        for k in self.branches:
            delattr(self, f"repconv{k}")
        self.branches, self.constraint = (), None
