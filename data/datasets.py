"""The data sets by name: how each is opened, and the statistics of its pixels.

A data set is one entry in `DATASETS`, and a new `Source` if no existing one fits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.datasets import CIFAR10, CIFAR100
from yacs.config import CfgNode

from utils.cli import did_you_mean
from utils.text import printable

from .cifar import CifarSource
from .cityscapes import CityscapesSource
from .decode import build_decoder
from .digits import DigitsSource
from .folders import FolderSource
from .shapes import ShapesSource
from .sources import DIGITS, SHAPES, SPLITS, ImageSource, Source
from .zipped import ZipSource

Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class DatasetSpec:
    """A data set.

    Attributes:
        open: `open(cfg, split, rank=..., world_size=...)` returns its images, as `open_source` does.
        mean: of the training pixels, on a scale of 0 to 1.
        std: likewise.
        image_size: the side of the images in pixels; None if it varies.
        labels: the kind of labels, which the task must need: `classes` (one per image), `masks` (a class per pixel) or
            `identities` (a class per image, such as a person; `train` and `val` may have different ones).
    """

    open: Callable[..., Source]
    mean: Channels
    std: Channels
    image_size: int | None = None
    labels: Literal["classes", "masks", "identities"] = "classes"


def _open_imagenet(cfg: CfgNode, split: str, *, rank: int, world_size: int) -> ImageSource:
    if cfg.ZIP_MODE:
        return ZipSource(cfg.DATA_PATH, split, cache_mode=cfg.CACHE_MODE, rank=rank, world_size=world_size)
    return FolderSource(cfg.DATA_PATH, split)


def _open_cifar(reader: type[CIFAR10], cfg: CfgNode, split: str, **_: Any) -> ImageSource:
    return CifarSource(reader, cfg.DATA_PATH, split, download=cfg.DOWNLOAD)


def _open_digits(_cfg: CfgNode, split: str, **_: Any) -> ImageSource:
    return DigitsSource(split)


def _open_shapes(_cfg: CfgNode, split: str, **_: Any) -> ImageSource:
    return ShapesSource(split)


def _open_cityscapes(cfg: CfgNode, split: str, **_: Any) -> Source:
    return CityscapesSource(cfg.DATA_PATH, split)


def _open_faces(cfg: CfgNode, split: str, **_: Any) -> ImageSource:
    return FolderSource(cfg.DATA_PATH, split, same_classes=False)


DATASETS: dict[str, DatasetSpec] = {
    "imagenet": DatasetSpec(_open_imagenet, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
    "cf10": DatasetSpec(
        partial(_open_cifar, CIFAR10),
        mean=(0.49139968, 0.48215841, 0.44653091),
        std=(0.24703223, 0.24348513, 0.26158784),
        image_size=32,
    ),
    "cf100": DatasetSpec(
        partial(_open_cifar, CIFAR100),
        mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
        image_size=32,
    ),
    DIGITS: DatasetSpec(_open_digits, mean=(0.305855,) * 3, std=(0.376279,) * 3, image_size=8),
    SHAPES: DatasetSpec(
        _open_shapes, mean=(0.500748, 0.501421, 0.502679), std=(0.290556, 0.293015, 0.292761), image_size=32
    ),
    # The usual statistics for these two, not those of their own pixels.
    "cityscapes": DatasetSpec(_open_cityscapes, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, labels="masks"),
    "faces": DatasetSpec(_open_faces, mean=(0.5,) * 3, std=(0.5,) * 3, labels="identities"),
}
WITHOUT_PATH = (DIGITS, SHAPES)
# The values of DATA.DATA_PATH and DATA.DATASET that mean: not set.
NO_PATH = ("", "/path/to/imgnet/")
DEFAULT = "imagenet"


def resolve_name(dataset: str, data_path: str | Path) -> str:
    """Returns the key in `DATASETS`: `dataset`, or the data path if it is a word such as `digits`.

    Raises ValueError for an unknown data set and if the two contradict each other: a word overrides only the default
    data set, and a data set without files takes no folder.
    """
    path = str(data_path)
    if dataset not in DATASETS:
        raise ValueError(
            f"unknown data set {dataset!r} in DATA.DATASET{did_you_mean(dataset, DATASETS)} "
            f"(known: {', '.join(DATASETS)})"
        )
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


def open_source(cfg: CfgNode, split: str, *, rank: int = 0, world_size: int = 1) -> Source:
    """Opens the images of a split, `train` or `val`, without ever building the other one.

    `cfg` is the section DATA: DATASET and DATA_PATH say what is opened (see `resolve_name`), ZIP_MODE and CACHE_MODE
    are for zipped image folders (see `ZipSource`, also for `rank` and `world_size`), DOWNLOAD for data sets that can be
    fetched, DECODER for image files. Raises ValueError, with the remedy, where the data is missing or malformed, and
    where the keys contradict each other.
    """
    assert split in SPLITS
    name = resolve_name(cfg.DATASET, cfg.DATA_PATH)
    if name not in WITHOUT_PATH and not cfg.DATA_PATH:
        raise ValueError(
            f"no data path for {name}: set DATA.DATA_PATH to its folder, or to one of the words "
            f"{', '.join(WITHOUT_PATH)}, which need none"
        )
    if cfg.ZIP_MODE and name != DEFAULT:
        raise ValueError(f"DATA.ZIP_MODE is for zipped image folders, which {name} is not: leave it out")
    source = DATASETS[name].open(cfg, split, rank=rank, world_size=world_size)
    if source.decoder is not None:
        source.decoder = build_decoder(cfg.DECODER)
        source.notes += (f"JPEG files are decoded by {source.decoder}",)
    return source
