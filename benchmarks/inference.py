"""How fast a network answers, in every form, beside its naive formulation, its peers and the machine's limits."""

import argparse
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

import models
from models.fusion import fuse_batch_norms
from models.reparam import randomize_statistics, relative_difference, to_deploy
from utils import cli

from . import harness, work
from .harness import DTYPES, TOLERANCES, Variant
from .limits import Roofline
from .naive import naive
from .peers import PEERS, peer_forms

BASELINE = "naive deploy fp32"
# Of torch.compile; an empty name is the default mode.
MODES = {"cpu": ("",), "cuda": ("", "max-autotune-no-cudagraphs", "reduce-overhead")}
COLUMNS = (
    ("form", "name", "s"),
    ("ms", "milliseconds", ".2f"),
    ("img/s", "images_per_second", ".1f"),
    ("x", "ratio", ".2f"),
    ("ours is x", "ours", ".2f"),
    ("GFLOP", "gflop", ".2f"),
    ("MB", "megabytes", ".1f"),
    ("of limit", "fraction", ".2f"),
    ("difference", "difference", ".1e"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--arch", choices=models.SPECS, default="RepMLPNet-T224", help="the network")
    parser.add_argument("--batch-size", type=harness.positive, default=16, help="images at a time")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="the baseline is fp32")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round the factors of fp32 products to TF32")
    parser.add_argument("--compile", action="store_true", help="add compiled rows")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help=f"add networks of timm; without NAME {len(PEERS)}")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="rows to keep, beside the baseline; 'fused *'")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Family:
    """The forms of one architecture: in float32, with the same weights, and the one that the others must equal."""

    arch: str
    reference: str
    forms: dict[str, nn.Module]
    compiled: tuple[str, ...]  # the forms worth compiling
    size: tuple[int, int]
    bytes: dict[str, int]  # least memory traffic of a batch, by dtype


def own_family(arch: str, batch_size: int) -> Family:
    """Returns a network of this project, with random weights and statistics."""
    torch.manual_seed(0)
    model = cast(models.RepMLPNet, models.create_model(arch).eval())
    randomize_statistics(model)  # a fresh BatchNorm changes nothing, so a form that lost one would pass
    deploy = cast(models.RepMLPNet, to_deploy(model))
    forms = {
        "naive training structure": naive(model),
        "naive deploy": naive(deploy),
        "deploy": deploy,
        "fused": fuse_batch_norms(model),
    }
    traffic = {k: work.inference_bytes(deploy, batch_size, model.img_size, d.itemsize) for k, d in DTYPES.items()}
    return Family(arch, "naive training structure", forms, tuple(forms), model.img_size, traffic)


def peer_family(name: str, batch_size: int) -> Family:
    """Returns a network of timm; all its forms but the first are compiled too.

    Raises:
        ValueError: an unknown name.
    """
    forms, size = peer_forms(name), models.default_image_size(name)
    traffic = {
        k: work.inference_bytes(next(iter(forms.values())), batch_size, size, d.itemsize) for k, d in DTYPES.items()
    }
    return Family(name, next(iter(forms)), forms, tuple(forms)[1:], size, traffic)


def rows_of(family: Family, args: argparse.Namespace) -> Iterator[tuple[str, str, str, str | None]]:
    """Yields (row, form, dtype, mode of torch.compile or None) for everything that the command line asks for."""
    own = family.arch == args.arch
    modes = MODES[args.device] if args.compile else ()
    for dtype in DTYPES:
        for form in family.forms:
            name = f"{form} {dtype}" if own else f"{family.arch}, {form} {dtype}"
            if dtype in args.dtype or name == BASELINE:
                yield name, form, dtype, None
            if dtype in args.dtype and form in family.compiled:
                yield from ((f"{name}, compiled {mode}".rstrip(), form, dtype, mode) for mode in modes)


class Runner:
    """One row: a network of a dtype, perhaps compiled, with its input."""

    def __init__(self, model: nn.Module, images: Tensor, dtype: str, device: str, mode: str | None) -> None:
        layout = torch.channels_last if _is_channels_last(model) else torch.contiguous_format
        self.model = deepcopy(model).to(device, DTYPES[dtype])
        self.images = images.to(device, DTYPES[dtype]).to(memory_format=layout)
        if mode is not None:
            self.model = cast(nn.Module, torch.compile(self.model, fullgraph=True, mode=mode or None))

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Returns the logits (N, num_classes)."""
        return self.model(self.images)


def _is_channels_last(model: nn.Module) -> bool:
    kernels = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)


def build(family: Family, wanted: set[str], args: argparse.Namespace) -> Iterator[tuple[Variant, float]]:
    """Yields the wanted rows of a family, each with its difference from the float64 result.

    Raises:
        ValueError: a row is wrong.
    """
    rows = [row for row in rows_of(family, args) if row[0] in wanted]
    if not rows:
        return
    images = torch.randn(args.batch_size, 3, *family.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = deepcopy(family.forms[family.reference]).double()(images.double())
    for name, form, dtype, mode in rows:
        model = family.forms[form]
        run = Runner(model, images, dtype, args.device, mode)
        flops = work.count_flops(model, tuple(images.shape))
        difference = relative_difference(expected, run().cpu())
        harness.check(name, difference, TOLERANCES["tf32" if args.tf32 and dtype == "fp32" else dtype])
        yield Variant(name, run, flops, family.bytes[dtype], dtype), difference


def compare_with_best(rows: Sequence[dict[str, Any]], own: set[str]) -> None:
    """Adds to each peer's row `ours`: how many times faster our fastest row of its dtype is, round by round."""
    for row in rows:
        candidates = [r for r in rows if r["name"] in own and r["dtype"] == row["dtype"]]
        if row["name"] not in own and candidates:
            best = min(candidates, key=lambda r: median(r["seconds"]))
            row["ours"] = harness.ratio(row["seconds"], best["seconds"])


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every row, and prints the table."""
    args = parse(argv)
    clock = harness.start(args)
    harness.settle_precision(args.tf32)
    peers = [] if args.peers is None else args.peers or list(PEERS)
    for name in peers:
        models.default_image_size(name)  # an unknown one is to fail at once
    families = [own_family(args.arch, args.batch_size), *(peer_family(name, args.batch_size) for name in peers)]
    names = [[name for name, *_ in rows_of(family, args)] for family in families]
    wanted = set(harness.chosen(chain(*names), args.only, BASELINE))
    built = [row for family in families for row in build(family, wanted, args)]
    variants, differences = [variant for variant, _ in built], {variant.name: value for variant, value in built}
    dtypes = {dtype: DTYPES[dtype] for dtype in DTYPES if any(v.dtype == dtype for v in variants)}
    limits = Roofline.measure(args.device, dtypes, clock.now, args.min_seconds)
    times = harness.interleave(variants, clock, rounds=args.rounds, min_seconds=args.min_seconds)
    limits = limits.best(Roofline.measure(args.device, dtypes, clock.now, args.min_seconds))
    rows = harness.summarise(variants, times, BASELINE, limits)
    compare_with_best(rows, wanted & set(names[0]))
    for row in rows:
        row |= {"difference": differences[row["name"]], "images_per_second": args.batch_size / row["median"]}
        row |= {"milliseconds": 1e3 * row["median"], "gflop": row["flops"] / 1e9, "megabytes": row["bytes"] / 1e6}
    print(f"{args.arch}, batch {args.batch_size}; x: over {BASELINE}; ours is x: our best of that dtype over a peer")
    harness.report(args, rows, COLUMNS, clock, limits)


if __name__ == "__main__":
    cli.run(main)
