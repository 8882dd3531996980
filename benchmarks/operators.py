"""What the operators of a program read and write, recorded while it runs, be it on tensors without memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# They return a tensor, but touch no element of one.
_WITHOUT_ACCESS = {
    *("aten._unsafe_view", "aten._reshape_alias"),
    *("aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"),
}
# Sums of products, in which reading and writing can be hidden least.
_PRODUCTS = {
    *(f"aten.{name}{suffix}" for name in ("mm", "addmm", "bmm", "baddbmm") for suffix in ("", "_")),
    *("aten.convolution", "aten.convolution_backward"),
}
BATCH_NORMS = {
    f"aten.{name}"
    for kind in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
    for name in (kind, f"{kind}_backward")
}


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator reads or writes.

    Attributes:
        shape: with every dimension that it is read as.
        elements: that lie in memory; a dimension that `expand` has made adds none.
        dtype: of an element.
        device: the kind of device.
    """

    shape: tuple[int, ...]
    elements: int
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> "Operand":
        """Describes a tensor."""
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride or not size else 1
        return cls(tuple(tensor.shape), elements, tensor.dtype, tensor.device.type)

    @property
    def bytes(self) -> int:
        """The memory that it takes."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Operator:
    """One call of an operator below autograd and autocast: about one kernel on a GPU, unless it `is_free`.

    Attributes:
        name: as `aten.mm`, without the overload.
        reads: its inputs.
        writes: its outputs, and the inputs that it changes in place.
        is_free: it moves no memory: a view, an allocation, a question about a tensor.
    """

    name: str
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]
    is_free: bool

    @property
    def bytes(self) -> int:
        """What it moves: everything it reads and writes, each once, but for a BatchNorm in training."""
        if self.is_free:
            return 0
        # A BatchNorm in training first sums over a map, backward over two, and then reads it again. In evaluation it
        # returns no statistics.
        maps = 2 if self.name.endswith("backward") else 1
        again = maps * self.reads[0].bytes if self.name in BATCH_NORMS and self.writes[1].elements else 0
        return again + sum(operand.bytes for operand in (*self.reads, *self.writes))

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product or a convolution."""
        return self.name in _PRODUCTS


class _Recorder(TorchDispatchMode):
    """Appends every operator that runs to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators.append(_describe(func, args, kwargs or {}, out))
        return out


def record(run: Callable[[], object]) -> list[Operator]:
    """Calls `run()`; returns every operator that ran, in order, those of the backward pass on a CPU among them.

    `without_memory`, or on `meta`, nothing is computed.
    """
    with _Recorder() as recorder:
        run()
    return recorder.operators


@contextmanager
def without_memory() -> Iterator[None]:
    """Within, a new tensor has shape, dtype and device, but no values: any batch fits, and takes a second or two.

    Autocast works, unlike on `meta`, and tensors of two devices do not mix. On devices that are not there, too, but for
    the backward pass. Networks are made on `meta`, outside, and get a device within by `to_empty`.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def total_bytes(operators: Iterable[Operator]) -> int:
    """Returns what operators move, in bytes, if each reads its inputs from memory and writes its outputs to it."""
    return sum(operator.bytes for operator in operators)


def product_bytes(operators: Iterable[Operator]) -> int:
    """Returns what matrix products and convolutions move, in bytes: all that is left if the rest is fused into them."""
    return sum(operator.bytes for operator in operators if operator.is_product)


def _describe(func: OpOverload, args: tuple, kwargs: Mapping[str, Any], out: object) -> Operator:
    arguments = func._schema.arguments
    given = dict(zip([argument.name for argument in arguments], args, strict=False)) | dict(kwargs)
    reads = _tensors([given.get(argument.name) for argument in arguments if not argument.is_out])
    changed = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    writes = _tensors(out)
    # In-place operators on lists return nothing.
    returned = {id(tensor) for tensor in writes}
    writes += [tensor for tensor in _tensors([given.get(name) for name in changed]) if id(tensor) not in returned]
    name = str(func.overloadpacket)
    is_free = not writes or func.is_view or name in _WITHOUT_ACCESS
    return Operator(name, tuple(map(Operand.of, reads)), tuple(map(Operand.of, writes)), is_free)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
