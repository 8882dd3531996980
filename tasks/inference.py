"""From a checkpoint to a network for inference, the same way for every script."""

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
    """A checkpoint, the task that it is of, and its network in the form that the weights have."""

    task: type[Task]
    checkpoint: Checkpoint
    network: Network


def add_checkpoint_options(parser: ArgumentParser, *, fuse: bool = False) -> None:
    """Adds the options of `load_checkpoint`: `--arch`, `--ema` and `--no-ema`; and `--fuse` where it is asked for."""
    parser.add_argument("-a", "--arch", metavar="ARCH", help="architecture, if the checkpoint does not name it")
    text = "use the averaged weights or not; default: as the checkpoint was selected"
    parser.add_argument("--ema", action=BooleanOptionalAction, default=None, help=text)
    if fuse:
        parser.add_argument("--fuse", action="store_true", default=False, help="fold every BatchNorm, for speed")


def load_checkpoint(path: str | Path, arch: str | None = None, ema: bool | None = None) -> Loaded:
    """Reads a checkpoint of any task and builds its network.

    Args:
        path: the file.
        arch: the architecture; None takes the one that the checkpoint names or that fits.
        ema: whether to take the moving average of the weights; None goes by the checkpoint.

    Raises:
        ValueError: no readable checkpoint, or weights of another network.
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
    """Brings a network into the form in which it answers; the one that is given keeps its own form.

    Args:
        network: in evaluation mode.
        device: where it is to be.
        deploy: convert it by Locality Injection, where there is something to inject.
        fuse: fold every BatchNorm, which includes the conversion.
        dtype: of the weights.

    Raises:
        ValueError: the network has no fused form, or that form is not equivalent.
    """
    network = network.float().to(device)
    if deploy and not fuse and is_reparameterizable(network):
        network = to_deploy(network)
    return (fuse_verified(network) if fuse else network).to(dtype)


def default_device() -> torch.device:
    """Returns a GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
