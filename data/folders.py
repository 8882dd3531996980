"""Image folders with one folder per class, in the order of torchvision's ImageFolder."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.files import user_path
from utils.text import printable

from .decode import EXTENSIONS
from .sources import DIGITS, SHAPES, SPLITS, WHOLE, FileSource, PackedStrings

Identity = tuple[int, int]  # of a folder, by whichever path it is reached: device, inode


class FolderSource(FileSource):
    """The images below `root/split/<class>/`, at any depth; symbolic links are followed, hidden names left out.

    `paths` are theirs, relative to `folder`.

    Raises ValueError for a missing folder, a class without images, a folder that is reached in two ways, and a class
    that only one of `train` and `val` has: labels are positions in the sorted class names, so those of the two splits
    would mean different things. With `same_classes` off they may, as people whom a face network has never seen do.
    """

    def __init__(self, root: str | Path, split: str, *, same_classes: bool = True) -> None:
        assert split in (*SPLITS, WHOLE)
        self.folder = _folder_of(user_path(root), split)
        self.classes = class_names(self.folder)
        if not self.classes:
            raise ValueError(
                f"no class folders at {self.folder}: a data path holds train/<class>/* and val/<class>/*"
                + f"; the words `{DIGITS}` and `{SHAPES}` as data path need no folder" * same_classes
            )
        if same_classes and split != WHOLE:
            _check_same_classes(self.folder, self.folder.with_name("val" if split == "train" else "train"))
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


def _folder_of(root: Path, split: str) -> Path:
    """Returns the folder of a split; of the whole, that of the training images, or the root where it has no splits."""
    if split != WHOLE:
        return root / split
    return root / "train" if (root / "train").is_dir() else root


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
