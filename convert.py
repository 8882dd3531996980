"""Turns a training checkpoint of any task into a deploy checkpoint by Locality Injection, and verifies it first.

With --insert-bn, the deploy network gets a BatchNorm after every FC3, to be fine-tuned and converted again. Then the
checkpoint may be a converted one already.
"""

if __name__ == "__main__":  # the imports below take seconds
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.task import Task
from models import list_models
from models.build import check_changeable
from models.checkpoints import Network, take_weights
from models.files import write_checkpoint, write_weights
from models.reparam import (
    ALGEBRA_TOLERANCE,
    injection_error,
    input_channels,
    is_reparameterizable,
    relative_difference,
    to_deploy,
)
from tasks import task_of
from tasks.inference import add_checkpoint_options, load_checkpoint
from utils import cli
from utils.files import check_target
from utils.text import printable

IMAGENET = "imagenet"  # for whose images weights without metadata are taken to be
ROUNDING_TOLERANCE = 100  # of the written weights, in units of their dtype's epsilon


def parser() -> cli.Parser:
    """Describes the command line."""
    architectures = cli.listing("architectures", list_models())
    result = cli.Parser(description=__doc__, epilog=architectures, argument_default=None)
    result.add_argument("load", metavar="TRAIN", help="training checkpoint: ours, the published code's, MMPretrain's")
    result.add_argument("save", metavar="DEPLOY", help="where to write; .safetensors is possible too")
    text = "insert a BatchNorm after every FC3 of the deploy network, for fine-tuning; TRAIN may be converted"
    result.add_argument("--insert-bn", action="store_true", default=False, help=text)
    add_checkpoint_options(result)
    text = "write names and tensors alone, as the published convert.py does, without metadata"
    result.add_argument("--plain", action="store_true", default=False, help=text)
    return result


@torch.no_grad()
def verify(model: nn.Module, deploy: nn.Module, image_size: tuple[int, int]) -> float:
    """Compares both networks on random images, and the conversion under random BatchNorm statistics as well.

    Args:
        model: the training structure.
        deploy: the converted network.
        image_size: (height, width).

    Returns:
        The largest relative logit difference, computed in float64.

    Raises:
        ValueError: a difference exceeds `ALGEBRA_TOLERANCE` or `ROUNDING_TOLERANCE`.
    """
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, input_channels(model), *image_size, generator=generator, dtype=torch.float64)
    randomised = injection_error(model, images, randomize=True)
    if not randomised <= ALGEBRA_TOLERANCE:
        raise ValueError(
            f"the conversion is wrong, and nothing was written: with random BatchNorm statistics the logits differ by "
            f"{randomised:.1e}, more than {ALGEBRA_TOLERANCE:.0e}"
        )
    exact, injected = (deepcopy(network).double().eval() for network in (model, deploy))
    difference = relative_difference(exact(images), injected(images))
    tolerance = ROUNDING_TOLERANCE * torch.finfo(weight.dtype).eps
    if not difference <= tolerance:
        raise ValueError(
            f"the deploy weights are not equivalent to the training weights, and nothing was written: the logits "
            f"differ by {difference:.1e}, more than {tolerance:.1e} ({weight.dtype})"
        )
    return difference


def convert(network: Network, insert_bn: bool) -> tuple[nn.Module, float]:
    """Converts a network, and verifies the result.

    Args:
        network: with `insert_bn` in either form.
        insert_bn: put a BatchNorm after every FC3 of the deploy network.

    Returns:
        The converted network and the largest relative difference of its logits.

    Raises:
        ValueError: the network can't be converted, or the result is not equivalent.
    """
    deploy, difference = network.model, 0.0
    if is_reparameterizable(deploy) or not insert_bn:
        deploy = to_deploy(network.model)
        difference = verify(network.model, deploy, network.image_size)
    if not insert_bn:
        return deploy, difference
    inserted: Any = deepcopy(deploy)
    inserted.insert_bn()
    return inserted, max(difference, verify(inserted, deploy, network.image_size))


@torch.no_grad()
def check_plain(target: Path, converted: nn.Module, network: Network, task: type[Task]) -> None:
    """Raises ValueError where weights alone would not make the same network again when they are read."""
    try:
        checkpoint = take_weights(target, {"model": converted.state_dict()}, ema=False)
        if task_of(checkpoint) is not task:
            raise ValueError(f"weights alone do not say that they are of the task {task.name}")
        read = task.network_from(checkpoint, network.arch)
        if read.image_size != network.image_size:
            raise ValueError(f"weights alone say images of {read.image_size}, not {network.image_size}")
        images = torch.ones(1, input_channels(converted), *network.image_size, dtype=next(converted.parameters()).dtype)
        if not torch.equal(read.model(images), converted.eval()(images)):
            raise ValueError("weights alone do not say all of the network's structure")
    except ValueError as error:
        raise ValueError(f"{error}: leave out --plain; nothing was written") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Reads, converts, verifies, writes."""
    args = parser().parse_args(argv)
    source, target = Path(args.load), Path(args.save)
    check_target(target, [source])
    try:
        task, checkpoint, network = load_checkpoint(source, args.arch, args.ema)
        if args.insert_bn:
            check_changeable(network.arch, {"--insert-bn": "insert_bn"})
        elif checkpoint.form == "deploy":
            raise ValueError(f"{source} is converted already: it holds deploy weights")
    except ValueError as error:
        raise ValueError(f"{error}; nothing was written") from error
    converted, difference = convert(network, args.insert_bn)
    if args.plain:
        check_plain(target, converted, network, task)
        write_weights(target, converted.state_dict())
        dataset = checkpoint.meta.get("dataset", IMAGENET)
        if dataset != IMAGENET:
            print(f"without metadata, programs that classify images need --dataset {dataset}")
    else:
        form = "train" if args.insert_bn else "deploy"
        carried = (checkpoint.meta.get(key) for key in ("dataset", "class_names"))
        meta = task.metadata(network.arch, converted, network.image_size, form, *carried)
        write_checkpoint(target, {"model": converted.state_dict(), "meta": meta})
    before, after = (sum(v.numel() for v in m.parameters()) for m in (network.model, converted))
    print(printable(f"{network.arch}: {checkpoint} ({before:,} parameters) -> {target} ({after:,} parameters)"))
    print(f"verified on random images: largest relative logit difference {difference:.1e}")


if __name__ == "__main__":
    cli.run(main)
