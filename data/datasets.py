"""The data sets by name: how each is opened, and the statistics of its pixels.

A data set is one entry in `DATASETS`, and a new `Source` if no existing one fits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any, Literal, NamedTuple

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from yacs.config import CfgNode

from utils import distributed
from utils.cli import did_you_mean
from utils.text import printable

from .cityscapes import CityscapesSource
from .decode import MODES, build_decoder
from .digits import DigitsSource
from .formats import FORMATS, format_of
from .readers import READERS
from .shapes import ShapesSource
from .sources import DIGITS, SHAPES, SPLITS, WHOLE, ImageSource, Source, stored_split
from .splits import divide, is_divided
from .torchvision_sets import NAMED_SETS, open_torchvision

Channels = tuple[float, float, float]  # red, green, blue
GREY: Channels = (0.299, 0.587, 0.114)  # the share of each in the grey of Pillow (ITU-R BT.601)


class Statistics(NamedTuple):
    """Mean and standard deviation of the pixels of each channel, on a scale of 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in self)
        return f"mean {mean}, std {std}"


@dataclass(frozen=True)
class DatasetSpec:
    """A data set.

    Attributes:
        open: `open(cfg, split, download=..., rank=..., world_size=...)` returns its images, as `open_source` does;
            `split` may also be `WHOLE`, unless the labels are of another kind than `classes`.
        mean: of the training pixels, on a scale of 0 to 1.
        std: likewise.
        image_size: the side of the images in pixels; None if it varies.
        labels: the kind of labels, which the task must need: `classes` (one per image), `masks` (a class per pixel) or
            `identities` (a class per image, such as a person; `train` and `val` may have different ones).
        has_formats: whether its images may be stored in any of `FORMATS`.
        has_val: whether it has images to evaluate on; without, they are a part of the others (`splits.py`).
    """

    open: Callable[..., Source]
    mean: Channels = IMAGENET_DEFAULT_MEAN
    std: Channels = IMAGENET_DEFAULT_STD
    image_size: int | None = None
    labels: Literal["classes", "masks", "identities"] = "classes"
    has_formats: bool = False
    has_val: bool = True

    def statistics(self, channels: int) -> Statistics | None:
        """Returns the statistics for images of 1 or 3 channels; None for others.

        The mean of grey pixels is the weighted mean of the colours. So is their standard deviation if the colours rise
        and fall together, as they do in digits and nearly do in photographs.
        """
        if channels == 3:
            return Statistics(self.mean, self.std)
        grey = (sum(map(mul, GREY, values)) for values in (self.mean, self.std))
        return Statistics(*((value,) for value in grey)) if channels == 1 else None


def _open_imagenet(cfg: CfgNode, split: str, *, rank: int, world_size: int, **_: Any) -> ImageSource:
    return FORMATS[format_of(cfg)](cfg, split, same_classes=True, rank=rank, world_size=world_size)


def _open_faces(cfg: CfgNode, split: str, *, rank: int, world_size: int, **_: Any) -> ImageSource:
    return FORMATS[format_of(cfg)](cfg, split, same_classes=False, rank=rank, world_size=world_size)


def _open_torchvision(name: str, cfg: CfgNode, split: str, *, download: bool, **_: Any) -> ImageSource:
    return open_torchvision(name, cfg.DATA_PATH, split, download=download)


def _open_reader(reader: str, name: str, cfg: CfgNode, split: str, *, download: bool, **_: Any) -> ImageSource:
    return READERS[reader](name, cfg.DATA_PATH, split, download=download)


def _open_digits(_cfg: CfgNode, split: str, **_: Any) -> ImageSource:
    return DigitsSource(stored_split(split))


def _open_shapes(_cfg: CfgNode, split: str, **_: Any) -> ImageSource:
    return ShapesSource(stored_split(split))


def _open_cityscapes(cfg: CfgNode, split: str, **_: Any) -> Source:
    return CityscapesSource(cfg.DATA_PATH, split)


CIFAR10 = DatasetSpec(
    partial(_open_torchvision, "CIFAR10"),
    mean=(0.49139968, 0.48215841, 0.44653091),
    std=(0.24703223, 0.24348513, 0.26158784),
    image_size=32,
)
CIFAR100 = DatasetSpec(
    partial(_open_torchvision, "CIFAR100"),
    mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
    image_size=32,
)
TORCHVISION = "torchvision/"
IMAGE_SIZES = {"FashionMNIST": 28, "KMNIST": 28, "SVHN": 32, "STL10": 96, "EuroSAT": 64}

DATASETS: dict[str, DatasetSpec] = {
    "imagenet": DatasetSpec(_open_imagenet, has_formats=True),
    "cf10": CIFAR10,
    "cf100": CIFAR100,
    DIGITS: DatasetSpec(_open_digits, mean=(0.305855,) * 3, std=(0.376279,) * 3, image_size=8),
    SHAPES: DatasetSpec(
        _open_shapes, mean=(0.500748, 0.501421, 0.502679), std=(0.290556, 0.293015, 0.292761), image_size=32
    ),
    # The usual statistics for these two, not those of their own pixels.
    "cityscapes": DatasetSpec(_open_cityscapes, labels="masks"),
    "faces": DatasetSpec(_open_faces, mean=(0.5,) * 3, std=(0.5,) * 3, labels="identities", has_formats=True),
}
# Those that torchvision knows by name, with the statistics of ImageNet unless their own are usual.
DATASETS |= {
    f"{TORCHVISION}{name}": DatasetSpec(
        partial(_open_torchvision, name), image_size=IMAGE_SIZES.get(name), has_val=named.val is not None
    )
    for name, named in NAMED_SETS.items()
} | {
    f"{TORCHVISION}CIFAR10": CIFAR10,
    f"{TORCHVISION}CIFAR100": CIFAR100,
    f"{TORCHVISION}MNIST": DatasetSpec(
        partial(_open_torchvision, "MNIST"), mean=(0.1307,) * 3, std=(0.3081,) * 3, image_size=28
    ),
}
WITHOUT_PATH = (DIGITS, SHAPES)
# The values of DATA.DATA_PATH and DATA.DATASET that mean: not set.
NO_PATH = ("", "/path/to/imgnet/")
DEFAULT = "imagenet"


