"""Image folders with one folder per class, in the order of torchvision's ImageFolder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from utils.files import user_path
from utils.text import printable

from .decode import EXTENSIONS
from .index import NOWHERE, Listing, State, find_listing, packed_states, state
from .sources import DIGITS, SHAPES, SPLITS, EncodedSource, PackedStrings

Identity = tuple[int, int]  # of a folder, by whichever path it is reached: device, inode


class FolderSource(EncodedSource):
    """The images below `root/split/<class>/`, at any depth; symbolic links are followed, hidden names left out.

    `paths` are theirs, relative to `folder`.

    Raises ValueError for a missing folder, a class without images, a folder that is reached in two ways, and a class
    that only one of `train` and `val` has: labels are positions in the sorted class names, so those of the two splits
    would mean different things. With `same_classes` off they may, as people whom a face network has never seen do.

    The list of files is read from its saved index (`data/index.py`) where there is one; with `index` off it is neither
    read nor saved.
    """

    def __init__(self, root: str | Path, split: str, *, same_classes: bool = True, index: bool = True) -> None:
        assert split in SPLITS
        self.folder = user_path(root) / split
        self.classes = class_names(self.folder)
        if not self.classes:
            raise ValueError(
                f"no class folders at {self.folder}: a data path holds train/<class>/* and val/<class>/*"
                + f"; the words `{DIGITS}` and `{SHAPES}` as data path need no folder" * same_classes
            )
        if same_classes:
            _check_same_classes(self.folder, self.folder.with_name("val" if split == "train" else "train"))
        scanning = partial(scan, self.folder, self.classes)
        listing = find_listing(self.folder, self.classes, scanning) if index else scanning()
        self.paths = listing.paths
        self.labels = np.repeat(np.arange(len(self.classes)), listing.counts)
        self._check_no_class_is_empty()

    def _check_no_class_is_empty(self) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        if not counts.all():
            empty = printable(self.folder / self.classes[int(counts.argmin())])
            raise ValueError(f"no image in {empty}: add one ({', '.join(EXTENSIONS)}) or remove the folder")

    def _read(self, index: int) -> bytes:
        with open(f"{self.folder}/{self.paths[index]}", "rb", buffering=0) as file:  # pathlib takes 5 us longer
            return file.read()

    def locate(self, index: int) -> str:
        """Returns the path of the file."""
        return printable(f"{self.folder}/{self.paths[index]}")


def _check_same_classes(folder: Path, other: Path) -> None:
    """Raises a ValueError that names a class which only one of two splits has; reads no more than class names."""
    names, other_names = class_names(folder), class_names(other)
    differing = sorted(set(names) ^ set(other_names))
    if other_names and differing:
        present, absent = (folder, other) if differing[0] in names else (other, folder)
        raise ValueError(
            f"{present} has a class {differing[0]!r} and {absent} has not: train and val need the same class folders"
        )


def class_names(folder: Path) -> list[str]:
    """Returns the sorted names of the folders in `folder`, except hidden ones; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in _entries(folder)[1] if _is_folder(entry))


def scan(folder: Path, classes: Sequence[str]) -> Listing:
    """Finds the images below `folder/<class>/`, of each class in the order of torchvision's `make_dataset`.

    Symbolic links are followed; what is hidden (`.ipynb_checkpoints/`, `._cat.jpg`) is left out. A link that leads
    nowhere counts as an image if it has the name of one.

    Raises:
        ValueError: links lead to one folder in two ways, so that its images would count twice, or without end.
    """
    seen = {_identity(os.stat(place)): str(place) for place in (folder, *folder.resolve().parents)}
    states: dict[str, State] = {}
    terminated, counts = bytearray(), []
    for name in classes:
        found = sorted(_walk(folder, name, seen, states))
        counts.append(sum(len(images) for _, images in found))
        for place, images in found:
            terminated += "".join(f"{place}/{image}\0" for image in sorted(images)).encode("utf-8", "surrogatepass")
    return Listing(
        paths=PackedStrings.split(terminated),
        counts=np.array(counts, dtype=np.int64),
        places=PackedStrings(states),
        states=packed_states(states.values()),
    )


def _walk(
    folder: Path, name: str, seen: dict[Identity, str], states: dict[str, State]
) -> Iterator[tuple[str, list[str]]]:
    """Yields `name` and every folder below it, relative to `folder`, with the names of the images in it.

    Adds their states, and those of links that lead nowhere and might lead to a folder later.
    """
    waiting = [name]
    while waiting:
        place = waiting.pop()
        path = f"{folder}/{place}"
        states[place] = _enter(path, seen)  # before it is read, so that later changes are noticed
        files, others = _entries(path)
        for entry in others:
            if _is_folder(entry):
                waiting.append(f"{place}/{entry.name}")
            elif _is_file(entry):
                files.append(entry.name)
            if entry.is_symlink() and not os.path.exists(entry.path):
                states[f"{place}/{entry.name}"] = NOWHERE
        yield place, [file for file in files if file.lower().endswith(EXTENSIONS)]


def _entries(path: str | Path) -> tuple[list[str], list[os.DirEntry[str]]]:
    """Returns the names of the files in a folder, and whatever else is in it; nothing hidden.

    There may be a million files: no system call is spent on any of them.
    """
    files, others = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_file(follow_symlinks=False):
                files.append(entry.name)
            else:
                others.append(entry)
    return files, others


def _enter(path: str, seen: dict[Identity, str]) -> State:
    """Records that a folder is read, and returns its state.

    Raises:
        ValueError: it was reached before, through a symbolic link.
    """
    status = os.stat(path)
    other = seen.setdefault(_identity(status), path)
    if other is not path:
        raise ValueError(
            f"{printable(path)} and {printable(other)} are one folder, whose images would count more than once: "
            "remove the symbolic link"
        )
    return state(status)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link in a circle
        return entry.is_dir()
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a file or a broken link, and not a pipe or a socket, which would block a reader."""
    with suppress(OSError):
        return entry.is_file() or not os.path.exists(entry.path)
    return True
