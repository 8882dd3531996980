"""Soak test: kills a training repeatedly and compares its result with an uninterrupted run, bit for bit.

Each process ends by SIGKILL at a random moment, about every second one while a checkpoint is being written. The next
process resumes, with another number of data workers.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils import cli

ROOT = Path(__file__).parents[1]
# Short, with everything that has a state: moving average, saves within an epoch, numbered checkpoints.
RECIPE = (
    "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 DATA.BATCH_SIZE 32 PRINT_FREQ 2 SAVE_STEPS 5 SAVE_FREQ 1 KEEP_CHECKPOINTS 1 "
    "TRAIN.EMA_ALPHA 0.001 TRAIN.EMA_UPDATE_PERIOD 2"
)
RUN = Path("RepMLPNet-Digits", "quickstart")
# The number of threads affects the order of sums; with one thread runs are comparable.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
# A process trains for at most about 6 of the 88 updates before it is killed, so that this many never finish.
KILLS_A_ROUND = 7


def arguments(output: Path, workers: int = 0, changes: Mapping[str, object] | None = None) -> list[str]:
    """Returns the command line of the short training, without the interpreter; `changes` are keys with other values."""
    words = RECIPE.split()
    recipe = dict(zip(words[::2], words[1::2], strict=True)) | {"DATA.NUM_WORKERS": workers} | dict(changes or {})
    script, cfg = str(ROOT / "main_repmlp.py"), str(ROOT / "configs" / "quickstart.yaml")
    pairs = [str(word) for pair in recipe.items() for word in pair]
    return [script, "--cfg", cfg, "--output", str(output), "--opts", *pairs]


def differences(first: Path, second: Path) -> list[str]:
    """Returns the differences of two run folders: checkpoints bit for bit, metrics byte for byte."""
    names = [{path.name for path in folder.glob("*.pth")} for folder in (first, second)]
    found = [f"{name} is only in one of them" for name in sorted(names[0] ^ names[1])]
    if (first / "metrics.jsonl").read_bytes() != (second / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl differs")
    for name in sorted(names[0] & names[1]):
        left, right = (_leaves(torch.load(folder / name, weights_only=True)) for folder in (first, second))
        found += [f"{name} differs in {key}" for key in sorted(left.keys() ^ right.keys())]
        found += [f"{name} differs in {key}" for key in left if key in right and not _same(left[key], right[key])]
    return found


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every tensor and plain value by its path, except the configuration, which names the folder."""
    if not isinstance(value, dict | list | tuple):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for k, v in items if k != "config" for path, leaf in _leaves(v, f"{prefix}/{k}").items()}


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and first == second


def lines(folder: Path, word: str = "Train: ") -> int:
    """Returns the number of occurrences of a word in the log of a run."""
    log = folder / "log_rank0.txt"
    return log.read_text().count(word) if log.exists() else 0


def kill(folder: Path, alive: Callable[[], bool], pid: int, rng: random.Random, *, lines_before: int) -> str:
    """Waits until a run trains, then kills it some updates later or while it writes the next file.

    Args:
        folder: of the run.
        alive: returns whether the process still runs, and collects its exit status if not.
        pid: of the process.
        rng: draws the moment.
        lines_before: training lines in the log before this process started.

    Returns:
        What was hit: "saving", "training", or "nothing" if the run had finished before.
    """
    last_line = lines_before + rng.randint(1, 3)
    while alive() and lines(folder) < last_line:
        time.sleep(0.002)
    if rng.random() < 0.6:
        time.sleep(rng.uniform(0, 0.05))
    else:
        while alive() and not list(folder.glob(".*.tmp")):
            time.sleep(0.0005)
    if not alive():
        return "nothing"
    os.kill(pid, signal.SIGKILL)
    while alive():
        time.sleep(0.001)
    return "saving" if list(folder.glob(".*.tmp")) else "training"


class Round(NamedTuple):
    """A run with all its processes: what the kills hit, its duration, and its differences from an uninterrupted run."""

    hits: Counter[str]
    seconds: float
    differences: list[str]


def soak(output: Path, reference: Path, kills: int, seed: int) -> Round:
    """Trains to the end, killed `kills` times on the way."""
    rng, start, hits, folder = random.Random(seed), time.monotonic(), Counter[str](), output / RUN
    while True:
        before = lines(folder)
        process = _start(output, workers=rng.choice((0, 2)))
        if hits.total() < kills:
            hit = kill(folder, lambda p=process: p.poll() is None, process.pid, rng, lines_before=before)  # type: ignore[misc]
            if hit != "nothing":
                hits[hit] += 1
                continue
        if process.wait():
            raise ValueError(f"a run ended with status {process.returncode}, see {output / 'console.txt'}")
        return Round(hits, time.monotonic() - start, differences(reference, folder))


def _start(output: Path, workers: int = 0) -> subprocess.Popen[bytes]:
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *arguments(output, workers)]
    with (output / "console.txt").open("a") as console:
        return subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=console, stderr=subprocess.STDOUT)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs rounds up to the requested number of kills; returns status 1 if the result of any run differs."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="number of kills in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--output", type=Path, default=argparse.SUPPRESS, help="new folder in which the runs are kept")
    args = parser.parse_args(argv)
    if args.kills < 1:
        raise ValueError(f"--kills is {args.kills}: give at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        root = getattr(args, "output", Path(temporary))
        soak(root / "undisturbed", root / "undisturbed" / RUN, 0, 0)
        rows, left, equal = list[Round](), args.kills, True
        print(f"{'round':>5} {'kills':>6} {'training':>9} {'saving':>7} {'seconds':>8}  end")
        while left > 0:
            number = len(rows)
            result = soak(root / str(number), root / "undisturbed" / RUN, min(left, KILLS_A_ROUND), args.seed + number)
            left, equal = left - result.hits.total(), equal and not result.differences
            rows.append(result)
            end = (
                "equal" if not result.differences else f"{len(result.differences)} differences: {result.differences[0]}"
            )
            print(_row(number, result, end), flush=True)
        hits = sum((row.hits for row in rows), Counter[str]())
        print(_row("all", Round(hits, sum(row.seconds for row in rows), []), "equal" if equal else "not equal"))
    return 0 if equal else 1


def _row(name: object, result: Round, end: str) -> str:
    hits = result.hits
    return f"{name:>5} {hits.total():>6} {hits['training']:>9} {hits['saving']:>7} {result.seconds:>8.0f}  {end}"


if __name__ == "__main__":
    cli.run(main)
