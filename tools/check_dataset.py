"""Reads every image of a data set once, and lists what would break a training or falsify an evaluation.

Errors: unreadable and truncated images, one image in two classes. Warnings: one image in train and val, tiny images,
classes without images, names that differ in upper and lower case only. Notes: what else may be worth knowing. The exit
status is 1 where there are errors.

python -m tools.check_dataset IMAGENET --json report.json
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from yacs.config import CfgNode

import data
from configs import Override, load_config, parse_opts
from data.inspection import HUGE, TINY_FILE, TINY_SIDE, Inspection, inspections
from data.sources import SPLITS
from utils import cli
from utils.files import check_target, write_json
from utils.memory import readable
from utils.text import printable

EXAMPLES = 3  # of each kind that are printed; all are in the file of --json
UNBALANCED = 10  # times as many images in one class as in another
ERROR, WARNING, NOTE = "error", "warning", "note"
# What is looked for, the worst first: its level, and a description.
KINDS = {
    "unreadable": (ERROR, "can't be read: a training replaces the image, an evaluation refuses to count without it"),
    "truncated": (ERROR, "cut off, and can't be read either"),
    "two classes": (ERROR, "one image in two classes"),
    "train and val": (WARNING, "one image in train and val, so that the evaluation is of a known one"),
    "empty class": (WARNING, "a class without images"),
    "case": (WARNING, "names that differ in upper and lower case only, which not every file system tells apart"),
    "tiny": (WARNING, f"a side below {TINY_SIDE} pixels, or less than {TINY_FILE} bytes"),
    "unbalanced": (NOTE, f"the largest class has at least {UNBALANCED} times the images of the smallest"),
    "repeated": (NOTE, "one image more than once in a class"),
    "rotated": (NOTE, "an orientation in EXIF, which is ignored: the image is read as it is stored"),
    "16 bits": (NOTE, "16 bits a channel, of which 8 are used"),
    "CMYK": (NOTE, "CMYK, converted without a colour profile"),
    "huge": (NOTE, f"more than {HUGE} pixels, which take long to decode"),
    "extension": (NOTE, "the extension of another format; the content decides"),
    "left out": (NOTE, "a file or a hidden folder that is not read"),
}


class Finding(NamedTuple):
    """Something of a kind in `KINDS`: where, which may be several places, and what is to be added."""

    kind: str
    where: list[str]
    detail: str = ""


@dataclass
class Split:
    """The images of a split, after all of them were read."""

    name: str
    source: data.Source
    digests: np.ndarray  # uint64 (N, 2)
    is_read: np.ndarray = field(repr=False)  # bool (N,)
    seconds: float = 0.0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)

    @property
    def labels(self) -> np.ndarray | None:
        """The class of each image (N,); None where an image has none."""
        return self.source.labels if isinstance(self.source, data.ImageSource) else None

    def class_of(self, index: int) -> str:
        """Returns the name of the class of an image, or an empty string."""
        return "" if self.labels is None else self.source.classes[int(self.labels[index])]

    def class_sizes(self) -> dict[str, int]:
        """Returns the number of images of each class."""
        if self.labels is None:
            return {}
        counts = np.bincount(self.labels, minlength=len(self.source.classes))
        return dict(zip(self.source.classes, counts.tolist(), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures for --json."""
        return {
            "images": len(self.source),
            "seconds": self.seconds,
            "bytes": self.bytes,
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
            "classes": self.class_sizes(),
        }

    def __str__(self) -> str:
        parts = [f"{len(self.source)} images of {len(self.source.classes)} classes"]
        parts += [readable(self.bytes)] * bool(self.bytes)
        parts += [", ".join(f"{name} {n}" for name, n in c.most_common()) for c in (self.formats, self.modes) if c]
        parts += [f"{len(self.source) / self.seconds:.0f} images/s"]
        return f"{self.name}: {'; '.join(parts)}"


