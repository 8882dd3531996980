"""Image folders with one folder per class; the images of a class are in the order of torchvision's ImageFolder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from utils.files import user_path
from utils.text import printable

from .class_names import in_order
from .decode import EXTENSIONS
from .index import NOWHERE, Listing, State, find_listing, packed_states, state
from .sources import DIGITS, SHAPES, SPLITS, WHOLE, FileSource, PackedStrings

Identity = tuple[int, int]  # of a folder, by whichever path it is reached: device, inode
# How other projects call the folders of splits.
OTHER_SPLITS = {"test", "testing", "training", "valid", "validation"}


class FolderSource(FileSource):
    """The images below `root/split/<class>/`, at any depth; symbolic links are followed, hidden names left out.

    `paths` are theirs, relative to `folder`. The labels are positions in the class names, which are ordered by number
    if all are numbers, else by text. For `val`, a root that holds neither split but class folders is taken as the split
    itself: ImageNet-A, -R, -V2 and -Sketch come so.

    Raises ValueError for a missing folder, a class without images, a folder that is reached in two ways, and a class
    that only one of `train` and `val` has: their labels would mean different things. With `same_classes` off they may,
    as people whom a face network has never seen do; names of people are always ordered by text.

    The list of files is read from its saved index (`data/index.py`) where there is one; with `index` off it is neither
    read nor saved.
    """

    def __init__(self, root: str | Path, split: str, *, same_classes: bool = True, index: bool = True) -> None:
        assert split in (*SPLITS, WHOLE)
        root = user_path(root)
        self.folder = split_folder(root, split)
        names = class_names(self.folder)
        self.classes = in_order(names) if same_classes else names
        if not self.classes:
            raise ValueError(
                f"no class folders at {self.folder}: a data path holds train/<class>/* and val/<class>/*"
                + f"; the words `{DIGITS}` and `{SHAPES}` as data path need no folder" * same_classes
            )
        if split == "val" and self.folder == root:
            self.notes = (f"{printable(root)} holds neither train/ nor val/: its own folders are taken as the classes",)
        elif same_classes and split != WHOLE:
            _check_same_classes(self.folder, root / ("val" if split == "train" else "train"))
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


def split_folder(root: Path, split: str) -> Path:
    """Returns the folder of a split: `root/split`; for `val`, `root` where it holds class folders and no splits.

    The whole is the folder of the training images, or `root` where there is none.

    Raises:
        ValueError: some of these folders look like splits of other names; the whole is asked for, and there is a `val`
            without a `train`.
    """
    if split == WHOLE:
        return _whole_folder(root)
    folder = root / split
    if split == "train" or any(os.path.lexists(root / name) for name in SPLITS):
        return folder
    names = class_names(root)
    others = [name for name in names if name.lower() in OTHER_SPLITS]
    if others:
        raise ValueError(
            f"{root} holds no val/, and a folder {others[0]!r}: rename or link it to val if it is the split to "
            "evaluate, or give a folder that holds class folders alone"
        )
    return root if names and _holds_images(root / names[0]) else folder


def _whole_folder(root: Path) -> Path:
    if (root / "train").is_dir():
        return root / "train"
    splits = [name for name in class_names(root) if name.lower() in OTHER_SPLITS.union(SPLITS)]
    if splits:
        raise ValueError(
            f"{root} holds no train/ to divide, and a folder {splits[0]!r}: rename or link the folder of the training "
            "images to train, or give a folder that holds class folders alone"
        )
    return root


def _holds_images(folder: Path) -> bool:
    """Returns whether there is an image directly in a folder, so that a folder of data sets is not taken for one."""
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".") for entry in entries)


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
