"""Entry points of torch.hub: one for each architecture, and `load_checkpoint` for weights in a file.

torch.hub.load("PATH", "repmlpnet_t224", source="local", num_classes=10)
"""

from timm.models import model_entrypoint
from torch import nn

from models import list_models
from models.build import timm_name
from models.checkpoints import build_from, read_checkpoint

dependencies = ["torch", "timm"]


def load_checkpoint(path: str, arch: str | None = None, ema: bool | None = None) -> nn.Module:
    """Returns the network of a checkpoint with its weights, in evaluation mode and in the form that they have.

    Args:
        path: of the checkpoint.
        arch: the architecture; None takes the one that the file names or that fits.
        ema: whether to take the moving average of the weights; None takes what the metadata say, else the weights.
    """
    return build_from(read_checkpoint(path, ema=ema), arch).model


globals().update({name: model_entrypoint(name) for name in map(timm_name, list_models())})
