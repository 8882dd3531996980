"""Images a second from JPEG files to logits, and of loading and augmenting alone, per number of workers."""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import configs
import data
import models
from models.fusion import fuse_batch_norms
from models.reparam import randomize_statistics, relative_difference
from utils import cli

from . import harness
from .harness import DTYPES, TOLERANCES, Clock, Variant
from .naive import naive

WIDTH, HEIGHT, QUALITY = 500, 375, 90  # the usual ImageNet photo; the files come to about 54 KB
PRESETS = ("none", "weak", "raug15")
COLUMNS = (
    ("path", "name", "s"),
    ("workers", "workers", "d"),
    ("img/s", "images_per_second", ".1f"),
    ("x", "ratio", ".2f"),
    ("difference", "difference", ".1e"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.parser(__doc__, rounds=3)
    parser.add_argument("--arch", choices=models.SPECS, default="RepMLPNet-T224", help="the network")
    parser.add_argument("--batch-size", type=harness.positive, default=32, help="images at a time")
    parser.add_argument("--images", type=harness.positive, default=256, help="JPEG files to make")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the network, which is fused")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="data loading processes, 0 is none")
    parser.add_argument("--presets", nargs="+", choices=list(data.PRESETS), default=PRESETS, help="augmentations")
    return parser.parse_args(argv)


def write_photos(folder: Path, count: int) -> None:
    """Writes `count` JPEG files of 500x375 pixels, in two classes, below `folder`/train and `folder`/val.

    They are noise on every scale, stronger on the coarse ones, as photos are, and compress as photos do.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((HEIGHT, WIDTH, 3), 128.0)
        for side, strength in ((4, 50), (16, 25), (64, 14), (500, 7)):
            coarse = rng.normal(0, strength, (side, side, 3)).clip(-127, 127) + 128
            smooth = Image.fromarray(coarse.astype(np.uint8)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels += np.asarray(smooth, dtype=np.float64) - 128
        for split in ("train", "val"):
            path = folder / split / f"class{i % 2}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)


def configuration(args: argparse.Namespace, folder: Path, workers: int = 0, preset: str = "none") -> CfgNode:
    """Returns the configuration of a path: the files in `folder`, loaded and augmented in this way."""
    values = {
        "DATA.DATA_PATH": folder,
        "DATA.BATCH_SIZE": args.batch_size,
        "DATA.NUM_WORKERS": workers,
        "DATA.PIN_MEMORY": False,
        "AUG.PRESET": preset,
    }
    return configs.load_config(None, [configs.Override("--opts", key, value) for key, value in values.items()])


class Evaluation:
    """The path of an evaluation: load, resize, normalise, network."""

    def __init__(self, model: nn.Module, batches: DataLoader, dtype: str, device: str) -> None:
        spec = data.DATASETS["imagenet"]
        self.model, self.batches, self.device = model.to(device, DTYPES[dtype]), batches, device
        self.normalize = data.Normalize(spec.mean, spec.std).to(device)
        self.dtype = DTYPES[dtype]

    @torch.inference_mode()
    def logits(self, batches: int | None = None) -> Tensor:
        """Returns the logits (N, num_classes) of all images, or of the first few batches, on the CPU."""
        return torch.cat([self._answer(batch.images).cpu() for batch in islice(self.batches, batches)])

    def _answer(self, images: Tensor) -> Tensor:
        return self.model(self.normalize(images.to(self.device, non_blocking=True)).to(self.dtype))


def load(batches: DataLoader) -> int:
    """Goes through all batches; returns the number of images."""
    return sum(len(batch.labels) for batch in batches)


def evaluation_rows(folder: Path, args: argparse.Namespace) -> list[tuple[Variant, dict[str, Any]]]:
    """Returns a row for each number of workers, each with its largest difference from the float64 logits.

    Raises:
        ValueError: the logits are wrong.
    """
    torch.manual_seed(0)
    model = cast(models.RepMLPNet, models.create_model(args.arch).eval())
    randomize_statistics(model)
    source = data.open_source(configuration(args, folder).DATA, "val")
    transform, fused = data.eval_transform(model.img_size), fuse_batch_norms(model)
    spec, expected, rows = data.DATASETS["imagenet"], None, []
    for workers in args.workers:
        batches = data.build_eval_loader(source, transform, configuration(args, folder, workers).DATA)
        if expected is None:
            images = data.Normalize(spec.mean, spec.std, dtype=torch.float64)(next(iter(batches)).images)
            with torch.inference_mode():
                expected = naive(model).double()(images)
        path = Evaluation(fused, batches, args.dtype, args.device)
        name = f"files to logits, {workers} workers"
        difference = relative_difference(expected, path.logits(batches=1))
        harness.check(name, difference, TOLERANCES[args.dtype])
        extra = {"path": f"files to logits ({args.dtype}, fused)", "workers": workers, "difference": difference}
        rows.append((Variant(name, path.logits, dtype=args.dtype), extra))
    return rows


def loading_rows(folder: Path, args: argparse.Namespace) -> list[tuple[Variant, dict[str, Any]]]:
    """Returns a row for each preset and number of workers, checked to load what the first number does.

    Raises:
        ValueError: other images are loaded.
    """
    source, size = data.open_source(configuration(args, folder).DATA, "train"), models.default_image_size(args.arch)
    rows = []
    for preset in args.presets:
        expected = None
        for workers in args.workers:
            cfg = configuration(args, folder, workers, preset)
            batches = data.build_train_loader(source, data.train_transform(size, cfg.AUG), cfg.DATA, seed=cfg.SEED)
            found = next(iter(batches)).images
            expected = found if expected is None else expected
            name = f"load {preset}, {workers} workers"
            difference = harness.check(name, relative_difference(expected, found), 0.0)
            extra = {"path": f"files to batches ({preset})", "workers": workers, "difference": difference}
            rows.append((Variant(name, partial(load, batches), dtype="uint8"), extra))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the files, checks and times every path, and prints the table."""
    args = parse(argv)
    if args.images < args.batch_size:
        raise ValueError(f"--images {args.images} do not fill a batch of {args.batch_size}")
    harness.start(args)
    clock = Clock("cuda" if args.device == "cuda" else "wall")  # workers are processes of their own
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, args.images)
        photos = list(folder.glob("val/*/*.jpg"))
        kilobytes = sum(photo.stat().st_size for photo in photos) / len(photos) / 1e3
        built = evaluation_rows(folder, args) + loading_rows(folder, args)
        variants = [variant for variant, _ in built]
        times = harness.interleave(variants, clock, rounds=args.rounds, warmup=1)
        rows = harness.summarise(variants, times, variants[0].name)
        for row, (_, extra) in zip(rows, built, strict=True):
            whole = args.images if "logits" in row["name"] else args.images // args.batch_size * args.batch_size
            row |= extra | {"images_per_second": whole / row["median"], "row": row["name"]}
            row["name"] = extra["path"]
    files = f"{args.images} JPEG files of {WIDTH}x{HEIGHT}, {kilobytes:.0f} KB each"
    print(f"{files}; {args.arch}, batch {args.batch_size}; x: over the first row")
    harness.report(args, rows, COLUMNS, clock)


if __name__ == "__main__":
    cli.run(main)