def parser() -> cli.Parser:
    """Describes the command line."""
    result = cli.Parser(description=__doc__, argument_default=None)
    result.add_argument("data", metavar="DATA", help="folder of the data set, or digits, or shapes")
    result.add_argument("--dataset", metavar="NAME", help=f"{', '.join(data.DATASETS)}; imagenet if absent")
    result.add_argument("--split", choices=[*SPLITS, "both"], default="both", help="what to read")
    cores = len(os.sched_getaffinity(0))
    result.add_argument("-j", "--workers", default=str(cores), metavar="N", help="processes that read")
    result.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="any keys of the configuration")
    result.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found to this file")
    return result


def configuration(args: argparse.Namespace) -> CfgNode:
    """Returns the section DATA that the command line means."""
    given = {
        ("DATA", "DATA.DATA_PATH"): args.data,
        ("--dataset", "DATA.DATASET"): args.dataset,
        ("-j", "DATA.NUM_WORKERS"): args.workers,
        ("tools.check_dataset", "DATA.CACHE_MODE"): "no",  # nothing is read twice
        ("tools.check_dataset", "DATA.PIN_MEMORY"): "False",
    }
    overrides = [Override(*place, value) for place, value in given.items() if value is not None]
    return load_config(None, [*overrides, *parse_opts(args.opts)]).DATA


def read(name: str, source: data.Source, cfg: CfgNode, findings: list[Finding]) -> Split:
    """Reads all images of a split; adds what there is to say of each to `findings`.

    Raises:
        KeyboardInterrupt: with how far it was.
    """
    count = len(source)
    split = Split(name, source, np.zeros((count, 2), dtype=np.uint64), np.zeros(count, dtype=bool))
    done, begin = 0, time.perf_counter()
    with tqdm(total=count, desc=name, unit=" images", leave=False, disable=None) as bar:
        try:
            for chunk in inspections(source, cfg):
                for index, found in enumerate(chunk, done):
                    note(split, index, found, findings)
                done += len(chunk)
                bar.update(len(chunk))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted after {done} of {count} images of {name}") from None
    split.seconds = time.perf_counter() - begin
    return split


def note(split: Split, index: int, found: Inspection, findings: list[Finding]) -> None:
    """Adds an image to the figures of its split, and what there is to say of it to `findings`."""
    if found.digest:
        split.digests[index], split.is_read[index] = np.frombuffer(found.digest, dtype=np.uint64), True
        split.bytes += found.bytes
        split.modes[found.mode] += 1
        split.formats.update([found.format] * bool(found.format))
    findings += (Finding(kind, [split.source.locate(index)], detail) for kind, detail in found.remarks)


def repeated(splits: Sequence[Split]) -> Iterator[Finding]:
    """Yields the images that are there more than once, byte by byte, with all places that have them."""
    positions = np.flatnonzero(np.concatenate([split.is_read for split in splits]))
    begins = np.cumsum([0] + [len(split.source) for split in splits[:-1]])
    for group in equal_rows(np.concatenate([split.digests for split in splits])[positions]):
        numbers = [int(np.searchsorted(begins, positions[row], side="right")) - 1 for row in group]
        images = [(splits[n], int(positions[row] - begins[n])) for n, row in zip(numbers, group, strict=True)]
        classes = sorted({split.class_of(index) for split, index in images})
        kind = "two classes" if len(classes) > 1 else "train and val" if len({*numbers}) > 1 else "repeated"
        yield Finding(kind, [split.source.locate(index) for split, index in images], ", ".join(classes))


def equal_rows(rows: np.ndarray) -> list[list[int]]:
    """Returns the positions of rows (N, K) that are equal, two or more, in ascending order."""
    order = np.lexsort(rows.T[::-1])
    begins = np.flatnonzero(np.append(True, (rows[order][1:] != rows[order][:-1]).any(1)))
    ends = np.append(begins[1:], len(rows))
    several = np.flatnonzero(ends - begins > 1)
    return sorted(sorted(order[begins[group] : ends[group]].tolist()) for group in several)


