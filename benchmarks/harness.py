"""Timing side by side, ratios, one table and one JSON file: what the benchmark scripts share."""

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.backends import set_tf32
from utils import cli
from utils.text import Column, table

from .limits import Roofline

PACKAGES = ("torch", "torchvision", "timm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# The largest |row - float64| / max |float64| that passes for rounding.
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 5e-2}


@dataclass(frozen=True)
class Variant:
    """One row: something to run, and how much work one run of it is.

    Args:
        name: unique in its table.
        run: what is timed; called with what `prepare` returns where there is one.
        flops: floating-point operations, two for a multiply-add; 0 where they mean nothing.
        bytes: least memory traffic.
        dtype: whose matrix-multiplication peak bounds it, a key of `DTYPES`.
        prepare: called before every run, and not timed.
    """

    name: str
    run: Callable[..., object]
    flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "fp32"
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Clock:
    """What a second is.

    `cpu`: seconds of this process on the processor, which other programs on the machine hardly change; for one thread.
    `wall`: seconds that pass, for several threads or processes.
    `cuda`: seconds that pass, until the GPU has finished everything.
    """

    kind: str

    @classmethod
    def choose(cls, device: str, threads: int) -> "Clock":
        """Returns the steadiest clock that is right for a device and a number of threads."""
        return cls("cuda" if device == "cuda" else "cpu" if threads == 1 else "wall")

    def now(self) -> float:
        """Returns seconds since some fixed time."""
        if self.kind == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.kind == "cpu" else time.perf_counter()

    def __str__(self) -> str:
        return {"cpu": "process CPU seconds", "wall": "wall seconds", "cuda": "wall seconds, synchronised"}[self.kind]


def seconds_of(variant: Variant, clock: Clock, runs: int = 1) -> float:
    """Returns the seconds of one run, as the mean over `runs` in a row (one where it has to be prepared)."""
    if variant.prepare is not None:
        prepared = variant.prepare()
        start = clock.now()
        variant.run(prepared)
        return clock.now() - start
    start = clock.now()
    for _ in range(runs):
        variant.run()
    return (clock.now() - start) / runs


