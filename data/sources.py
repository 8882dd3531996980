"""Stored images with their labels: an image folder, CIFAR's files, the embedded digits."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from utils.files import user_path
from utils.text import printable

from .decode import EXTENSIONS, decode_rgb
from .folders import class_names, image_files

SPLITS = ("train", "val")
IGNORED = 255  # in a mask, a pixel without a class
# Data paths that are words: data sets that come with the project.
DIGITS, SHAPES = "digits", "shapes"


class Source(ABC):
    """Images as they are stored, each with what is known of it, before any transform.

    `classes` holds the class names in the order of the labels, so that its length is the number of classes.
    """

    classes: list[str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, Any]:
        """Returns the image in RGB and its label; raises OSError or ValueError where it cannot be read or decoded."""

    @abstractmethod
    def locate(self, index: int) -> str:
        """Returns where the image comes from (`path/to/cat.jpg`, `digits image 17`), printable, for messages."""


class ImageSource(Source):
    """Images with one label each.

    `labels` is int64 (N,). A subclass sets it and `classes`, reads an image in `_image` and says in `locate` where it
    comes from.
    """

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Returns the image in RGB and its label; raises OSError or ValueError where it cannot be read or decoded."""
        return self._image(index), int(self.labels[index])

    @abstractmethod
    def _image(self, index: int) -> Image.Image:
        """Returns the image in RGB; raises as `load` does."""


class PackedStrings:
    """Many strings in two objects instead of a million: forked workers share them, and others receive them quickly."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.fromiter(accumulate(map(len, encoded), initial=0), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


class FolderSource(ImageSource):
    """The images below `root/split/<class>/`, at any depth; symbolic links are followed, hidden names left out.

    `paths` are theirs, relative to `folder`.

    Raises ValueError for a missing folder, a class without images, a folder that is reached in two ways, and a class
    that only one of `train` and `val` has: labels are positions in the sorted class names, so those of the two splits
    would mean different things. With `same_classes` off they may, as people whom a face network has never seen do.
    """

    def __init__(self, root: str | Path, split: str, *, same_classes: bool = True) -> None:
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

    def _image(self, index: int) -> Image.Image:
        with open(self.folder / self.paths[index], "rb") as file:
            return decode_rgb(file)

    def locate(self, index: int) -> str:
        """Returns the path of the file."""
        return printable(self.folder / self.paths[index])


def _check_same_classes(folder: Path, other: Path) -> None:
    """Raises a ValueError that names a class which only one of two splits has; reads no more than class names."""
    names, other_names = class_names(folder), class_names(other)
    differing = sorted(set(names) ^ set(other_names))
    if other_names and differing:
        present, absent = (folder, other) if differing[0] in names else (other, folder)
        raise ValueError(
            f"{present} has a class {differing[0]!r} and {absent} has not: train and val need the same class folders"
        )


class CifarSource(ImageSource):
    """CIFAR-10 or CIFAR-100 in its python version, 32x32 pixels; `val` is its test part.

    `reader` is torchvision's, which checks the files. With `download` missing files are downloaded; let one process do
    so before the others.
    """

    def __init__(self, reader: type[CIFAR10], root: str | Path, split: str, *, download: bool = False) -> None:
        assert split in SPLITS
        folder = user_path(root) / reader.base_folder
        name = reader.__name__.replace("CIFAR", "CIFAR-")
        try:
            cifar = reader(folder.parent, train=split == "train", download=download)
        except RuntimeError as error:  # torchvision raises it for missing and damaged files
            raise ValueError(
                f"{name} is missing or damaged in {folder}: "
                "set DATA.DATA_PATH to the folder that holds it, or DATA.DOWNLOAD True to fetch it"
            ) from error
        self.classes = list(cifar.classes)
        self._images: np.ndarray = cifar.data
        self.labels = np.array(cifar.targets, dtype=np.int64)
        self._name = f"{name} {split}"

    def _image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def locate(self, index: int) -> str:
        """Returns the number of the image in its part of CIFAR."""
        return f"{self._name} image {index}"


class DigitsSource(ImageSource):
    """The 1,797 scanned digits of 8x8 pixels that come with the project; every fifth one is in `val`.

    They are the test part of the UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak;
    CC BY 4.0) as scikit-learn ships it; `digits.npz` carries its origin and licence along.
    """

    FILE = Path(__file__).with_name("digits.npz")

    def __init__(self, split: str) -> None:
        assert split in SPLITS
        with np.load(self.FILE, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
        held_out = np.arange(len(labels)) % 5 == 4
        self._numbers = np.flatnonzero(held_out if split == "val" else ~held_out)
        self._images = np.rint(images[self._numbers] * (255 / 16)).astype(np.uint8)  # stored as 0..16
        self.labels = labels[self._numbers].astype(np.int64)
        self.classes = [str(digit) for digit in range(10)]

    def _image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")

    def locate(self, index: int) -> str:
        """Returns the number of the image among all 1,797, from 0."""
        return f"digits image {self._numbers[index]}"
