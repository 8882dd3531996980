"""How the time and the memory of inference grow with the batch, the resolution and the depth."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import models
from models.fusion import fuse_batch_norms
from models.reparam import randomize_statistics, relative_difference, to_deploy
from utils import cli

from . import harness, memory, work
from .harness import DTYPES, TOLERANCES, Variant
from .inference import Runner
from .limits import Roofline
from .naive import naive

FORMS = ("deploy", "fused")
AXES = {"batch": "images", "resolution": "pixels", "depth": "units in the longest stage"}
AXIS_FLAGS = (
    ("--batch-sizes", [1, 2, 4, 8, 16, 32], "N"),
    ("--sizes", [128, 160, 192, 224, 256, 288], "PIXELS"),
    ("--depths", [2, 6, 12, 18], "UNITS"),
)
COLUMNS = (
    ("along", "axis", "s"),
    ("value", "value", "d"),
    ("form", "form", "s"),
    ("ms/img", "milliseconds_per_image", ".2f"),
    ("x", "ratio", ".2f"),
    ("GFLOP/img", "gflop_per_image", ".2f"),
    ("of limit", "fraction", ".2f"),
    ("peak MiB", "peak_mib", ".0f"),
    ("difference", "difference", ".1e"),
)


class Point(NamedTuple):
    """One network on one batch."""

    axis: str
    value: int
    arch: str
    batch_size: int
    size: int
    depth: int


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.parser(__doc__, rounds=5)
    parser.add_argument("--arch", choices=models.SPECS, default="RepMLPNet-T224", help="the network")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the network")
    parser.add_argument("--batch-size", type=harness.positive, default=4, help="along resolution and depth")
    for flag, default, unit in AXIS_FLAGS:
        parser.add_argument(flag, type=harness.positive, nargs="*", default=default, metavar=unit, help="none to skip")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a figure; needs matplotlib")
    return parser.parse_args(argv)


def points(args: argparse.Namespace) -> list[Point]:
    """Returns what to measure; along each axis the other two stay at the architecture's own size and --batch-size."""
    size, depth = models.default_image_size(args.arch)[0], max(models.SPECS[args.arch].blocks)
    batches = [Point("batch", n, args.arch, n, size, depth) for n in args.batch_sizes]
    sizes = [Point("resolution", px, args.arch, args.batch_size, px, depth) for px in args.sizes]
    return batches + sizes + [Point("depth", d, args.arch, args.batch_size, size, d) for d in args.depths]


def build(point: Point) -> models.RepMLPNet:
    """Returns the network of a point, with random weights and statistics, in training structure."""
    spec = models.SPECS[point.arch]
    longest = spec.blocks.index(max(spec.blocks))
    blocks = tuple(point.depth if i == longest else n for i, n in enumerate(spec.blocks))
    torch.manual_seed(0)
    model = models.RepMLPNet(replace(spec, blocks=blocks), img_size=point.size).eval()
    randomize_statistics(model)
    return model


def form_of(model: models.RepMLPNet, form: str) -> nn.Module:
    """Returns a copy in deploy structure, or fused."""
    return fuse_batch_norms(model) if form == "fused" else to_deploy(model)


def peak_memory(point: Point, form: str, dtype: str, device: str, threads: int) -> int:
    """Returns the peak memory of inference, weights and activations, in bytes; to be run in a fresh process."""
    torch.set_num_threads(threads)
    before = memory.in_use(device)
    images = torch.randn(point.batch_size, 3, point.size, point.size)
    run = Runner(form_of(build(point), form), images, dtype, device, mode=None)
    weights = memory.in_use(device) - before  # and what it took to build them is given back
    return weights + memory.extra_peak(run, device)


def rows_of(point: Point, args: argparse.Namespace, clock: harness.Clock, limits: Roofline) -> list[dict[str, Any]]:
    """Returns the rows of a point, its forms timed side by side, their answer to its first image checked.

    Raises:
        ValueError: a form is wrong.
    """
    model, variants, differences = build(point), [], []
    images = torch.randn(point.batch_size, 3, point.size, point.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = naive(model).double()(images[:1].double())
    traffic = work.inference_bytes(model, point.batch_size, model.img_size, DTYPES[args.dtype].itemsize)
    for form in FORMS:
        network = form_of(model, form)
        run = Runner(network, images, args.dtype, args.device, mode=None)
        difference = relative_difference(expected, run()[:1].cpu())
        name = f"{point.axis} {point.value} {form}"
        differences.append(harness.check(name, difference, TOLERANCES[args.dtype]))
        variants.append(Variant(name, run, work.count_flops(network, tuple(images.shape)), traffic, args.dtype))
    times = harness.interleave(variants, clock, rounds=args.rounds, min_seconds=args.min_seconds)
    rows = harness.summarise(variants, times, variants[0].name, limits)
    for row, form, difference in zip(rows, FORMS, differences, strict=True):
        peak = memory.in_fresh_process(peak_memory, point, form, args.dtype, args.device, args.threads)
        row |= point._asdict() | {"form": form, "difference": difference, "peak_bytes": peak, "peak_mib": peak / 2**20}
        row |= {"milliseconds_per_image": 1e3 * row["median"] / point.batch_size}
        row |= {"gflop_per_image": row["flops"] / 1e9 / point.batch_size}
    return rows


def check_plot(path: Path) -> None:
    """Raises ValueError where there is nothing to draw with, before anything has been measured."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise ValueError(f"--plot {path} needs matplotlib: pip install matplotlib") from error


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draws time and memory against each axis."""
    figure = import_module("matplotlib.figure").Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharex="col")
    for column, (axis, unit) in enumerate(AXES.items()):
        for form in FORMS:
            part = [row for row in rows if row["axis"] == axis and row["form"] == form]
            values = [row["value"] for row in part]
            panels[0][column].plot(values, [row["milliseconds_per_image"] for row in part], marker="o", label=form)
            panels[1][column].plot(values, [row["peak_mib"] for row in part], marker="o", label=form)
        panels[0][column].set_title(axis)
        panels[1][column].set_xlabel(unit)
    for panel in panels.flat:
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("ms per image")
    panels[1][0].set_ylabel("peak memory, MiB")
    panels[0][0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, times and weighs every point, and prints the table."""
    args = parse(argv)
    if args.plot is not None:
        check_plot(args.plot)
    clock = harness.start(args)
    limits = Roofline.measure(args.device, {args.dtype: DTYPES[args.dtype]}, clock.now, args.min_seconds)
    rows = [row for point in points(args) for row in rows_of(point, args, clock, limits)]
    title = f"{args.arch}, {args.dtype}, {args.device}, {args.threads} thread(s)"
    print(f"{title}; x: over the deploy structure of the same line; batch {args.batch_size} along resolution and depth")
    harness.report(args, rows, COLUMNS, clock, limits)
    if args.plot is not None:
        plot(rows, title, args.plot)


if __name__ == "__main__":
    cli.run(main)
