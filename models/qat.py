"""Quantization-aware training of re-parameterised blocks: the equivalent kernel is constrained, not the trained ones.

What is deployed is the kernel that Locality Injection makes of FC3, its BatchNorm and the branches. Quantizing these
one by one would not make it representable in 8 bits. So `constrain` lets every block compute with f(equivalent kernel),
and the gradient goes through f and through the algebra of Locality Injection to all that the kernel is made of.

The equivalent kernel is folded from the running statistics of the BatchNorms after FC3 and in the branches. They are
frozen meanwhile, in training mode too, as what is trained is the very function that will be deployed; scale and shift
of these BatchNorms are trained. All other BatchNorms of the network are trained as usual.

A block keeps its parameters under their names, so that a constrained network loads and saves the same state dicts.
`torch.nn.utils.parametrize` would rename them, and computes a tensor from that tensor alone: the equivalent kernel is
made of many. Its parametrizations can serve as f.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from .layers import PartitionBlock
from .locality import LocalityLinear
from .reparam import check_blocks

# Significant bits of a scale. With the 7 of an integer they are fewer than float32's 24, so that products are exact.
SCALE_BITS = 16


def constrain(network: nn.Module, f: Callable[[Tensor], Tensor]) -> int:
    """Makes every block of a network compute with f(equivalent kernel) in place of its kernel, in place.

    `get_equivalent_fc3` and `get_equivalent_linear` still return the kernel without f. Locality Injection applies f
    once more and leaves the result as the kernel of the deploy structure, so that this computes exactly the same.

    Args:
        network: in training or deploy structure, or with inserted BatchNorms; or one block.
        f: maps a kernel (O, ...), one row for each output, to one of the same shape, differentiably: such as a
            `FakeQuantize`. All blocks share it, with its parameters if it is a module that has some; those belong to
            the network then.

    Returns:
        The number of blocks.

    Raises:
        ValueError: there are no blocks, or something stands in one that would not be counted.
    """
    check_blocks(network)
    blocks = list(_blocks(network))
    if not blocks:
        raise ValueError(f"this {type(network).__name__} has no blocks whose equivalent kernel could be constrained")
    _set_constraint(blocks, f)
    return len(blocks)


def release(network: nn.Module) -> None:
    """Undoes `constrain`, in place: every block computes with its own layers again."""
    _set_constraint(_blocks(network), None)


def _set_constraint(
    blocks: Iterable[PartitionBlock | LocalityLinear], constraint: Callable[[Tensor], Tensor] | None
) -> None:
    for block in blocks:
        del block.constraint  # a module can't be replaced by a function
        block.constraint = constraint


def _blocks(network: nn.Module) -> Iterator[PartitionBlock | LocalityLinear]:
    return (module for module in network.modules() if isinstance(module, PartitionBlock | LocalityLinear))


class FakeQuantize(nn.Module):
    """Rounds a kernel to signed integers times a scale; the gradient passes straight through the rounding.

    Symmetric: zero is exact, and the largest magnitude of a row becomes the largest integer. Scales are rounded to
    `SCALE_BITS` bits, so that integer times scale is exact in float32, and quantizing again changes nothing.

    Args:
        bits: of the integers, sign included, 2 to 8.
        per_row: a scale for each output row of the kernel; otherwise one for the whole kernel.

    Raises:
        ValueError: `bits` is out of range.
    """

    def __init__(self, bits: int = 8, per_row: bool = True) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"weights are quantized to 2 to 8 bits, not {bits}")
        self.bits, self.per_row = bits, per_row

    def extra_repr(self) -> str:
        """Shows the arguments."""
        return f"bits={self.bits}, per_row={self.per_row}"

    @property
    def largest(self) -> int:
        """The largest integer; the smallest is its negative."""
        return (1 << self.bits - 1) - 1

    def forward(self, kernel: Tensor) -> Tensor:
        """(O, ...) -> the same shape and dtype."""
        scale = self.scale(kernel)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(kernel, scale, zero, 0, -self.largest, self.largest)

    @torch.no_grad()
    def scale(self, kernel: Tensor) -> Tensor:
        """Returns the scale (O,) of each row of a kernel (O, ...), in float32."""
        magnitude = kernel.abs().flatten(1).amax(1)
        if not self.per_row:
            magnitude = magnitude.amax().expand_as(magnitude)
        mantissa, exponent = torch.frexp(magnitude.double() / self.largest)
        rounded = (mantissa * 2**SCALE_BITS).round() / 2**SCALE_BITS
        scale = torch.ldexp(rounded, exponent).float()
        return scale.where(scale > 0, 1.0)  # of a row of zeros

    @torch.no_grad()
    def quantize(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a kernel (O, ...) as integers of its shape, int8, and the scale (O,) of each row, float32."""
        scale = self.scale(kernel)
        columns = scale.view(-1, *[1] * (kernel.dim() - 1))
        return (self(kernel) / columns).round().to(torch.int8), scale
