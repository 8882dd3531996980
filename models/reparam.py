"""Structural re-parameterisation: the kernel algebra of Locality Injection, as pure functions, and its interface.

The functions are differentiable, change no argument but an `out`, and compute in the dtype of the weight that they are
given. Callers fuse in float64 and cast back (`Tensor.double` is differentiable too), so that a conversion rounds once.

Source: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022 (arXiv:2112.11081).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def fold_batch_norm(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Folds the inference form of a BatchNorm into the convolution or fully-connected layer before it.

    Args:
        weight: (O, ...) kernel of the layer, of any number of further dimensions.
        bias: (O,) or None.
        bn: normalises the O outputs. It may have fewer channels, B with O % B == 0: then channel b normalises the
            O / B consecutive outputs b * O / B ..., as it does behind a share-set FC whose outputs are (set, position).

    Returns:
        The weight and bias (O,) of the one layer that equals both, in the dtype of `weight`.

    Raises:
        ValueError: the outputs are not a multiple of the BatchNorm's channels, or it keeps no running statistics.
    """
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("a BatchNorm without running statistics depends on the batch and can't be folded")
    outputs, channels = weight.shape[0], bn.num_features
    if outputs % channels:
        raise ValueError(f"a BatchNorm of {channels} channels can't be folded into a layer of {outputs} outputs")
    mean, variance = bn.running_mean.to(weight.dtype), bn.running_var.to(weight.dtype)
    scale = (variance + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight.to(weight.dtype)
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(weight.dtype)
    scale, shift = (t.repeat_interleave(outputs // channels) for t in (scale, shift))
    fused_weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return fused_weight, shift if bias is None else bias.to(weight.dtype) * scale + shift


def conv_to_fc(
    kernel: Tensor,
    size: tuple[int, int],
    padding: int | tuple[int, int] | None = None,
    dilation: int | tuple[int, int] = 1,
    rows: range | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Returns the fully-connected kernel that equals a convolution on maps of one fixed size (Eq. 12).

    The paper convolves an identity matrix. Here every kernel tap (i, j) is written where it acts: on the diagonal of
    the FC kernel that links output position (y, x) to input position (y + i - kh // 2, x + j - kw // 2).

    Args:
        kernel: (O, I, kh, kw), kh and kw odd; of a grouped convolution, I is the number of channels in one group and
            the result is the kernel of an FC with the same groups.
        size: (h, w) of the maps.
        padding: zeros on each side; None stands for the one that keeps the size, and any other is an error.
        dilation: distance between taps.
        rows: only these consecutive y of the output, to build a large kernel piece by piece; None is all of them.
        out: an FC kernel of the result's shape, contiguous, to which the convolution is added in place.

    Returns:
        (O * len(rows) * w, I * h * w): rows are (output channel, y, x), columns (input channel in the group, y, x).

    Raises:
        ValueError: an even kernel, or a padding that does not keep the size.
    """
    (out_channels, in_channels, *kernel_size), (h, w) = kernel.shape, size
    step_y, step_x = to_2tuple(dilation)
    keeps_size = (step_y * (kernel_size[0] // 2), step_x * (kernel_size[1] // 2))
    if any(k % 2 == 0 for k in kernel_size):
        raise ValueError(f"a convolution with an even kernel {tuple(kernel_size)} has no centre; only odd ones convert")
    if padding is not None and to_2tuple(padding) != keeps_size:
        raise ValueError(
            f"padding {padding} changes the size of the map; kernel {tuple(kernel_size)} needs {keeps_size}"
        )
    rows = range(h) if rows is None else rows
    if out is None:
        out = kernel.new_zeros(out_channels * len(rows) * w, in_channels * h * w)
    fc = out.view(out_channels, len(rows), w, in_channels, h, w)
    for i in range(kernel_size[0]):
        for j in range(kernel_size[1]):
            dy, dx = i * step_y - keeps_size[0], j * step_x - keeps_size[1]
            # (O, rows, w, I, h, w) -> (O, w, I, w, y) -> (O, I, y, x); empty where the tap never meets the map
            diagonal = fc.diagonal(dy + rows.start, 1, 4).diagonal(dx, 1, 3)
            diagonal.add_(kernel[:, :, i, j, None, None])
    return out


def merge_kernels(kernels: Sequence[Tensor]) -> Tensor:
    """Adds odd convolution kernels (O, I, kh, kw) of different sizes, each centred in the largest height and width."""
    height, width = (max(k.shape[d] for k in kernels) for d in (2, 3))
    merged = kernels[0].new_zeros(*kernels[0].shape[:2], height, width)
    for k in kernels:
        vertical, horizontal = (height - k.shape[2]) // 2, (width - k.shape[3]) // 2
        merged = merged + nn.functional.pad(k, (horizontal, horizontal, vertical, vertical))
    return merged


class Reparameterizable(nn.Module, ABC):
    """A block with a training structure that Locality Injection replaces by an equal, smaller one."""

    deploy: bool

    @abstractmethod
    def local_inject(self) -> None:
        """Turns this block, in place, into its deploy structure; does nothing where that is already done."""

    def switch_to_deploy(self) -> None:
        """The name by which MMPretrain, RepVGG and their like call `local_inject`."""
        self.local_inject()

    def reparameterize(self) -> None:
        """The name by which timm calls `local_inject`."""
        self.local_inject()


class ReparameterizableNetwork(nn.Module):
    """A network that injects all its `Reparameterizable` blocks."""

    def locality_injection(self) -> None:
        """Turns every block, in place, into its deploy structure; calling it twice is harmless."""
        for module in self.modules():
            if isinstance(module, Reparameterizable):
                module.local_inject()

    def switch_to_deploy(self) -> None:
        """The name by which MMPretrain, RepVGG and their like call `locality_injection`."""
        self.locality_injection()

    def reparameterize(self) -> None:
        """The name by which timm calls `locality_injection`."""
        self.locality_injection()


def is_reparameterizable(model: nn.Module) -> bool:
    """Says whether Locality Injection has anything left to replace in a network."""
    return any(isinstance(m, Reparameterizable) and not m.deploy for m in model.modules())


def to_deploy(model: nn.Module) -> nn.Module:
    """Returns an injected copy of a network, in evaluation mode; the network itself is left as it is.

    Raises:
        ValueError: it has no blocks that Locality Injection could replace, or they are replaced already.
    """
    if not is_reparameterizable(model):
        raise ValueError(
            f"there is nothing to convert: this {type(model).__name__} has no blocks with local branches, or they are "
            "injected already"
        )
    copy = deepcopy(model).eval()
    for module in copy.modules():
        if isinstance(module, Reparameterizable):
            module.local_inject()
    return copy


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """Returns max |actual - expected| / max |expected| (infinite where anything is not finite)."""
    difference = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    return float(torch.nan_to_num(difference, nan=torch.inf, posinf=torch.inf))


@torch.no_grad()
def injection_error(model: nn.Module, images: Tensor, randomize: bool = False) -> float:
    """Measures what Locality Injection does to a network's answers, all of it in float64.

    Args:
        model: a network in its training structure; a copy of it is examined.
        images: (N, in_chans, H, W).
        randomize: give the copy random BatchNorm statistics first, since fresh ones hide a conversion that drops them.

    Returns:
        The largest relative difference of the logits. It is of the order of 1e-15 where the algebra is right.
    """
    copy = deepcopy(model).double().eval()
    if randomize:
        randomize_statistics(copy)
    return relative_difference(copy(images.double()), to_deploy(copy)(images.double()))


@torch.no_grad()
def randomize_statistics(model: nn.Module, seed: int = 0) -> None:
    """Gives every BatchNorm random running statistics, scale and shift, in place.

    A fresh BatchNorm is the identity, so that a conversion that forgets it would still compare equal.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.3, 0.9),
                (module.bias, -0.2, 0.2),
            ):
                if tensor is not None:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
