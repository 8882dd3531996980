"""Image folders of empty files, and an index without files: what a start takes, and a worker's memory after it."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import ImageFolder

import data
from configs import load_config, parse_opts
from data.index import GRANULARITY_S, Listing, find_listing, packed_states, state_of
from data.sources import PackedStrings

FOLDERS = 1000
PUBLISHED = "published start-up"
COLD, SAVED = "start-up (cold scan)", "start-up (saved index)"
MEMORY, GENERATED = "memory", "start-up (generated index)"
LOOKED_UP = 10_000  # entries of a generated index

Opening = Callable[[], Any]


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Makes this folder the user's cache folder."""
    name = "XDG_CACHE_HOME"
    before = os.environ.get(name)
    os.environ[name] = str(folder / "cache")
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})


def make_tree(folder: Path, files: int) -> None:
    """Makes a data path with so many empty files, and waits until an index of it would be trusted."""
    for number in range(FOLDERS):
        place = folder / "train" / f"n{number:08}"
        place.mkdir(parents=True)
        for i in range(number, files, FOLDERS):
            os.close(os.open(f"{place}/n{number:08}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))
    (folder / "val").symlink_to("train")
    time.sleep(GRANULARITY_S + 0.1)


def openings(folder: Path) -> dict[str, Opening]:
    """Returns the ways to open a data path, by row."""

    def ours(index: bool) -> Opening:
        cfg = load_config(None, parse_opts(["DATA.DATA_PATH", str(folder), "DATA.INDEX", str(index)]))
        return partial(data.open_source, cfg.DATA, "train")

    return {PUBLISHED: partial(ImageFolder, folder / "train"), COLD: ours(index=False), SAVED: ours(index=True)}


def check(openings: Mapping[str, Opening]) -> None:
    """Raises ValueError if one of them finds other files than another."""
    expected = openings[PUBLISHED]().samples
    for name in (COLD, SAVED, SAVED):
        source = openings[name]()
        found = zip((f"{source.folder}/{path}" for path in source.paths), source.labels, strict=True)
        if list(found) != expected:
            raise ValueError(f"{name} is wrong: it does not list the files as torchvision does")


def memory_row(openings: Mapping[str, Opening]) -> dict[str, Any]:
    """Returns the memory of a worker before and after it has asked where each image is, and for its label."""
    ours, theirs = openings[SAVED](), openings[PUBLISHED]()
    count = len(ours)
    published_before, published_after = in_a_worker(lambda i: theirs.samples[i], count)
    before, after = in_a_worker(lambda i: (ours.locate(i), ours.labels[i]), count)
    row = {"name": MEMORY, "ms": None, "x": published_after / after, "before_mib": before, "after_mib": after}
    return row | {"published_before_mib": published_before, "published_after_mib": published_after}


def generated(folder: Path, entries: int) -> Opening:
    """Saves an index of so many files, which there are not; returns what opens it."""
    train = folder / "generated" / "train"
    classes = [f"n{number:08}" for number in range(FOLDERS)]
    for name in classes:
        (train / name).mkdir(parents=True)
    time.sleep(GRANULARITY_S + 0.1)

    def scan() -> Listing:
        names = (f"{name}/{name}_{i}.JPEG\0" for k, name in enumerate(classes) for i in range(k, entries, FOLDERS))
        return Listing(
            paths=PackedStrings.split("".join(names).encode()),
            counts=np.array([len(range(k, entries, FOLDERS)) for k in range(FOLDERS)]),
            places=PackedStrings(classes),
            states=packed_states(state_of(train / name) for name in classes),
        )

    find_listing(train, classes, scan)
    return partial(data.FolderSource, train.parent, "train")


def generated_row(opening: Opening, seconds: list[float]) -> dict[str, Any]:
    """Returns what it takes to open it, and the memory of a process that has and looks up some of its entries."""
    count = len(opening())

    def look_up(source: list[Any]) -> None:
        source += [opening()]
        for index in np.random.default_rng(0).permutation(count)[:LOOKED_UP]:
            source[0].locate(index)

    before, after = in_process(partial(look_up, []))
    row = {"name": GENERATED, "ms": 1e3 * statistics.median(seconds), "x": None, "seconds": seconds}
    return row | {"before_mib": before, "after_mib": after, "entries": count}


def in_a_worker(look_up: Callable[[int], object], count: int) -> tuple[float, float]:
    """Returns the MiB that a forked process has for itself before and after it has looked up all images."""

    def work() -> None:
        for index in order:
            look_up(index)

    order = np.random.default_rng(0).permutation(count)
    look_up(0)
    return in_process(work)


def in_process(work: Callable[[], object]) -> tuple[float, float]:
    """Returns the MiB that a forked process has for itself before and after it works."""

    def run() -> None:
        before = unique_mib()
        work()
        answers.put((before, unique_mib()))

    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    worker = context.Process(target=run)
    worker.start()
    found: tuple[float, float] = answers.get()
    worker.join()
    return found


def unique_mib() -> float:
    """Returns the MiB of memory that this process shares with no other one."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
