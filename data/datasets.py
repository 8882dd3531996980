"""The data sets by name: how each is opened, and the statistics that its pixels are normalised with.

A data set is one entry in `DATASETS`, with a source of images behind it if none of the present ones fits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from utils.cli import did_you_mean
from utils.text import printable

from .shapes import ShapesSource
from .sources import DIGITS, SHAPES, SPLITS, CifarSource, DigitsSource, FolderSource, ImageSource
from .zipped import ZipSource

Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class DatasetSpec:
    """What is known about a data set without opening it.

    `open(root, split, **options)` returns its images, with the options of `open_source`. `mean` and `std` are those
    of its training pixels on a scale of 0 to 1. `image_size` is the side in pixels of its images, None where it varies.
    """

    open: Callable[..., ImageSource]
    mean: Channels
    std: Channels
    image_size: int | None = None


def _open_imagenet(
    root: str | Path, split: str, *, zip_mode: bool, cache_mode: str, rank: int, world_size: int, **_: Any
) -> ImageSource:
    if zip_mode:
        return ZipSource(root, split, cache_mode=cache_mode, rank=rank, world_size=world_size)
    return FolderSource(root, split)


def _open_cifar(root: str | Path, split: str, *, download: bool, **_: Any) -> ImageSource:
    return CifarSource(root, split, download=download)


def _open_digits(_root: str | Path, split: str, **_: Any) -> ImageSource:
    return DigitsSource(split)


def _open_shapes(_root: str | Path, split: str, **_: Any) -> ImageSource:
    return ShapesSource(split)


DATASETS: dict[str, DatasetSpec] = {
    "imagenet": DatasetSpec(_open_imagenet, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD),
    "cf100": DatasetSpec(
        _open_cifar,
        mean=(0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
        std=(0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
        image_size=32,
    ),
    DIGITS: DatasetSpec(_open_digits, mean=(0.305855,) * 3, std=(0.376279,) * 3, image_size=8),
    SHAPES: DatasetSpec(
        _open_shapes, mean=(0.500748, 0.501421, 0.502679), std=(0.290556, 0.293015, 0.292761), image_size=32
    ),
}
WITHOUT_PATH = (DIGITS, SHAPES)
# What stands for no data path, nothing and what the configuration has by default; and for no data set, its default.
NO_PATH = ("", "/path/to/imgnet/")
DEFAULT = "imagenet"


def resolve_name(dataset: str, data_path: str | Path) -> str:
    """Returns the key in `DATASETS`: that of `dataset`, or of a data path that is a word and names one.

    Raises ValueError for an unknown data set, and where the two contradict each other: a word wins over the default
    alone, and a data set without files has no folder to read.
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
                f"the data set {dataset} (DATA.DATASET, --dataset) and the data path {path!r}, which stands for a data "
                f"set of its own, contradict each other: give another data path, or --dataset {path}"
            )
        return path
    if dataset in WITHOUT_PATH and path not in NO_PATH:
        raise ValueError(
            f"the data set {dataset} (DATA.DATASET, --dataset) has no folder and would leave {printable(path)} unread: "
            f"give --dataset {DEFAULT} to read image folders there, or the word {dataset} as data path"
        )
    return dataset


def open_source(
    dataset: str,
    data_path: str | Path,
    split: str,
    *,
    zip_mode: bool = False,
    cache_mode: str = "part",
    download: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> ImageSource:
    """Opens the images of a split, `train` or `val`, without ever building the other one.

    `zip_mode`, `cache_mode`, `rank` and `world_size` are for zipped image folders (see `ZipSource`), `download` is
    for data sets that can be fetched. Raises ValueError, with the remedy, where the data is missing or malformed, and
    where the options contradict each other.
    """
    assert split in SPLITS
    name = resolve_name(dataset, data_path)
    if name not in WITHOUT_PATH and not str(data_path):
        raise ValueError(
            f"no data path for {name}: give --data-path PATH, or one of {', '.join(WITHOUT_PATH)}, which need none"
        )
    if zip_mode and name != DEFAULT:
        raise ValueError(f"--zip (DATA.ZIP_MODE) is for zipped image folders, which {name} is not: leave it out")
    return DATASETS[name].open(
        data_path,
        split,
        zip_mode=zip_mode,
        cache_mode=cache_mode,
        download=download,
        rank=rank,
        world_size=world_size,
    )
