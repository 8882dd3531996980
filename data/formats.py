"""How the images of a data set are stored: a format is one entry in `FORMATS`."""

from collections.abc import Callable
from typing import Any

from yacs.config import CfgNode

from .folders import FolderSource
from .lists import ListSource
from .sources import EncodedSource
from .tars import TarSource
from .zipped import ZipSource

# `open(cfg, split, same_classes=..., rank=..., world_size=...)` opens the images of DATA_PATH; `cfg` is the section
# DATA. With `same_classes`, classes that only one of train and val has are an error.
Open = Callable[..., EncodedSource]


def _open_folder(cfg: CfgNode, split: str, *, same_classes: bool, **_: Any) -> FolderSource:
    return FolderSource(cfg.DATA_PATH, split, same_classes=same_classes, index=cfg.INDEX)


def _open_zip(cfg: CfgNode, split: str, *, same_classes: bool, rank: int, world_size: int) -> ZipSource:
    return ZipSource(cfg.DATA_PATH, split, cache_mode=cfg.CACHE_MODE, rank=rank, world_size=world_size)


def _path_alone(source: type[TarSource] | type[ListSource]) -> Open:
    """Returns how to open a format that is read in the same way by every process."""
    return lambda cfg, split, *, same_classes, **_: source(cfg.DATA_PATH, split, same_classes=same_classes)


FORMATS: dict[str, Open] = {
    "folder": _open_folder,  # train/<class>/*
    "zip": _open_zip,  # train.zip and train_map.txt
    "tar": _path_alone(TarSource),  # train-000000.tar ...
    "list": _path_alone(ListSource),  # train.csv
}


def format_of(cfg: CfgNode) -> str:
    """Returns the entry of `FORMATS` that the section DATA asks for: FORMAT, or zip by its older name ZIP_MODE."""
    return cfg.FORMAT or ("zip" if cfg.ZIP_MODE else "folder")


def holds_a_part(cfg: CfgNode) -> bool:
    """Returns whether each process has a part of the images in memory, and should load no others."""
    return format_of(cfg) == "zip" and cfg.CACHE_MODE == "part"
