"""Entry points of torch.hub: one for each architecture, and `load_checkpoint` for weights in a file.

torch.hub.load("PATH", "repmlpnet_t224", source="local", num_classes=10)
"""

from functools import partial

from torch import nn

from models import create_model, list_models
from models.build import timm_name
from models.checkpoints import build_from, read_checkpoint

dependencies = ["torch", "timm"]


def load_checkpoint(path: str, arch: str | None = None, ema: bool | None = None) -> nn.Module:
    """Returns the network of a checkpoint with its weights, in evaluation mode and in the form that they have.

    `ema` chooses between the weights and their average where the file has both; None goes by what it was chosen by.
    """
    return build_from(read_checkpoint(path, ema=ema), arch).model


globals().update({timm_name(name): partial(create_model, name) for name in list_models()})
