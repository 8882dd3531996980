"""What it costs the processor to load data, beside the published pipeline: an image, a start, a worker's memory.

Processor time is that of this process and of its data loading processes. An image is a JPEG file like those of
ImageNet, made on the spot, and its time that from the file to its place in a batch; `collate and transfer` is what a
worker and the run pay for an image that is already transformed. `start-up` opens an image folder of empty files: its
time is that of one start. `memory` is what a worker has for itself before and after it has gone through that folder,
and `x` what a published one has after it over what ours has.
"""

import argparse
import multiprocessing
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import data
from configs import load_config, parse_opts
from data.index import MANY
from tasks import TASKS
from utils import cli
from utils.distributed import RankInfo

from . import harness, published_loading, start_up
from .harness import Clock, Variant
from .photos import write_photos
from .start_up import COLD, GENERATED, MEMORY, SAVED

SIZE = 224  # pixels, the side of a loaded image
TRANSFER = "collate and transfer"
COLUMNS = (
    ("row", "name", "s"),
    ("ms", "ms", ".3f"),
    ("published ms", "published_ms", ".3f"),
    ("x", "x", ".2f"),
    ("MiB before", "before_mib", ".1f"),
    ("MiB after", "after_mib", ".1f"),
)


@dataclass(frozen=True)
class Recipe:
    """A row of images: the published recipe, and the keys that select ours."""

    published: str
    opts: str


RECIPES = {
    "weak": Recipe("weak", "AUG.PRESET weak"),
    "evaluation": Recipe("evaluation", ""),
    "raug15 (CPU)": Recipe("raug15", "AUG.PRESET raug15"),
    "raug15 (CPU share, operations on the device)": Recipe("raug15", "AUG.PRESET raug15 AUG.DEVICE gpu"),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--images", type=harness.positive, default=400, help="JPEG files to make")
    parser.add_argument("--batch-size", type=harness.positive, default=100, help="images at a time")
    parser.add_argument("--tree", type=harness.positive, default=1_280_000, help="empty files to make")
    parser.add_argument("--entries", type=harness.positive, default=10_000_000, help="of an index without any files")
    parser.add_argument("--rounds", type=harness.positive, default=5, help="how often every row is timed")
    parser.add_argument("--min-seconds", type=float, default=0.2, help="shorter rows run repeatedly within a round")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="keys of ours: DATA.DECODER pillow")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="rows to keep; 'raug15*'")
    harness.add_json(parser)
    args = parser.parse_args(argv)
    if args.images < args.batch_size:
        raise ValueError(f"--images {args.images} do not fill a batch of {args.batch_size}")
    if min(args.tree, args.entries) < MANY:
        raise ValueError(f"an index is saved from {MANY} files on: give --tree and --entries as many")
    return args


class ProcessorClock(Clock):
    """Seconds on the processor of this process and of its children, all of which must live on while it is read."""

    def now(self) -> float:
        """Returns seconds since some fixed time."""
        children = multiprocessing.active_children()
        return time.process_time() + sum(processor_seconds(child.pid) for child in children if child.pid)

    def __str__(self) -> str:
        return "processor seconds of all processes"


def processor_seconds(pid: int) -> float:
    """Returns the seconds that a process has spent on the processor, with all of its threads."""
    return time.clock_gettime(~pid << 3 | 2)  # Linux' name of that clock, as by clock_getcpuclockid(3)