def of_classes(split: Split) -> Iterator[Finding]:
    """Yields classes without images, and that the largest is many times the smallest."""
    sizes = split.class_sizes()
    yield from (Finding("empty class", [f"{split.name}: {printable(name)}"]) for name, n in sizes.items() if not n)
    filled = {name: n for name, n in sizes.items() if n}
    least, most = min(filled, key=filled.__getitem__, default=""), max(filled, key=filled.__getitem__, default="")
    if filled and filled[most] >= UNBALANCED * filled[least]:
        detail = printable(f"{filled[most]} of {most}, {filled[least]} of {least}")
        yield Finding("unbalanced", [split.name], detail)


def of_names(split: Split) -> Iterator[Finding]:
    """Yields class names and places that differ in upper and lower case only."""
    yield from (Finding("case", list(map(printable, names))) for names in alike(split.source.classes))
    if isinstance(split.source, data.EncodedSource):
        locate = split.source.locate
        hashes = np.array([hash(locate(index).casefold()) for index in range(len(split.source))])
        for group in equal_rows(hashes[:, None]):
            yield from (Finding("case", names) for names in alike(map(locate, group)))


def alike(names: Iterable[str]) -> Iterator[list[str]]:
    """Yields the names that are equal but for upper and lower case."""
    for _, group in groupby(sorted(names, key=str.casefold), key=str.casefold):
        found = list(group)
        if len(found) > 1:
            yield found


def left_out(source: data.FolderSource) -> Iterator[Finding]:
    """Yields the files below the folder of a split that are none of its images, and hidden folders as a whole."""
    known = np.sort(np.array([hash(path) for path in source.paths]))
    for place, folders, files in os.walk(source.folder, followlinks=True):
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = [name for name in folders if not name.startswith(".")]
        inner = os.path.relpath(place, source.folder)
        names = [os.path.normpath(f"{inner}/{name}") for name in (*hidden, *files)]
        hashes = np.array([hash(name) for name in names], dtype=np.int64)
        nearest = known[np.searchsorted(known, hashes).clip(max=len(known) - 1)]
        for name in compress(names, nearest != hashes):
            yield Finding("left out", [printable(source.folder / name)], os.path.splitext(name)[1].lower())


def report(splits: Sequence[Split], findings: Sequence[Finding]) -> None:
    """Prints the figures, and of each kind of finding the number and a few examples."""
    for split in splits:
        print(printable(split))
    for kind, (level, text) in KINDS.items():
        found = [finding for finding in findings if finding.kind == kind]
        if found:
            print(f"{level:<8}{len(found):>9}  {text}")
            for finding in found[:EXAMPLES]:
                print(printable(f"  {' = '.join(finding.where)}{': ' * bool(finding.detail)}{finding.detail}"))
            print("  ...\n" * (len(found) > EXAMPLES), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, compares, prints, writes; returns 1 if there are errors."""
    args = parser().parse_args(argv)
    if args.json:
        check_target(args.json, [args.data, *args.opts])
    cfg, findings = configuration(args), list[Finding]()
    sources = {
        name: data.open_source(cfg, name, channels=cfg.CHANNELS or 3)
        for name in (SPLITS if args.split == "both" else [args.split])
    }
    splits = [read(name, source, cfg, findings) for name, source in sources.items()]
    findings += repeated(splits)
    for split in splits:
        findings += chain(of_classes(split), of_names(split))
        if isinstance(split.source, data.FolderSource):
            findings += left_out(split.source)
    report(splits, findings)
    counts = Counter(KINDS[finding.kind][0] for finding in findings)
    print(", ".join(f"{counts[level]} {level}s" for level in (ERROR, WARNING, NOTE)))
    if args.json:
        rows = [{"level": KINDS[finding.kind][0]} | finding._asdict() for finding in findings]
        write_json(args.json, {"splits": {split.name: split.as_dict() for split in splits}, "findings": rows})
    return int(counts[ERROR] > 0)


if __name__ == "__main__":
    cli.run(main)