def is_known(name: str) -> bool:
    """Returns whether a name is that of a data set: an entry of `DATASETS`, or one for a reader, `hfds/NAME`."""
    reader, _, rest = name.partition("/")
    return name in DATASETS or (reader in READERS and rest != "")


def spec_of(name: str) -> DatasetSpec:
    """Returns the data set of a name; raises ValueError for an unknown one."""
    if not is_known(name):
        raise ValueError(
            f"unknown data set {name!r} in DATA.DATASET{did_you_mean(name, DATASETS)} "
            f"(known: {', '.join(known_names())})"
        )
    reader, _, rest = name.partition("/")
    return DATASETS[name] if name in DATASETS else DatasetSpec(partial(_open_reader, reader, rest))


def known_names(labels: str | None = None) -> list[str]:
    """Returns the names of all data sets, or of those with this kind of labels; each library stands for its own."""
    own = [name for name in DATASETS if not name.startswith(TORCHVISION) and labels in (None, DATASETS[name].labels)]
    libraries = [TORCHVISION, *(f"{reader}/" for reader in READERS)] if labels in (None, "classes") else []
    return [*own, *(f"{library}NAME" for library in libraries)]


def resolve_name(dataset: str, data_path: str | Path) -> str:
    """Returns the name of the data set: `dataset`, or the data path if it is a word such as `digits`.

    Raises ValueError for an unknown data set and if the two contradict each other: a word overrides only the default
    data set, and a data set without files takes no folder.
    """
    path = str(data_path)
    spec_of(dataset)  # raises ValueError for an unknown one
    if path in WITHOUT_PATH:
        if dataset not in (path, DEFAULT):
            raise ValueError(
                f"DATA.DATASET {dataset} and DATA.DATA_PATH {path}, a word that stands for a data set of its own, "
                f"contradict each other: set another DATA.DATA_PATH, or DATA.DATASET to {path}"
            )
        return path
    if dataset in WITHOUT_PATH and path not in NO_PATH:
        raise ValueError(
            f"DATA.DATASET {dataset} has no folder and would leave DATA.DATA_PATH {printable(path)} unread: "
            f"set DATA.DATASET to {DEFAULT} to read image folders there, or DATA.DATA_PATH to the word {dataset}"
        )
    return dataset


def open_source(cfg: CfgNode, split: str, *, channels: int = 3, rank: int = 0, world_size: int = 1) -> Source:
    """Opens the images of a split, `train` or `val`, without ever building the other one.

    `cfg` is the section DATA: DATASET and DATA_PATH say what is opened (see `resolve_name`), FORMAT how it is stored
    (see `FORMATS`; INDEX is for `FolderSource`, CACHE_MODE, and `rank` and `world_size`, are for `ZipSource`),
    VAL_FRACTION and FOLDS that both splits are parts of the training images (see `divide`), DECODER what decodes image
    files, and DOWNLOAD that missing files may be fetched, which the first process does before the others; then all
    processes must call this. `channels` are those of the images that it returns. Raises ValueError, with the remedy,
    where the data is missing or malformed, and where the keys contradict each other.
    """
    assert split in SPLITS
    name = resolve_name(cfg.DATASET, cfg.DATA_PATH)
    spec = spec_of(name)
    _check(cfg, name, spec)
    opened = partial(
        spec.open, cfg, WHOLE if is_divided(cfg) else split, download=False, rank=rank, world_size=world_size
    )
    if cfg.DOWNLOAD:
        distributed.broadcast_from_rank0(lambda: len(opened(download=True)))
    source = opened()
    if isinstance(source, ImageSource) and is_divided(cfg):
        source = divide(source, cfg, split)
    source.mode = MODES[channels]
    if source.decoder is not None:
        source.decoder = build_decoder(cfg.DECODER)
        source.notes += (f"JPEG files are decoded by {source.decoder}",)
    return source


def _check(cfg: CfgNode, name: str, spec: DatasetSpec) -> None:
    """Raises ValueError for keys that contradict each other, or the data set."""
    if name not in WITHOUT_PATH and not cfg.DATA_PATH:
        raise ValueError(
            f"no data path for {name}: set DATA.DATA_PATH to its folder, or to one of the words "
            f"{', '.join(WITHOUT_PATH)}, which need none"
        )
    if not spec.has_formats and format_of(cfg) != "folder":
        key = "DATA.ZIP_MODE" if cfg.ZIP_MODE else f"DATA.FORMAT {cfg.FORMAT}"
        raise ValueError(f"{key} is for image folders, which {name} is not: leave it out")
    if is_divided(cfg) and spec.labels != "classes":
        raise ValueError(
            f"DATA.VAL_FRACTION and DATA.FOLDS divide each class, but the labels of {name} are {spec.labels}: leave "
            "them out, and give train and val"
        )
    if not spec.has_val and not is_divided(cfg):
        raise ValueError(f"{name} has no images to evaluate on: set DATA.VAL_FRACTION, such as 0.1, or DATA.FOLDS")
