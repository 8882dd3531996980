"""A BatchNorm after every FC3 of a converted network: inserted, trained with it, and folded by Locality Injection.

The published README recommends it after the quantization of a converted network, to fine-tune what was lost. As in
training from scratch, a BatchNorm lets the scale of every output be learned apart from the kernel.

In evaluation mode a new BatchNorm is the identity. In training mode it would normalise what a trained network does not
expect to be normalised. `calibrate` sets its statistics to those of FC3's outputs, and its scale and shift to undo
them, as the authors' tool for RepVGG does: then it is the identity in both modes, up to the difference between a batch
and all images.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .layers import PartitionBlock
from .reparam import errors_of


def insert_into_blocks(model: nn.Module) -> None:
    """Puts a BatchNorm after the FC3 of every block of a converted network, see `PartitionBlock.insert_bn`.

    Raises:
        ValueError: there are no such blocks, or one is in its training structure, or something else stands in it; the
            message names it.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, PartitionBlock)}
    if not blocks:
        raise ValueError(f"this {type(model).__name__} has no FC3 to insert a BatchNorm after")
    for name, block in blocks.items():
        with errors_of(name, block):
            block.insert_bn()


def inserted_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the BatchNorms after the FC3 of converted blocks."""
    blocks = (m for m in model.modules() if isinstance(m, PartitionBlock) and m.fc3.bias is not None)
    return [block.fc3_bn for block in blocks if isinstance(block.fc3_bn, _BatchNorm)]


@torch.no_grad()
def calibrate(
    model: nn.Module, images: Iterable[Tensor], reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> None:
    """Sets the statistics of the inserted BatchNorms to those of FC3's outputs, and scale and shift to undo the change.

    What the network computes in evaluation mode stays the same. The outputs are those in evaluation mode, and their
    statistics are over all images and positions, the variance without Bessel's correction, as a batch is normalised.

    Args:
        model: converted, with inserted BatchNorms; its mode is kept.
        images: batches (N, in_chans, H, W).
        reduce: sums a float64 tensor over the processes, each of which has its own images.

    Raises:
        ValueError: there are no inserted BatchNorms, or no images, or an output is not finite.
    """
    norms = inserted_norms(model)
    if not norms:
        raise ValueError(f"this {type(model).__name__} has no inserted BatchNorm to calibrate: call insert_bn() first")
    training = {module: module.training for module in model.modules()}
    with _summed_inputs(norms) as sums:
        model.eval()
        for batch in images:
            model(batch)
    for module, mode in training.items():
        module.training = mode
    totals = reduce(torch.cat([s.flatten() for s in sums])).split([s.numel() for s in sums])
    for norm, total in zip(norms, totals, strict=True):
        count, first, second = total.view(3, -1)
        if not (count > 0).all() or not total.isfinite().all():
            raise ValueError("the inserted BatchNorms can't be calibrated: there are no images, or outputs not finite")
        mean = first / count
        _set_statistics(norm, mean, (second / count - mean.square()).clamp_min(0))


@contextmanager
def _summed_inputs(norms: list[_BatchNorm]) -> Iterator[list[Tensor]]:
    """Yields, for each BatchNorm, the count, sum and sum of squares (3, C) of what it is given within the context."""
    sums = [torch.zeros(3, n.num_features, dtype=torch.float64, device=n.weight.device) for n in norms]

    def hook(total: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            values = inputs[0].double().transpose(0, 1).flatten(1)
            total.add_(torch.stack((torch.ones_like(values).sum(1), values.sum(1), values.square().sum(1))))

        return add

    handles = [norm.register_forward_pre_hook(hook(total)) for norm, total in zip(norms, sums, strict=True)]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _set_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Replaces the running statistics (C,) of a BatchNorm, and its scale and shift so that it computes the same."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.bias.copy_(shift + scale * mean)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
