"""The paper's comparison on ImageNet in one run on one device: speed, size and published figures of every network.

RepMLPNets are timed in their deploy structure and fused (`models/fusion.py`), the others as timm has them, with the
BatchNorms after convolutions folded, as in the paper, which measured batches of 128 on an RTX 2080 Ti. Segmentation
networks are counted, not timed.
"""

import argparse
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from models.folding import fold_batch_norms
from models.fusion import fuse_batch_norms, is_fusible
from models.reparam import is_reparameterizable, randomize_statistics, relative_difference, to_deploy
from models.reported import CITYSCAPES, README, REPORTED, TABLE2, Reported, count_reported
from utils import cli

from . import harness
from .harness import DTYPES, TOLERANCES, Variant
from .inference import Runner
from .peers import randomize_small_weights

ROWS = tuple(row for row in REPORTED if row.source in (README, TABLE2, CITYSCAPES))
PUBLISHED = ("parameters", "multiply_adds", "images_per_second")
COLUMNS = (
    ("network", "name", "s"),
    ("pixels", "pixels", "s"),
    ("img/s", "images_per_second", ".1f"),
    ("published", "published_images_per_second", "s"),
    ("x", "ratio", ".2f"),
    ("M", "parameters", ".2f"),
    ("published", "published_parameters", "s"),
    ("G", "multiply_adds", ".2f"),
    ("published", "published_multiply_adds", "s"),
    ("published %", "top1", "s"),
    ("difference", "difference", ".1e"),
)


def parser() -> cli.Parser:
    """Describes the command line."""
    result = harness.parser(__doc__, rounds=5)
    result.add_argument("--batch-size", type=harness.positive, default=128, help="images at a time")
    result.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of weights and images")
    result.add_argument("--tf32", action="store_true", help="let a GPU round the factors of fp32 products to TF32")
    result.add_argument("--only", nargs="+", metavar="PATTERN", help="networks to keep, by name; 'RepMLPNet-*'")
    return result


def forms_of(network: nn.Module, size: tuple[int, int]) -> dict[str, nn.Module]:
    """Returns the forms in which a network is timed; the key of a form tells it from others of the network."""
    deploy = to_deploy(network) if is_reparameterizable(network) else network
    if is_fusible(network):
        return {"deploy": deploy, "fused": fuse_batch_norms(network)}
    folded = fold_batch_norms(deploy, size)
    return {"as it is": deploy} if folded is deploy else {"folded": folded}


def build(row: Reported, args: argparse.Namespace) -> Iterator[tuple[Variant, float]]:
    """Yields what is timed for a row, each with its difference from the float64 result of the training structure.

    Raises:
        ValueError: a form is wrong.
    """
    torch.manual_seed(0)
    network = row.build()
    randomize_statistics(network)  # a fresh BatchNorm changes nothing, so a form that lost one would pass
    randomize_small_weights(network)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, *row.image_size, generator=generator)
    with torch.inference_mode():
        expected = deepcopy(network).double()(images[:1].double())
    for form, model in forms_of(network, row.image_size).items():
        name = f"{row.name}, {form}"
        run = Runner(model, images, args.dtype, args.device, None)
        with torch.inference_mode():
            difference = relative_difference(expected, run.model(run.images[:1]).cpu())
        tolerance = TOLERANCES["tf32" if args.tf32 and args.dtype == "fp32" else args.dtype]
        yield Variant(name, run, dtype=args.dtype), harness.check(name, difference, tolerance)


def figures(row: Reported) -> dict[str, Any]:
    """Returns our counts of a row, parameters in the training and multiply-adds in the deploy structure, and theirs."""
    counted = count_reported(row)
    return {
        "pixels": "x".join(map(str, row.image_size)),
        "parameters": counted.training.parameters / 1e6,
        "multiply_adds": counted.deploy.multiply_adds / 1e9,
        "top1": row.top1 or None,
        **{f"published_{key}": getattr(row, key) or None for key in PUBLISHED},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every row, and prints the table."""
    args = parser().parse_args(argv)
    clock = harness.start(args)
    harness.settle_precision(args.tf32)
    names = set(harness.chosen(dict.fromkeys(row.name for row in ROWS), args.only))
    rows = [row for row in ROWS if row.name in names]
    counted = {id(row): figures(row) for row in rows}
    built = [(row, *timed) for row in rows if row.source != CITYSCAPES for timed in build(row, args)]
    lines: list[dict[str, Any]] = []
    if built:
        variants = [variant for _, variant, _ in built]
        times = harness.interleave(variants, clock, rounds=args.rounds, min_seconds=args.min_seconds)
        lines = harness.summarise(variants, times, variants[0].name)
        for line, (row, _, difference) in zip(lines, built, strict=True):
            line |= {**counted[id(row)], "difference": difference}
            line["images_per_second"] = args.batch_size / line["median"]
    lines += [{"name": f"{r.name}, UPerNet", **counted[id(r)]} for r in rows if r.source == CITYSCAPES]
    print(f"batch {args.batch_size}, {args.dtype}; x: over the first row; G: multiply-adds; published: RTX 2080 Ti")
    harness.report(args, lines, COLUMNS, clock)


if __name__ == "__main__":
    cli.run(main)
