"""How long Locality Injection takes, and how much memory beside the network, beside the published way."""

import argparse
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

import models
from models.reparam import randomize_statistics, relative_difference
from utils import cli

from . import harness, memory
from .harness import Variant
from .naive import NaiveBlock, NaiveRepMLPNet, inject, naive

FORMS = ("naive", "ours")
TOLERANCE = 1e-5  # of float32 weights
COLUMNS = (
    ("network", "name", "s"),
    ("ms", "milliseconds", ".1f"),
    ("x", "ratio", ".1f"),
    ("extra MiB", "extra_mib", ".1f"),
    ("difference", "difference", ".1e"),
)
Network = NaiveRepMLPNet | models.RepMLPNet


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.parser(__doc__, rounds=5)
    names = list(models.SPECS)
    parser.add_argument("--arch", nargs="+", choices=names, default=names, metavar="NAME", help="networks")
    return parser.parse_args(argv)


def build(arch: str, form: str) -> Network:
    """Returns a network in training structure, with random statistics, in the naive formulation or in ours."""
    torch.manual_seed(0)
    model = cast(models.RepMLPNet, models.create_model(arch).eval())
    randomize_statistics(model)
    return naive(model) if form == "naive" else model


def inject_any(model: Network) -> Network:
    """Injects in place, the way of the network's formulation."""
    if isinstance(model, NaiveRepMLPNet):
        inject(model)
    else:
        model.locality_injection()
    return model


def extra_memory(arch: str, form: str, device: str, threads: int) -> int:
    """Returns the memory that injection takes at its peak beside the network, in bytes, in a fresh process."""
    torch.set_num_threads(threads)
    inject_any(build("RepMLPNet-Digits", form).to(device))  # what torch loads at first use is not injection's
    model = build(arch, form).to(device)
    return memory.extra_peak(lambda: inject_any(model), device)


def injected(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields weight and bias of every injected block."""
    for module in model.modules():
        if isinstance(module, NaiveBlock | models.RepMLPBlock):
            yield module.fc3.weight, cast(Tensor, module.fc3.bias)


@torch.no_grad()
def difference(arch: str, form: str, device: str) -> float:
    """Returns the largest relative difference of any injected weight or bias from the naive result in float64."""
    exact = inject_any(build(arch, "naive").double())
    actual = inject_any(build(arch, form).to(device))
    return max(
        relative_difference(expected, tensor.cpu())
        for pairs in zip(injected(exact), injected(actual), strict=True)
        for expected, tensor in zip(*pairs, strict=True)
    )


def rows_of(arch: str, args: argparse.Namespace, clock: harness.Clock) -> list[dict]:
    """Returns the two rows of an architecture.

    Raises:
        ValueError: a result is wrong.
    """
    names = {f"{arch} {form}": form for form in FORMS}
    differences = {
        name: harness.check(name, difference(arch, form, args.device), TOLERANCE) for name, form in names.items()
    }
    networks = {name: build(arch, form).to(args.device) for name, form in names.items()}
    variants = [Variant(n, inject_any, prepare=partial(deepcopy, network)) for n, network in networks.items()]
    times = harness.interleave(variants, clock, rounds=args.rounds)
    rows = harness.summarise(variants, times, f"{arch} naive")
    for row in rows:
        extra = memory.in_fresh_process(extra_memory, arch, names[row["name"]], args.device, args.threads)
        row |= {"milliseconds": 1e3 * row["median"], "difference": differences[row["name"]]}
        row |= {"extra_bytes": extra, "extra_mib": extra / 2**20}
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, times and weighs every architecture, and prints the table."""
    args = parse(argv)
    clock = harness.start(args)
    rows = [row for arch in args.arch for row in rows_of(arch, args, clock)]
    print("Locality Injection of a whole network, fp32; x: over the naive way of the same network")
    harness.report(args, rows, COLUMNS, clock)


if __name__ == "__main__":
    cli.run(main)
