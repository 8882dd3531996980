"""Everything that a GPU has to show, in one command: tests, benchmarks, short trainings; writes one JSON file.

A part that fails is reported, and does not stop the others. All outputs go to one folder, each part's to a log of its
own; a training is that of main_repmlp.py on generated photos, and ends after its minutes.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from utils import cli
from utils.text import table

from . import harness
from .end_to_end import write_photos

ARCH, PEER = "RepMLPNet-T224", "resnet101"
PHOTOS, EPOCH = 128, 2**17  # files, and the images of an epoch, which are links to them
# What a training adds to the configuration, by name: each for both networks.
TRAININGS = {
    "fp32": "AMP off",
    "tf32": "AMP off TF32 True",
    "bf16": "AMP bf16",
    "bf16, compiled": "AMP bf16 COMPILE True",
    "bf16, CUDA graphs": "AMP bf16 COMPILE True COMPILE_MODE reduce-overhead",
}
COLUMNS = (("part", "name", "s"), ("status", "status", "d"), ("minutes", "minutes", ".1f"), ("img/s", "rate", ".0f"))


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        words: after the interpreter.
        minutes: after which it is asked to end; None lets it come to its own end.
    """

    words: tuple[str, ...]
    minutes: float | None = None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="cpu tries the commands themselves")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), help="folder for logs and results")
    parser.add_argument("--batch-size", type=harness.positive, default=128, help="images at a time")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each training")
    parser.add_argument("--workers", type=harness.positive, default=os.cpu_count() or 1, help="that load its images")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="parts to run, by name; 'training *'")
    return parser.parse_args(argv)


def parts(args: argparse.Namespace, photos: Path) -> dict[str, Part]:
    """Returns all parts by name; a benchmark writes `NAME.json` to the output folder."""
    device, batch = ("--device", args.device), ("--batch-size", str(args.batch_size))
    benchmarks = {
        "inference": ("inference", *device, *batch, "--compile", "--peers", PEER),
        "inference, TF32": ("inference", *device, *batch, "--compile", "--peers", PEER, "--dtype", "fp32", "--tf32"),
        "steps": ("training", *device, *batch, "--compile", "--peers", PEER, "--memory"),
        "steps, TF32": ("training", *device, *batch, "--compile", "--peers", PEER, "--only", "*fp32*", "--tf32"),
        "table 2": ("table2", *device, *batch),
        "table 2, bf16": ("table2", *device, *batch, "--dtype", "bf16"),
        "injection": ("injection", *device, "--arch", ARCH, "RepMLPNet-D256"),
        "scaling": ("scaling", *device, "--dtype", "bf16"),
        "end to end": ("end_to_end", *device, *batch, "--dtype", "bf16", "--workers", "0", str(args.workers)),
        "training form": ("training_form", *device, "--batch-sizes", "16", "32", "64", "128", "256"),
        "roofline": ("roofline", *batch),
    }
    found = {"tests": Part(("-m", "pytest", "-m", "gpu", "-q"))}
    for name, (script, *options) in benchmarks.items():
        found[name] = Part(("-m", f"benchmarks.{script}", *options, "--json", str(args.output / f"{name}.json")))
    for arch in (ARCH, PEER):
        for name, keys in TRAININGS.items():
            settings = f"DATA.NUM_WORKERS {args.workers} TRAIN.EPOCHS 100 AUG.PRESET weak TAG {slug(name)} {keys}"
            folders = ("--data-path", str(photos), "--output", str(args.output))
            words = ("main_repmlp.py", "--arch", arch, *batch, *folders, "--opts", *settings.split())
            found[f"training {arch}, {name}"] = Part(words, args.minutes)
    return found


def slug(name: str) -> str:
    """Returns a name as that of a folder."""
    return re.sub(r"\W+", "-", name).lower()


def write_data_set(folder: Path) -> None:
    """Writes a folder as of ImageNet: a few photos, and for training so many links to them that an epoch lasts."""
    write_photos(folder, PHOTOS)
    train = sorted(folder.glob("train/*/*.jpg"))
    for i in range(PHOTOS, EPOCH):
        photo = train[i % len(train)]
        os.link(photo, photo.with_name(f"{i:06}.jpg"))


def run(part: Part, log: Path) -> int:
    """Runs a command to its end, its output to a log; returns its status, 0 where it was ended after its minutes."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *part.words], stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(None if part.minutes is None else 60 * part.minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return 0
        finally:
            process.kill()


def images_per_second(log: Path) -> float | None:
    """Returns the median rate that a training has logged, without its first report; None where there is no other."""
    rates = [float(rate) for rate in re.findall(r"Train: .*?([\d.]+) img/s", log.read_text())][1:]
    return statistics.median(rates) if rates else None


def row_of(name: str, part: Part, output: Path) -> dict[str, Any]:
    """Runs a part; returns its row, with what it has measured."""
    print(f"{name}: python {' '.join(part.words)}", flush=True)
    log, result, start = output / f"{slug(name)}.log", output / f"{name}.json", time.perf_counter()
    result.unlink(missing_ok=True)
    status = run(part, log)
    row = {"name": name, "command": list(part.words), "status": status, "log": str(log)}
    row |= {"minutes": (time.perf_counter() - start) / 60, "rate": images_per_second(log)}
    if part.minutes is not None and row["rate"] is None:
        row["status"] = status or 1  # it has not trained
    return row | {"result": json.loads(result.read_text()) if result.exists() else None}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts one after the other, prints a table, writes `gpu.json`; returns 1 where one of them failed."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU here; --device cpu tries the commands without one")
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    with TemporaryDirectory(dir=args.output) as name:
        found = parts(args, Path(name))
        chosen = harness.chosen(found, args.only)
        if any(found[part].minutes is not None for part in chosen):
            write_data_set(Path(name))
        for part in chosen:
            rows.append(row_of(part, found[part], args.output))
            args.json = args.output / "gpu.json"
            harness.write(args, rows, machine=harness.machine(args.device))  # after each, for a machine that is lent
    print(f"\n{table(rows, COLUMNS)}\n\n{args.json}")
    return int(any(row["status"] for row in rows))


if __name__ == "__main__":
    cli.run(main)
