"""Folding of the BatchNorms after the convolutions of any network, as is usual before its speed is measured.

`fusion.py` goes further for the networks that have a fused form: RepMLPNet and RepMLP-ResNet.
"""

from copy import deepcopy
from typing import cast

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .reparam import input_channels, randomize_statistics, relative_difference

# Convolutions that compute with `weight` and `bias` as they are; others may standardize the one or ignore the other.
FOLDABLE = (nn.Conv2d, Conv2dSame)


def fold_verified(model: nn.Module, size: tuple[int, int], tolerance: float = 1e-9) -> nn.Module:
    """Folds the BatchNorms of a network, and verifies in float64, with random statistics, that its outputs stay.

    Args:
        model: in evaluation mode.
        size: (height, width) of its images.
        tolerance: of the largest relative difference.

    Returns:
        The network of `fold_batch_norms`.

    Raises:
        ValueError: the network can't be traced, or its outputs change.
    """
    random = deepcopy(model).double()
    randomize_statistics(random)
    reference = next(random.parameters())
    images = torch.randn(1, input_channels(model), *size, generator=torch.Generator().manual_seed(0)).to(reference)
    with torch.no_grad():
        difference = relative_difference(random(images), fold_batch_norms(random, size)(images))
    if not difference <= tolerance:
        raise ValueError(f"folding the BatchNorms of a {type(model).__name__} changes its outputs by {difference:.1e}")
    return fold_batch_norms(model, size)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Returns a copy in which every BatchNorm that alone reads the results of a convolution is folded into it.

    Which ones these are is seen from a forward pass on the meta device, so the names and the structure of the network
    do not matter, and its code need not be traceable by torch.fx. What a function other than a module reads is not
    seen there: `fold_verified` finds it. Computed in float64 and cast back. A network with nothing to fold is returned
    as it is.

    Args:
        model: in evaluation mode.
        size: (height, width) of its images.

    Raises:
        ValueError: the network does not run on the meta device, where tensors have no values.
    """
    try:
        pairs = _pairs(deepcopy(model).to("meta"), size)
    except RuntimeError as error:
        raise ValueError(f"a {type(model).__name__} can't be traced to fold its BatchNorms: {error}") from error
    if not pairs:
        return model
    copy = deepcopy(model).double()
    for conv_name, norm_name in pairs.items():
        conv, norm = copy.get_submodule(conv_name), copy.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        copy.set_submodule(conv_name, fuse_conv_bn_eval(conv, cast(nn.BatchNorm2d, norm)))
        # timm's BatchNormAct2d holds an activation too.
        rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
        copy.set_submodule(norm_name, nn.Sequential(*rest) if rest else nn.Identity())
    return copy.to(next(model.parameters()).dtype)


def count_batch_norms(model: nn.Module) -> int:
    """Returns how many BatchNorms a network has."""
    return sum(isinstance(m, _BatchNorm) for m in model.modules())


def _pairs(model: nn.Module, size: tuple[int, int]) -> dict[str, str]:
    """Returns, by the name of a convolution, that of the BatchNorm which reads all of its outputs and nothing else."""
    made: list[tuple[Tensor, str]] = []  # holds the outputs, so that each stays an object of its own
    read: list[tuple[str | None, str]] = []  # convolution and BatchNorm, for every run of a BatchNorm

    def watch(name: str, module: nn.Module) -> None:
        if type(module) in FOLDABLE:
            module.register_forward_hook(lambda _m, _i, out: made.append((out, name)))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.register_forward_pre_hook(
                lambda _m, inputs: read.append((next((conv for out, conv in made if out is inputs[0]), None), name))
            )

    for name, module in model.named_modules():
        watch(name, module)
    with torch.no_grad():
        model(torch.empty(1, input_channels(model), *size, device="meta", dtype=next(model.parameters()).dtype))
    runs = [conv for _, conv in made]
    return {
        conv: norm
        for conv, norm in read
        if conv is not None
        and {pair for pair in read if conv in pair or norm in pair} == {(conv, norm)}
        and read.count((conv, norm)) == runs.count(conv)
    }
