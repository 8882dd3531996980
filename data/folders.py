"""Image folders with one folder per class; the images of a class are in the order of torchvision's ImageFolder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.files import user_path
from utils.text import printable

from .class_names import in_order
from .decode import EXTENSIONS
from .sources import DIGITS, SHAPES, SPLITS, EncodedSource, PackedStrings

Identity = tuple[int, int]  # of a folder, by whichever path it is reached: device, inode
# How other projects call the folders of splits.
OTHER_SPLITS = {"test", "testing", "training", "valid", "validation"}


class FolderSource(EncodedSource):
    """The images below `root/split/<class>/`, at any depth; symbolic links are followed, hidden names left out.

    `paths` are theirs, relative to `folder`. The labels are positions in the class names, which are ordered by number
    if all are numbers, else by text. For `val`, a root that holds neither split but class folders is taken as the split
    itself: ImageNet-A, -R, -V2 and -Sketch come so.

    Raises ValueError for a missing folder, a class without images, a folder that is reached in two ways, and a class
    that only one of `train` and `val` has: their labels would mean different things. With `same_classes` off they may,
    as people whom a face network has never seen do; names of people are always ordered by text.
    """

    def __init__(self, root: str | Path, split: str, *, same_classes: bool = True) -> None:
        assert split in SPLITS
        root = user_path(root)
        self.folder = split_folder(root, split)
        names = class_names(self.folder)
        self.classes = in_order(names) if same_classes else names
        if not self.classes:
            raise ValueError(
                f"no class folders at {self.folder}: a data path holds train/<class>/* and val/<class>/*"
                + f"; the words `{DIGITS}` and `{SHAPES}` as data path need no folder" * same_classes
            )
        if self.folder == root:
            self.notes = (f"{printable(root)} holds neither train/ nor val/: its own folders are taken as the classes",)
        elif same_classes:
            _check_same_classes(self.folder, root / ("val" if split == "train" else "train"))
        paths, labels = [], []
        for path, label in image_files(self.folder, self.classes):
            paths.append(path)
            labels.append(label)
        self.paths = PackedStrings(paths)
        self.labels = np.array(labels, dtype=np.int64)
        self._check_no_class_is_empty()

    def _check_no_class_is_empty(self) -> None:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        if not counts.all():
            empty = printable(self.folder / self.classes[int(counts.argmin())])
            raise ValueError(f"no image in {empty}: add one ({', '.join(EXTENSIONS)}) or remove the folder")

    def _read(self, index: int) -> bytes:
        return (self.folder / self.paths[index]).read_bytes()

    def locate(self, index: int) -> str:
        """Returns the path of the file."""
        return printable(self.folder / self.paths[index])


def split_folder(root: Path, split: str) -> Path:
    """Returns the folder of a split: `root/split`; for `val`, `root` where it holds class folders and no splits.

    Raises:
        ValueError: some of these folders look like splits of other names.
    """
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


def _holds_images(folder: Path) -> bool:
    """Returns whether there is an image directly in a folder, so that a folder of data sets is not taken for one."""
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(EXTENSIONS) and not _is_hidden(entry) for entry in entries)


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
    return sorted(entry.name for entry in os.scandir(folder) if not _is_hidden(entry) and _is_folder(entry))


def image_files(folder: Path, classes: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yields the path of each image below `folder/<class>/`, relative to `folder`, with the position of its class.

    Symbolic links are followed; what is hidden (`.ipynb_checkpoints/`, `._cat.jpg`) is left out. A link that leads
    nowhere counts as an image if it has the name of one.

    Raises:
        ValueError: links lead to one folder in two ways, so that its images would count twice, or without end.
    """
    seen = {_identity(place): place for place in (folder, *folder.resolve().parents)}
    for label, name in enumerate(classes):
        for place, images in sorted(_walk(folder, name, seen)):
            yield from ((f"{place}/{image}", label) for image in sorted(images))


def _walk(folder: Path, name: str, seen: dict[Identity, Path]) -> Iterator[tuple[str, list[str]]]:
    """Yields `name` and every folder below it, relative to `folder`, with the names of the images in it."""
    waiting = [name]
    while waiting:
        place = waiting.pop()
        _enter(folder / place, seen)
        images = []
        with os.scandir(folder / place) as entries:
            for entry in entries:  # a million of them: no system call for any but links
                if _is_hidden(entry):
                    continue
                if _is_folder(entry):
                    waiting.append(f"{place}/{entry.name}")
                elif entry.name.lower().endswith(EXTENSIONS) and _is_file(entry):
                    images.append(entry.name)
        yield place, images


def _enter(path: Path, seen: dict[Identity, Path]) -> None:
    """Records that a folder is read; raises ValueError if it was reached before, through a symbolic link."""
    other = seen.setdefault(_identity(path), path)
    if other is not path:
        raise ValueError(
            f"{printable(path)} and {printable(other)} are one folder, whose images would count more than once: "
            "remove the symbolic link"
        )


def _identity(path: Path) -> Identity:
    status = path.stat()
    return status.st_dev, status.st_ino


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link in a circle
        return entry.is_dir()
    return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a file or a broken link, and not a pipe or a socket, which would block a reader."""
    with suppress(OSError):
        return entry.is_file() or not os.path.exists(entry.path)
    return True
