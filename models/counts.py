"""Parameters and multiply-adds of a network, in all and by part.

Multiply-adds are those of convolutions and matrix products, as torch's FlopCounterMode counts them. A local branch of
size 1 counts as the convolution that it is, though it is computed as a multiplication. Everything else element by
element is left out: BatchNorm, activations, gates, sums, pooling, resizing.
"""

import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from .layers import ShareSetConv

# What a module belongs to, by its name within the network, whatever holds the network: a stage or another child.
_PLACE = re.compile(r"(?:(?:model|encoder)\.)*((?:stages|layers|embeds)\.\d+|[^.]+)")
# What matters within a stage: parts of the RepMLP blocks of both papers and of ResMLP, by a component of the name.
_KINDS = {
    "local branches": re.compile(r"repconv\d+"),
    "FC3": re.compile(r"fc3|linear_tokens"),
    "Global Perceptron": re.compile(r"gp|avg|fc1_fc2"),
    "FFN": re.compile(r"ffn_block|mlp_channels"),
}
BRANCHES, NORMS, OTHERS = "local branches", "BatchNorm", "other layers"


@dataclass(frozen=True)
class Counts:
    """The size of a network or of a part of it.

    Attributes:
        parameters: trained values.
        statistics: running means and variances of BatchNorms, which some counts include.
        multiply_adds: of one forward pass.
    """

    parameters: int = 0
    statistics: int = 0
    multiply_adds: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.parameters + other.parameters,
            self.statistics + other.statistics,
            self.multiply_adds + other.multiply_adds,
        )


def count(model: nn.Module, shape: tuple[int, ...]) -> Counts:
    """Counts a whole network.

    Args:
        model: on any device, `meta` among them; not changed.
        shape: of the input, (N, in_chans, H, W).
    """
    return sum(count_modules(model, shape).values(), Counts())


def count_parts(model: nn.Module, shape: tuple[int, ...]) -> dict[tuple[str, str], Counts]:
    """Counts a network by (place, kind), in the order of its modules; arguments as of `count`.

    A place is a child of the network by its name, or a stage of several: `conv_embedding`, `stages.2`, `head`. A kind
    is what matters within it: `FC3`, `local branches` (with their BatchNorms), `Global Perceptron`, `FFN`, `BatchNorm`
    (all others), or `other layers`.
    """
    parts: dict[tuple[str, str], Counts] = {}
    for name, counts in count_modules(model, shape).items():
        if counts != Counts():
            place = _PLACE.match(name)
            key = place[1] if place else type(model).__name__, _kind(name, model.get_submodule(name))
            parts[key] = parts.get(key, Counts()) + counts
    return parts


def count_modules(model: nn.Module, shape: tuple[int, ...]) -> dict[str, Counts]:
    """Counts what every module holds and computes itself, without its children; by name, arguments as of `count`."""
    multiply_adds = _multiply_adds(model, shape)
    counted: set[int] = set()

    def size(tensors: list[Tensor]) -> int:
        new = [t for t in tensors if id(t) not in counted]  # a tensor that several modules share counts once
        counted.update(map(id, new))
        return sum(t.numel() for t in new)

    return {
        name: Counts(
            size(list(module.parameters(recurse=False))),
            size([t for t in module.buffers(recurse=False) if t.is_floating_point()])
            if isinstance(module, _BatchNorm)
            else 0,
            multiply_adds[name],
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _kind(name: str, module: nn.Module) -> str:
    found = [kind for kind, part in _KINDS.items() if any(map(part.fullmatch, name.split(".")))]
    if found[:1] != [BRANCHES] and isinstance(module, _BatchNorm):
        return NORMS
    return found[0] if found else OTHERS


def _product_flops(_sum: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    """Returns the FLOPs of a sum (..., m, n) += a (..., m, k) @ b (..., k, n), from the shapes."""
    return 2 * math.prod(a) * b[-1]


# Products into a sum that is there already, which torch's counter does not know.
IN_PLACE = {torch.ops.aten.addmm_: _product_flops, torch.ops.aten.baddbmm_: _product_flops}


@torch.no_grad()
def _multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Returns the multiply-adds that every module computes itself, by name."""
    tensors = [*model.parameters(), *model.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    copy = deepcopy(model, {id(t): _on_meta(t) for t in tensors}).eval()  # without a copy of what they hold
    own = dict.fromkeys((name for name, _ in copy.named_modules(remove_duplicate=False)), 0)

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def add(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            own[name] += output.numel()

        return add

    for name, module in copy.named_modules():
        if isinstance(module, ShareSetConv) and module.kernel_size == (1, 1):
            module.register_forward_hook(watch(name))
    with torch.device("meta"), FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        copy(torch.empty(shape, dtype=dtype))
    by_name: dict[str, int] = {name: sum(flops.values()) // 2 for name, flops in counter.get_flop_counts().items()}

    def total(name: str, module: nn.Module) -> int:
        """Returns what a module computes with its children, and notes what it computes without them."""
        inner = sum(total(f"{name}.{child}", m) for child, m in module.named_children())
        whole: int = by_name.get(name, inner)  # a module that only holds others may never be called itself
        own[name.partition(".")[2]] += whole - inner
        return whole

    total(type(copy).__name__, copy)
    return own


def _on_meta(tensor: Tensor) -> Tensor:
    meta = torch.empty_like(tensor, device="meta")
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
