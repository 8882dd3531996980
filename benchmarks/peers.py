"""Networks of timm that a user would pick instead, each as it comes and in its best form."""

from copy import deepcopy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import models
from models.reparam import randomize_statistics

PEERS = (
    "resnet101",
    "resnext101_32x4d",
    "regnetx_064",
    "efficientnet_b1",
    "efficientnet_b2",
    "resmlp_12_224",
    "resmlp_24_224",
    "mixer_b16_224",
)


def peer_forms(name: str) -> dict[str, nn.Module]:
    """Returns a network of timm in its forms: as it comes, BatchNorm folded, and that in channels-last order.

    All in float32 and evaluation mode, with the same random weights and statistics. A network without BatchNorm has no
    folded form.

    Raises:
        ValueError: an unknown name.
    """
    torch.manual_seed(0)
    model = models.create_model(name).eval()
    randomize_statistics(model)
    _wake(model)
    forms = {"as it comes": model}
    folded = fold_batch_norms(model, models.default_image_size(name))
    if folded is not model:
        forms["folded"] = folded
    prefix = "" if folded is model else "folded, "
    forms[f"{prefix}channels-last"] = deepcopy(folded).to(memory_format=torch.channels_last)
    return forms


@torch.no_grad()
def _wake(model: nn.Module) -> None:
    """Randomises the weights that start at nothing or nearly so (heads, layer scales): they would hide differences."""
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            parameter.normal_(std=0.02)


@torch.no_grad()
def fold_batch_norms(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Returns a copy in which every BatchNorm that reads the result of a convolution is folded into it.

    Which ones these are is seen from a forward pass on the meta device, so the names and the structure of the network
    do not matter. Computed in float64 and cast back. A network with nothing to fold is returned as it is.

    Args:
        model: in evaluation mode.
        size: (height, width) of its images.
    """
    pairs = _pairs(deepcopy(model).to("meta"), size)
    if not pairs:
        return model
    copy = deepcopy(model).double()
    for conv_name, norm_name in pairs:
        conv, norm = copy.get_submodule(conv_name), copy.get_submodule(norm_name)
        assert isinstance(conv, nn.Conv2d)
        copy.set_submodule(conv_name, fuse_conv_bn_eval(conv, cast(nn.BatchNorm2d, norm)))
        # timm's BatchNormAct2d holds an activation too.
        rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
        copy.set_submodule(norm_name, nn.Sequential(*rest) if rest else nn.Identity())
    return copy.to(next(model.parameters()).dtype)


def _pairs(model: nn.Module, size: tuple[int, int]) -> list[tuple[str, str]]:
    """Returns (convolution, BatchNorm) by name, wherever one's output is the other's input, on the meta device."""
    made: dict[str, Tensor] = {}
    pairs: list[tuple[str, str]] = []

    def watch(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: made.update({name: out}))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda _m, inputs: pairs.extend((conv, name) for conv, out in made.items() if out is inputs[0])
            )

    for name, module in model.named_modules():
        watch(name, module)
    model(torch.empty(1, 3, *size, device="meta"))
    return pairs
