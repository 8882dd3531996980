"""Networks for inference from checkpoints, for every script."""

from argparse import ArgumentParser, BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from engine.task import Task
from models.checkpoints import Checkpoint, Network, read_checkpoint
from models.fusion import fuse_verified
from models.reparam import is_reparameterizable, to_deploy

from . import task_of


class Loaded(NamedTuple):
    """A checkpoint, its task, and its network in the form of the weights."""

    task: type[Task]
    checkpoint: Checkpoint
    network: Network


def add_checkpoint_options(parser: ArgumentParser, *, fuse: bool = False) -> None:
    """Adds the options of `load_checkpoint`, and on request `--fuse`."""
    parser.add_argument("-a", "--arch", metavar="ARCH", help="architecture, if the checkpoint does not name it")
    text = "use the averaged weights or not; default: as the checkpoint was selected"
    parser.add_argument("--ema", action=BooleanOptionalAction, default=None, help=text)
    if fuse:
        parser.add_argument("--fuse", action="store_true", default=False, help="fold every BatchNorm, for speed")


def load_checkpoint(path: str | Path, arch: str | None = None, ema: bool | None = None) -> Loaded:
    """Reads a checkpoint of any task and builds its network.

    Args:
        path: the file.
        arch: the architecture; None for that of the metadata, or the one that fits.
        ema: whether to use the averaged weights; None for those that selected the checkpoint.

    Raises:
        ValueError: the file can't be read, or the weights do not fit.
    """
    checkpoint = read_checkpoint(path, ema=ema)
    task = task_of(checkpoint)
    return Loaded(task, checkpoint, task.network_from(checkpoint, arch))


def prepare(
    network: nn.Module,
    device: torch.device,
    *,
    deploy: bool = False,
    fuse: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Returns a network for inference; the given one keeps its form.

    Args:
        network: in evaluation mode.
        device: of the result.
        deploy: convert it by Locality Injection if it is re-parameterizable.
        fuse: fold every BatchNorm; includes the conversion.
        dtype: of the weights.

    Raises:
        ValueError: the network can't be fused, or the fused form is not equivalent.
    """
    network = network.float().to(device)
    if deploy and not fuse and is_reparameterizable(network):
        network = to_deploy(network)
    return (fuse_verified(network) if fuse else network).to(dtype)


def default_device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
