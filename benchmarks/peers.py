"""Networks of timm that a user would pick instead, each as it comes and in its best form."""

from copy import deepcopy

import torch
from torch import nn

import models
from models.folding import fold_batch_norms
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
    randomize_small_weights(model)
    forms = {"as it comes": model}
    folded = fold_batch_norms(model, models.default_image_size(name))
    if folded is not model:
        forms["folded"] = folded
    prefix = "" if folded is model else "folded, "
    forms[f"{prefix}channels-last"] = deepcopy(folded).to(memory_format=torch.channels_last)
    return forms


@torch.no_grad()
def randomize_small_weights(model: nn.Module) -> None:
    """Randomises weights that start at or near zero (heads, layer scales), in place: they would hide differences."""
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:
            parameter.normal_(std=0.02)
