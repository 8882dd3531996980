"""From which size of a map on the training form of a RepMLPNet is faster than its layers: units, forward and backward.

The limits in `models/training_form.py` (`MANY_ON_CPUS`, `LARGE_ON_GPUS`) come from this table.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

import models
from engine.precision import autocast
from models import training_form
from utils import cli

from . import harness
from .harness import DTYPES, Clock, Variant

COLUMNS = (
    ("unit", "name", "s"),
    ("positions", "positions", "d"),
    ("values", "values", "d"),
    ("layers ms", "layers", ".1f"),
    ("form ms", "form", ".1f"),
    ("x", "ratio", ".2f"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.parser(__doc__, rounds=7)
    parser.add_argument("--arch", choices=models.SPECS, default="RepMLPNet-T224", help="the network")
    parser.add_argument("--batch-sizes", type=harness.positive, nargs="+", default=[4, 16, 32], help="images at a time")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="bf16 is that of autocast")
    return parser.parse_args(argv)


def step(unit: nn.Module, x: Tensor, dtype: torch.dtype | None) -> None:
    """Runs a unit forward and backward."""
    with autocast(x.device, dtype):
        out = unit(x)
    out.sum().backward()


def map_sizes(arch: str) -> list[torch.Size]:
    """Returns the (C, H, W) of the maps of each stage."""
    with torch.device("meta"):
        network = cast(models.RepMLPNet, models.create_model(arch))
        image = torch.empty(1, 3, *models.default_image_size(arch))
        maps = cast(list[Tensor], network.forward_intermediates(image, intermediates_only=True))
        return [x.shape[1:] for x in maps]


def units(arch: str, stage: int, device: str) -> dict[str, nn.Module]:
    """Returns the first unit of a stage, layer by layer and in the training form, with the same weights."""
    found = {}
    for name in ("layers", "form"):
        torch.manual_seed(0)
        network = cast(models.RepMLPNet, models.create_model(arch)).to(device).train()
        network.set_training_form(name == "form")
        found[name] = next(network.stages[stage].children())
    return found


def measure(args: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """Times the first unit of each stage in both forms, at every batch size and precision."""
    for stage, size in enumerate(map_sizes(args.arch)):
        both = units(args.arch, stage, args.device)
        for images, dtype in product(args.batch_sizes, args.dtype):
            x = torch.randn(images, *size, device=args.device)
            half = None if dtype == "fp32" else DTYPES[dtype]
            variants = [Variant(name, partial(step, unit, x, half)) for name, unit in both.items()]
            times = harness.interleave(variants, clock, rounds=args.rounds, min_seconds=args.min_seconds)
            yield {
                "name": f"stage {stage + 1}, {size[0]} channels, {images} images, {dtype}",
                "dtype": dtype,
                "positions": x.numel() // size[0],
                "values": x.numel(),
                "seconds": times["form"],
                "ratio": harness.ratio(times["layers"], times["form"]),
                **{name: 1e3 * median(seconds) for name, seconds in times.items()},
            }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    args = parse(argv)
    clock = harness.start(args)
    # The form wherever it computes the same, however small the map.
    training_form.MANY_ON_CPUS, training_form.LARGE_ON_GPUS = 0, 0
    harness.report(args, list(measure(args, clock)), COLUMNS, clock)


if __name__ == "__main__":
    cli.run(main)