def interleave(
    variants: Sequence[Variant],
    clock: Clock,
    *,
    rounds: int,
    warmup: int = 2,
    min_seconds: float = 0.0,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Times variants in rounds, each of which runs every one of them, in an order of its own.

    What slows the machine down for a while thus slows all of them down, and no one always follows the same other.

    Args:
        variants: with unique names.
        clock: what a second is.
        rounds: how often each is timed.
        warmup: runs of each before, for caches, autotuning and compilation; at least 1.
        min_seconds: variants that run shorter run several times in a row, so that a time is at least about this.
        seed: of the orders.

    Returns:
        For each name the seconds of one run, round by round.
    """
    assert len({variant.name for variant in variants}) == len(variants), "variants need unique names"
    runs = {}
    for variant in variants:
        once = [seconds_of(variant, clock) for _ in range(max(1, warmup))][-1]
        runs[variant.name] = max(1, math.ceil(min_seconds / max(once, 1e-6)))
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    generator, order = random.Random(seed), list(variants)
    for _ in range(rounds):
        generator.shuffle(order)
        for variant in order:
            times[variant.name].append(seconds_of(variant, clock, runs[variant.name]))
    return times


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns how many times faster than the baseline: the median over the rounds of the ratio within each."""
    return statistics.median(b / max(s, 1e-9) for b, s in zip(baseline, seconds, strict=True))


def summarise(
    variants: Sequence[Variant], times: Mapping[str, list[float]], baseline: str, roofline: Roofline | None = None
) -> list[dict[str, Any]]:
    """Returns a row for each variant: `name`, `seconds` (all), `median`, `ratio`, and what the roofline makes of it.

    With a roofline these are `flops`, `bytes`, `limit` (seconds that the machine needs at least) and `fraction`, the
    share of its limit that a row reaches; for variants of unknown work they are left out.
    """
    rows = []
    for variant in variants:
        seconds = times[variant.name]
        row: dict[str, Any] = {"name": variant.name, "dtype": variant.dtype, "seconds": seconds}
        row |= {"median": statistics.median(seconds), "ratio": ratio(times[baseline], seconds)}
        if roofline is not None and variant.flops:
            limit = roofline.limit(variant.flops, variant.bytes, variant.dtype)
            row |= {"flops": variant.flops, "bytes": variant.bytes, "limit": limit, "fraction": limit / row["median"]}
        rows.append(row)
    return rows


def check(name: str, difference: float, tolerance: float) -> float:
    """Returns a difference from the float64 result.

    Raises:
        ValueError: it is larger than rounding explains.
    """
    if not difference <= tolerance:
        raise ValueError(f"{name} is wrong: it differs from the float64 result by {difference:.2g} (> {tolerance:g})")
    return difference


def parser(description: str | None, rounds: int = 10) -> cli.Parser:
    """Returns a command line with the options that every benchmark has."""
    result = cli.Parser(description=description)
    result.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    result.add_argument("--threads", type=positive, default=1, help="CPU threads; one is timed by process CPU time")
    result.add_argument("--rounds", type=positive, default=rounds, help="how often every row is timed")
    result.add_argument("--min-seconds", type=float, default=0.2, help="shorter rows run repeatedly within a round")
    add_json(result)
    return result


def add_json(parser: cli.Parser) -> None:
    """Adds the option that `write` looks at."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write settings and all figures to this file")


def positive(text: str) -> int:
    """Reads a whole number from 1 on."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return number


def start(args: argparse.Namespace) -> Clock:
    """Settles the number of threads, and returns the clock.

    Raises:
        ValueError: there is no GPU to run on.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; use --device cpu")
    torch.set_num_threads(args.threads)
    return Clock.choose(args.device, args.threads)


def settle_precision(tf32: bool) -> None:
    """Sets whether a GPU may round to TF32, and how many forms of one network torch compiles before it gives up."""
    set_tf32(tf32)
    torch._dynamo.config.recompile_limit = 256


def chosen(names: Iterable[str], patterns: Sequence[str] | None, always: str = "") -> list[str]:
    """Returns the names that match one of the shell patterns (all without patterns), and `always`.

    Raises:
        ValueError: a pattern matches none of them.
    """
    names = list(names)
    for pattern in patterns or []:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"--only {pattern!r} matches no row; there are: {', '.join(names)}")
    return [n for n in names if n == always or not patterns or any(fnmatch(n, p) for p in patterns)]


def machine(device: str) -> dict[str, Any]:
    """Returns what the figures depend on: processor, instruction set, cores, GPU."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def report(
    args: argparse.Namespace,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    clock: Clock,
    roofline: Roofline | None = None,
) -> None:
    """Prints the table with a line of conditions above it, and writes the file that `--json` names.

    The file holds `machine`, `versions`, `device`, `threads`, `dtype`, `clock`, `settings`, `roofline` and `rows`.
    """
    where = machine(args.device)
    name = where["gpu"] or f"{where['processor']} ({where['capability']})"
    print(f"{name}, torch {torch.__version__}, {args.threads} thread(s), {clock}, medians of {args.rounds} rounds")
    if roofline is not None:
        print(f"limits: {roofline}")
    print(f"\n{table(rows, columns)}")
    about = {"machine": where, "device": args.device, "threads": args.threads, "clock": str(clock)}
    dtypes = sorted({row["dtype"] for row in rows if "dtype" in row})
    write(args, rows, **about, dtype=dtypes, roofline=None if roofline is None else asdict(roofline))


def write(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]], **about: object) -> None:
    """Writes the file that `--json` names, if any: `script`, `versions`, `settings`, `rows`, and what else is given."""
    if args.json is None:
        return
    content = {
        "script": Path(sys.argv[0]).stem,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        **about,
        "rows": list(rows),
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
