"""Data sets that torchvision knows by name, in the files in which their authors publish them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torchvision import datasets

from utils.files import user_path
from utils.text import shortened

from .sources import SPLITS, WHOLE, FileSource, ImageSource, PackedStrings, stored_split

Files = Iterable[tuple[str | Path, int]]  # each with its label


class NamedSet(NamedTuple):
    """How a data set of torchvision is read.

    Attributes:
        train: the arguments that make its class read the training images.
        val: likewise those to evaluate on, the validation part where there is one, else the test part; None where the
            set has one part alone.
        files: the image files of an instance with their labels; None if it has the pixels in memory.
        title: its name in messages, where it is not that of the class.
        num_classes: how many classes there are, where torchvision has no names for them.
    """

    train: dict[str, Any]
    val: dict[str, Any] | None
    files: Callable[[Any], Files] | None = None
    title: str = ""
    num_classes: int = 0


def _by_loader(dataset: Any) -> Files:
    """Reads the list of files through the public interface: such a set was given `str` as the loader of its images."""
    return (dataset[index] for index in range(len(dataset)))


def _of_pets(dataset: Any) -> Files:
    return zip(dataset._images, dataset._labels, strict=True)  # its class takes no loader


def _of_gtsrb(dataset: Any) -> Files:
    return dataset._samples  # likewise


def _of_caltech101(dataset: Any) -> Files:
    folder = Path(dataset.root, "101_ObjectCategories")
    for label, number in zip(dataset.y, dataset.index, strict=True):
        yield folder / dataset.categories[label] / f"image_{number:04}.jpg", label


def _of_caltech256(dataset: Any) -> Files:
    folder = Path(dataset.root, "256_ObjectCategories")
    for label, number in zip(dataset.y, dataset.index, strict=True):
        yield folder / dataset.categories[label] / f"{label + 1:03}_{number:04}.jpg", label


TRAIN: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
TEST: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
VAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "val"})

NAMED_SETS = {
    "CIFAR10": NamedSet(*TRAIN, title="CIFAR-10"),
    "CIFAR100": NamedSet(*TRAIN, title="CIFAR-100"),
    "MNIST": NamedSet(*TRAIN),
    "FashionMNIST": NamedSet(*TRAIN),
    "KMNIST": NamedSet(*TRAIN),
    "STL10": NamedSet(*TEST),
    "SVHN": NamedSet(*TEST, num_classes=10),
    "Flowers102": NamedSet(*VAL, _by_loader),
    "DTD": NamedSet(*VAL, _by_loader),
    "FGVCAircraft": NamedSet(*VAL, _by_loader),
    "RenderedSST2": NamedSet(*VAL, _by_loader),
    "Imagenette": NamedSet(*VAL, _by_loader),
    "Food101": NamedSet(*TEST, _by_loader),
    "StanfordCars": NamedSet(*TEST, _by_loader),
    "GTSRB": NamedSet(*TEST, _of_gtsrb, num_classes=43),
    "OxfordIIITPet": NamedSet({"split": "trainval"}, {"split": "test"}, _of_pets),
    "Country211": NamedSet({"split": "train"}, {"split": "valid"}, _by_loader),
    "INaturalist": NamedSet({"version": "2021_train"}, {"version": "2021_valid"}, _by_loader),
    "EuroSAT": NamedSet({}, None, _by_loader),
    "SUN397": NamedSet({}, None, _by_loader),
    "Caltech101": NamedSet({}, None, _of_caltech101),
    "Caltech256": NamedSet({}, None, _of_caltech256),
}


def open_torchvision(name: str, root: str | Path, split: str, *, download: bool = False) -> ImageSource:
    """Opens a split of one of `NAMED_SETS` in the folder that torchvision takes as `root`.

    With `download` missing files are downloaded; let one process do so before the others.

    Raises:
        ValueError: the files are missing or damaged, or a package that reads them is.
    """
    assert split in (*SPLITS, WHOLE)
    named = NAMED_SETS[name]
    part = named.val if split == "val" else named.train
    assert part is not None
    folder = user_path(root)
    dataset = _instance(name, named, folder, part, download)
    classes = _class_names(dataset) or [str(label) for label in range(named.num_classes)]
    title = f"{named.title or name} {stored_split(split)}"
    if named.files is None:
        return ArraySource(dataset, classes, title)
    return NamedFileSource(folder, named.files(dataset), classes)


def _instance(name: str, named: NamedSet, root: Path, part: dict[str, Any], download: bool) -> Any:
    reader = getattr(datasets, name)
    folder = root / getattr(reader, "base_folder", "")
    missing = (
        f"{named.title or name} is missing or damaged in {folder}: set DATA.DATA_PATH to the folder that holds it, or "
        "DATA.DOWNLOAD True to fetch it"
    )
    if not download and not folder.is_dir():
        raise ValueError(missing)
    loader = {"loader": str} if named.files is _by_loader else {}
    try:
        return reader(str(folder.parent if folder != root else root), **part, **loader, download=download)
    except ImportError as error:
        raise ValueError(f"{name} needs the package {error.name}: pip install {error.name}") from error
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # of torchvision, for missing and damaged files
        raise ValueError(f"{missing} ({shortened(' '.join(str(error).split()))})") from error


def _class_names(dataset: Any) -> list[str]:
    """Returns the names that torchvision has, the first one of each class; none where it has none."""
    for attribute in ("classes", "categories", "all_categories"):
        names = getattr(dataset, attribute, None)
        if names:
            return [name if isinstance(name, str) else name[0] for name in names]
    return []


class ArraySource(ImageSource):
    """A set that torchvision has read into memory."""

    def __init__(self, dataset: Any, classes: list[str], title: str) -> None:
        self._dataset, self._title, self.classes = dataset, title, classes
        self.labels = np.array([dataset[index][1] for index in range(len(dataset))], dtype=np.int64)

    def _image(self, index: int) -> Image.Image:
        return self._dataset[index][0].convert("RGB")

    def locate(self, index: int) -> str:
        """Returns the number of the image in its part of the set."""
        return f"{self._title} image {index}"


class NamedFileSource(FileSource):
    """A set of image files, in the order of their names: that of torchvision may be the one of the file system."""

    def __init__(self, root: Path, files: Files, classes: list[str]) -> None:
        self.folder, self.classes = root, classes
        rows = sorted((Path(path).relative_to(root).as_posix(), int(label)) for path, label in files)
        self.paths = PackedStrings(path for path, _ in rows)
        self.labels = np.array([label for _, label in rows], dtype=np.int64)