def task_of(folder: Path, args: argparse.Namespace, opts: str) -> Any:
    """Returns the task of classifying the images in a folder."""
    words = f"DATA.BATCH_SIZE {args.batch_size} DATA.NUM_WORKERS 0 DATA.IMG_SIZE {SIZE} {opts}".split()
    cfg = load_config(None, parse_opts(["DATA.DATA_PATH", str(folder), *words, *args.opts]))
    return TASKS[cfg.TASK](cfg, RankInfo(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")))


def go_through(batches: Iterable[Any]) -> None:
    """Loads all batches."""
    for _ in batches:
        pass


def image_variants(recipe: str, folder: Path, args: argparse.Namespace) -> tuple[Variant, Variant]:
    """Returns the published and our way from the files in a folder to the batches of an epoch.

    Raises:
        ValueError: they do not load equally many images.
    """
    published, task = RECIPES[recipe].published, task_of(folder, args, RECIPES[recipe].opts)
    train = published != "evaluation"
    images = published_loading.open_folder(folder / ("train" if train else "val"), published, SIZE)
    theirs = published_loading.loader(images, args.batch_size, train=train)
    ours = task.train_loader() if train else task.eval_loader((SIZE, SIZE))
    if len(theirs) != len(ours):
        raise ValueError(f"{recipe}: {len(ours)} batches, and {len(theirs)} by the published pipeline")
    return Variant(f"published {published}", partial(go_through, theirs)), Variant(recipe, partial(go_through, ours))


class Ready(data.ImageSource):
    """Images that need no work: what a loader costs beside reading, decoding and transforming."""

    def __init__(self, count: int) -> None:
        self.classes, self.labels = ["0"], np.zeros(count, dtype=np.int64)
        self._pixels = torch.randint(256, (SIZE, SIZE, 3), dtype=torch.uint8)

    def _image(self, index: int) -> Any:
        return self._pixels

    def locate(self, index: int) -> str:
        """Returns the number of the image."""
        return f"image {index}"


def as_transformed(image: Tensor, *_: object) -> Tensor:
    """Returns what a transform returns for such an image: uint8 (3, H, W)."""
    return image.permute(2, 0, 1)


class ReadyFloats(Dataset[tuple[Tensor, int]]):
    """The same as the published transforms leave them."""

    def __init__(self, count: int) -> None:
        self._count, self._pixels = count, torch.rand(3, SIZE, SIZE)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._pixels, 0


def transfer_variants(count: int, args: argparse.Namespace) -> tuple[Variant, Variant]:
    """Returns the published and our way from transformed images in a worker to batches in this process."""
    theirs = published_loading.loader(ReadyFloats(count), args.batch_size, train=True, workers=1)
    opts = parse_opts(f"DATA.BATCH_SIZE {args.batch_size} DATA.NUM_WORKERS 1".split())
    ours = data.build_train_loader(Ready(count), as_transformed, load_config(None, opts).DATA, seed=0)
    return Variant("published transfer", partial(go_through, theirs)), Variant(TRANSFER, partial(go_through, ours))


def image_rows(names: Sequence[str], folder: Path, args: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the rows of images, whose files it makes in a folder."""
    recipes = [recipe for recipe in RECIPES if recipe in names]
    if recipes:
        write_photos(folder / "train", args.images)
        (folder / "val").symlink_to("train")
        sizes = [path.stat().st_size for path in folder.glob("train/*/*.jpg")]
        print(f"{args.images} JPEG files, {sum(sizes) / len(sizes) / 1e3:.0f} kB each")
    pairs = [(*image_variants(recipe, folder, args), loaded(recipe, args)) for recipe in recipes]
    if TRANSFER in names:
        count = 10 * loaded(TRANSFER, args)
        pairs.append((*transfer_variants(count, args), count))
    # The published pipeline of two rows may be one, which is timed once.
    variants = list({variant.name: variant for theirs, ours, _ in pairs for variant in (theirs, ours)}.values())
    times = harness.interleave(variants, clock, rounds=args.rounds, warmup=1, min_seconds=args.min_seconds)
    for theirs, ours, images in pairs:
        yield compared(ours.name, times[ours.name], times[theirs.name], images)


def loaded(row: str, args: argparse.Namespace) -> int:
    """Returns how many images an epoch loads: in training, whole batches alone."""
    return args.images if row == "evaluation" else args.images // args.batch_size * args.batch_size


def compared(name: str, ours: list[float], theirs: list[float], count: int = 1) -> dict[str, Any]:
    """Returns a row: the milliseconds of one of `count`, and how many times those the published pipeline takes."""
    return {
        "name": name,
        "ms": 1e3 * statistics.median(ours) / count,
        "published_ms": 1e3 * statistics.median(theirs) / count,
        "x": harness.ratio(theirs, ours),
        "seconds": ours,
    }


def start_rows(names: Sequence[str], folder: Path, args: argparse.Namespace, clock: Clock) -> Iterator[dict[str, Any]]:
    """Yields the rows of image folders without images, whose files it makes in a folder."""
    if {COLD, SAVED, MEMORY} & {*names}:
        start_up.make_tree(folder, args.tree)
        openings = start_up.openings(folder)
        start_up.check(openings)
        kept = [name for name in (COLD, SAVED) if name in names]
        variants = [Variant(name, openings[name]) for name in openings if kept and name not in {COLD, SAVED} - {*kept}]
        times = harness.interleave(variants, clock, rounds=args.rounds, warmup=1)
        yield from (compared(name, times[name], times[start_up.PUBLISHED]) for name in kept)
        if MEMORY in names:
            yield start_up.memory_row(openings)
    if GENERATED in names:
        opening = start_up.generated(folder, args.entries)
        times = harness.interleave([Variant(GENERATED, opening)], clock, rounds=args.rounds, warmup=1)
        yield start_up.generated_row(opening, times[GENERATED])


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the files, times every row, and prints the table."""
    args = parse(argv)
    names = harness.chosen([*RECIPES, TRANSFER, COLD, SAVED, MEMORY, GENERATED], args.only)
    args.device, args.threads = "cpu", 1
    harness.start(args)
    random.seed(0)
    torch.manual_seed(0)
    clock = ProcessorClock("cpu")
    with TemporaryDirectory() as name, start_up.cache_in(Path(name)):
        rows = [*image_rows(names, Path(name, "photos"), args, clock), *start_rows(names, Path(name), args, clock)]
    print("x: over the published pipeline of the same kind")
    harness.report(args, rows, COLUMNS, clock)


if __name__ == "__main__":
    cli.run(main)
