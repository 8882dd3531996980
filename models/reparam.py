"""Structural re-parameterisation: the kernel algebra of Locality Injection, as pure functions, and its interface.

The functions are differentiable, change no argument and compute in the dtype of the weight that they are given; callers
fuse in float64 and cast back (`Tensor.double` is differentiable too). `inject_` alone works in place.

Source: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022 (arXiv:2112.11081).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import product

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ALGEBRA_TOLERANCE = 1e-9  # of a conversion in float64, on the relative difference of the logits
# Elements of an FC kernel that Locality Injection scales at a time: few enough to stay in the cache.
PIECE = 2**18


def fold_batch_norm(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Folds the inference form of a BatchNorm into the convolution or fully-connected layer before it.

    Args:
        weight: (O, ...) kernel of the layer, of any number of further dimensions.
        bias: (O,) or None.
        bn: normalises the O outputs. It may have fewer channels, B with O % B == 0: then channel b normalises the
            O / B consecutive outputs b * O / B ..., as it does after a share-set FC whose outputs are (set, position).

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


def absorb_batch_norm(weight: Tensor, bias: Tensor, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Folds the inference form of a BatchNorm into the fully-connected layer after it.

    Args:
        weight: (O, I) kernel of the layer.
        bias: (O,).
        bn: normalises the I inputs. It may have fewer channels, B with I % B == 0: then channel b normalises the I / B
            consecutive inputs b * I / B ..., as it does where the inputs are (channel, position).

    Returns:
        The weight and bias of the one layer that equals both, in the dtype of `weight`.
    """
    channels = bn.num_features
    scale, shift = fold_batch_norm(weight.new_ones(channels), None, bn)
    scale, shift = (t.repeat_interleave(weight.shape[1] // channels) for t in (scale, shift))
    return weight * scale, bias.to(weight.dtype) + weight @ shift


def conv_to_fc(
    kernel: Tensor,
    size: tuple[int, int],
    padding: int | tuple[int, int] | None = None,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    """Returns the fully-connected kernel that equals a convolution on maps of one fixed size (Eq. 12).

    The paper convolves an identity matrix. Here every tap of the kernel is written where it acts.

    Args:
        kernel: (O, I, kh, kw), kh and kw odd; of a grouped convolution, I is the number of channels in one group and
            the result is the kernel of an FC with the same groups.
        size: (h, w) of the maps.
        padding: zeros on each side; None stands for the one that keeps the size, and any other is an error.
        dilation: distance between taps.

    Returns:
        (O * h * w, I * h * w): rows are (output channel, y, x), columns (input channel in the group, y, x).

    Raises:
        ValueError: an even kernel, or a padding that does not keep the size.
    """
    (out_channels, in_channels, *kernel_size), (h, w) = kernel.shape, size
    keeps_size = tuple(d * (k // 2) for d, k in zip(to_2tuple(dilation), kernel_size, strict=True))
    if any(k % 2 == 0 for k in kernel_size):
        raise ValueError(f"a convolution with an even kernel {tuple(kernel_size)} has no centre; only odd ones convert")
    if padding is not None and to_2tuple(padding) != keeps_size:
        raise ValueError(
            f"padding {padding} changes the size of the map; kernel {tuple(kernel_size)} needs {keeps_size}"
        )
    fc = kernel.new_zeros(out_channels * h * w, in_channels * h * w)
    diagonals = tap_diagonals(fc, (kernel_size[0], kernel_size[1]), size, dilation)
    for tap, diagonal in zip(kernel.flatten(2).unbind(2), diagonals, strict=True):
        diagonal.add_(tap[..., None, None])
    return fc


def tap_diagonals(
    fc: Tensor, kernel_size: tuple[int, int], size: tuple[int, int], dilation: int | tuple[int, int] = 1
) -> Iterator[Tensor]:
    """Yields, for each tap of a convolution, the elements of an FC kernel on which it acts.

    Tap (i, j) lies on the diagonal that links output position (y, x) to input position (y + i - kh // 2,
    x + j - kw // 2), within the map. No element belongs to two taps.

    Args:
        fc: (O * h * w, I * h * w) as `conv_to_fc` returns it.
        kernel_size: (kh, kw), odd.
        size: (h, w) of the maps.
        dilation: distance between taps.

    Yields:
        kh * kw views (O, I, ., .) of `fc`, row by row of the kernel; empty for a tap that lies outside of every map.
    """
    h, w = size
    fc = fc.view(-1, h, w, fc.shape[1] // (h * w), h, w)
    offsets = ([d * (i - k // 2) for i in range(k)] for k, d in zip(kernel_size, to_2tuple(dilation), strict=True))
    # (O, h, w, I, h, w) -> (O, w, I, w, y) -> (O, I, y, x)
    for dy, dx in product(*offsets):
        yield fc.diagonal(dy, 1, 4).diagonal(dx, 1, 3)


def inject_(fc: Tensor, scale: Tensor, kernel: Tensor | None, size: tuple[int, int]) -> None:
    """Scales the rows of an FC kernel and adds a convolution, in place and with hardly any additional memory.

    Equals `fc * scale + conv_to_fc(kernel, size)`. The elements on which the convolution acts are computed in float64
    and rounded once; all others are only scaled, a float32 kernel in float32.

    Args:
        fc: (O * h * w, I * h * w), contiguous.
        scale: (O * h * w, 1), float64.
        kernel: (O, I, kh, kw), float64, kh and kw odd; None adds nothing.
        size: (h, w) of the maps.
    """
    taps = []
    if kernel is not None:
        kernel_size = kernel.shape[2], kernel.shape[3]
        diagonals = (tap_diagonals(t, kernel_size, size) for t in (fc, scale.expand_as(fc)))
        taps = [
            (at, at * row_scale + tap[..., None, None])
            for at, row_scale, tap in zip(*diagonals, kernel.flatten(2).unbind(2), strict=True)
        ]
    scale = scale.to(torch.float32 if fc.dtype == torch.float32 else torch.float64)
    rows = max(1, PIECE // fc.shape[1])
    for piece, row_scale in zip(fc.split(rows), scale.split(rows), strict=True):
        piece.mul_(row_scale)
    for at, value in taps:
        at.copy_(value)


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

    def check_structure(self) -> None:
        """Raises ValueError where something stands in the block that `local_inject` would not count."""

    def switch_to_deploy(self) -> None:
        """The name by which MMPretrain, RepVGG and their like call `local_inject`."""
        self.local_inject()

    def reparameterize(self) -> None:
        """The name by which timm calls `local_inject`."""
        self.local_inject()


@contextmanager
def errors_of(name: str, block: nn.Module) -> Iterator[None]:
    """Puts the name of a block within its network before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name or type(block).__name__}: {error}") from error


def check_blocks(model: nn.Module) -> None:
    """Raises ValueError, with the name of the block, where something stands in one that would not be counted."""
    for name, module in model.named_modules():
        if isinstance(module, Reparameterizable):
            with errors_of(name, module):
                module.check_structure()


def inject_blocks(model: nn.Module) -> None:
    """Turns every block of a network, in place, into its deploy structure, after `check_blocks`."""
    check_blocks(model)
    for module in list(model.modules()):
        if isinstance(module, Reparameterizable):
            module.local_inject()


class ReparameterizableNetwork(nn.Module):
    """A network that injects all its `Reparameterizable` blocks.

    Attributes:
        dataset: that the weights were trained on, where their checkpoint says it.
        class_names: of the outputs, or of the first of them, where the checkpoint names them.
        statistics: mean and standard deviation of the pixels of each channel, on a scale of 0 to 1, by which images are
            normalised, where the checkpoint says it; else they are normalised for the data set.
    """

    dataset: str | None = None
    class_names: list[str] | None = None
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def backbone(self) -> nn.Module:
        """The network itself: users of MMPretrain call `model.backbone.switch_to_deploy()`."""
        return self

    def locality_injection(self) -> None:
        """Turns every block, in place, into its deploy structure; calling it twice is harmless.

        Raises:
            ValueError: something stands in a block that would not be counted; no block is changed then.
        """
        inject_blocks(self)

    def switch_to_deploy(self) -> None:
        """The name by which MMPretrain, RepVGG and their like call `locality_injection`."""
        self.locality_injection()

    def reparameterize(self) -> None:
        """The name by which timm calls `locality_injection`."""
        self.locality_injection()


def input_channels(model: nn.Module) -> int:
    """Returns the number of channels of a network's images: those of its first convolution."""
    return next(m for m in model.modules() if isinstance(m, nn.Conv2d)).in_channels


def is_reparameterizable(model: nn.Module) -> bool:
    """Returns whether a network has blocks that Locality Injection can replace."""
    return any(isinstance(m, Reparameterizable) and not m.deploy for m in model.modules())


def to_deploy(model: nn.Module) -> nn.Module:
    """Returns an injected copy of a network, in evaluation mode; the network itself is left as it is.

    Raises:
        ValueError: it has no blocks that Locality Injection could replace, or they are replaced already, or something
            stands in one that would not be counted.
    """
    if not is_reparameterizable(model):
        raise ValueError(
            f"there is nothing to convert: this {type(model).__name__} has no blocks with local branches, or they are "
            "injected already"
        )
    copy = deepcopy(model).eval()
    if isinstance(copy, ReparameterizableNetwork):
        copy.locality_injection()
    else:
        inject_blocks(copy)
    return copy


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    """Returns max |actual - expected| / max |expected|: 0 where they are equal, infinite where one is not finite."""
    return relative((actual.double() - expected.double()).abs().max(), expected.double().abs().max())


def relative(difference: Tensor, scale: Tensor) -> float:
    """Returns difference / scale, both scalars of at least 0: 0 for 0 / 0, infinite where one is not finite."""
    if difference == 0 and scale.isfinite():  # perhaps of zeros
        return 0.0
    return float(torch.nan_to_num(difference / scale, nan=torch.inf, posinf=torch.inf))


@torch.no_grad()
def injection_error(model: nn.Module, images: Tensor, randomize: bool = False) -> float:
    """Measures how much Locality Injection changes the logits of a network, in float64.

    Args:
        model: a network in its training structure; it is left as it is.
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
