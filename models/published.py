"""The names by which users of the published code and of MMPretrain build networks.

Sources: `repmlpnet.py` of github.com/DingXiaoH/RepMLP, and `get_model` of github.com/open-mmlab/mmpretrain.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .build import create_model, list_models
from .checkpoints import build_from, read_checkpoint
from .reparam import fold_batch_norm
from .repmlpnet import RepMLPNet

PUBLISHED = tuple(f"RepMLPNet-{size}" for size in ("T224", "T256", "B224", "B256", "D256", "L256"))
# MMPretrain's names of architectures.
MMPRETRAIN = {
    "repmlp-base_3rdparty_8xb64_in1k": "RepMLPNet-B224",
    "repmlp-base_3rdparty_8xb64_in1k-256px": "RepMLPNet-B256",
}


def get_RepMLPNet_model(name: str, deploy: bool = False) -> RepMLPNet:
    """Builds one of the published networks with fresh weights.

    Args:
        name: one of `PUBLISHED`.
        deploy: build the deploy structure.

    Raises:
        ValueError: another name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is none of {', '.join(PUBLISHED)}; create_model builds other architectures")
    return cast(RepMLPNet, create_model(name, deploy=deploy))


def create_RepMLPNet_T224(deploy: bool = False) -> RepMLPNet:
    """Builds RepMLPNet-T224."""
    return get_RepMLPNet_model("RepMLPNet-T224", deploy)


def create_RepMLPNet_T256(deploy: bool = False) -> RepMLPNet:
    """Builds RepMLPNet-T256."""
    return get_RepMLPNet_model("RepMLPNet-T256", deploy)


def create_RepMLPNet_B224(deploy: bool = False) -> RepMLPNet:
    """Builds RepMLPNet-B224."""
    return get_RepMLPNet_model("RepMLPNet-B224", deploy)


def create_RepMLPNet_B256(deploy: bool = False) -> RepMLPNet:
    """Builds RepMLPNet-B256."""
    return get_RepMLPNet_model("RepMLPNet-B256", deploy)


def create_RepMLPNet_D256(deploy: bool = False) -> RepMLPNet:
    """Builds RepMLPNet-D256."""
    return get_RepMLPNet_model("RepMLPNet-D256", deploy)


def create_RepMLPNet_L256(deploy: bool = False) -> RepMLPNet:
    """Builds RepMLPNet-L256."""
    return get_RepMLPNet_model("RepMLPNet-L256", deploy)


# The published dictionary of constructors.
model_map = {
    "RepMLPNet-T224": create_RepMLPNet_T224,
    "RepMLPNet-T256": create_RepMLPNet_T256,
    "RepMLPNet-B224": create_RepMLPNet_B224,
    "RepMLPNet-B256": create_RepMLPNet_B256,
    "RepMLPNet-D256": create_RepMLPNet_D256,
    "RepMLPNet-L256": create_RepMLPNet_L256,
}


def fuse_bn(conv_or_fc: nn.Conv2d | nn.Linear, bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the one layer that equals a layer and the BatchNorm after it, see `fold_batch_norm`.

    Unlike the published function, it takes the layer's own bias into account.
    """
    return fold_batch_norm(conv_or_fc.weight, conv_or_fc.bias, bn)


def get_model(
    model_name: str,
    pretrained: bool | str | Path = False,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a network for inference, as MMPretrain's function of that name.

    Args:
        model_name: MMPretrain's name of a RepMLPNet, or one of `list_models()`.
        pretrained: file of the weights, of any form and origin; False for fresh weights.
        device: of the result; None for the CPU.
        **kwargs: of `create_model`; with weights `img_size` and parts of the structure, in place of theirs.

    Returns:
        The network in evaluation mode, in the form and dtype of the weights. Of our own architectures, `backbone` is
        the network itself, and `dataset` the one that the checkpoint names.

    Raises:
        ValueError: an unknown name, `pretrained=True`, or weights that can't be read or do not fit.
    """
    if model_name not in (*MMPRETRAIN, *list_models()):
        raise ValueError(f"unknown model {model_name!r}; known are {', '.join([*MMPRETRAIN, *list_models()])}")
    name = MMPRETRAIN.get(model_name, model_name)
    if pretrained is True:
        raise ValueError(f"nothing is downloaded: give the file of the weights of {name}, pretrained=PATH")
    if pretrained is False:
        network = create_model(name, **kwargs)
    else:
        network = build_from(read_checkpoint(pretrained), name, **kwargs).model
    return network.to(device).eval()
