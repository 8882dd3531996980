"""ImageNet as Swin zips it: `train.zip` with `train_map.txt`, `val.zip` with `val_map.txt`."""

import contextlib
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np

from utils.files import user_path
from utils.text import printable, shortened

from .labels import check_largest, read_classes
from .sources import SPLITS, WHOLE, EncodedSource, PackedStrings, stored_split

CACHE_MODES = ("no", "part", "full")
MAX_BYTES = 2**29  # of one image unpacked: those of the pixels of the largest one that Pillow decodes
_LABEL = re.compile(r" *([0-9]{1,9}) *")


class ZipSource(EncodedSource):
    """The images of `root/split.zip` that `root/split_map.txt` lists, one `path/in/the/zip.jpg<TAB>label` a line.

    The classes are those that `root/classes.txt` names, else numbered from 0 to the largest label, for val also of the
    map of train; where there are then more than a thousand, every tenth at least must have images. `cache_mode` says
    which images' bytes are kept in memory from the start: none (`no`), all (`full`), or those with
    `index % world_size == rank` (`part`).

    Raises ValueError for missing or damaged files and for map lines that can't be right, naming file and line.
    """

    def __init__(
        self, root: str | Path, split: str, *, cache_mode: str = "part", rank: int = 0, world_size: int = 1
    ) -> None:
        assert split in (*SPLITS, WHOLE)
        root, of_train = user_path(root), [user_path(root) / "train_map.txt"] if split == "val" else []
        split = stored_split(split)
        archive, map_file = root / f"{split}.zip", root / f"{split}_map.txt"
        for path in (archive, map_file):
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing: DATA.FORMAT zip, or DATA.ZIP_MODE, reads {split}.zip and {split}_map.txt from "
                    "DATA.DATA_PATH"
                )
        self._archive = _Archive(archive)
        names = read_classes(root)
        entries, labels = _read_map(map_file, self._archive.names(), len(names) if names else None)
        self._entries = PackedStrings(entries)
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = names or [str(label) for label in range(self._count(of_train))]
        self._cache = self._read_all(_cached_indices(cache_mode, len(labels), rank, world_size))

    def _count(self, other_maps: Iterable[Path]) -> int:
        """Returns the number of classes that follows from the labels of this split and of others."""
        others = [label for path in other_maps if path.is_file() for label in _read_map(path, None, None)[1]]
        return max(int(self.labels.max()), *others, 0) + 1

    def _read_all(self, indices: Iterable[int]) -> dict[int, bytes]:
        """Returns the bytes of these images without unreadable ones, which `load` reports."""
        cache = {}
        for index in indices:
            with contextlib.suppress(OSError, ValueError):
                cache[index] = self._archive.read(self._entries[index])
        return cache

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file."""
        return self._cache.get(index) or self._archive.read(self._entries[index])

    def name(self, index: int) -> str:
        """Returns the path of the entry within the zip file."""
        return self._entries[index]

    def locate(self, index: int) -> str:
        """Returns the path of the zip file, continued by that of the entry."""
        return printable(f"{self._archive.path}/{self._entries[index]}")


def _cached_indices(cache_mode: str, length: int, rank: int, world_size: int) -> range:
    """Returns the indices whose bytes `cache_mode` keeps in memory."""
    return {"no": range(0), "part": range(rank, length, world_size), "full": range(length)}[cache_mode]


def _read_map(path: Path, known: Collection[str] | None, count: int | None) -> tuple[list[str], list[int]]:
    """Returns the entries and the labels of a map file; ValueError with file and line for what can't be right.

    `known` are the entries of the zip, None if they don't matter; `count` is the number of classes, None if it follows
    from the labels.
    """
    line_of: dict[str, int] = {}
    labels: list[int] = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry, label = _parse_line(line.decode())
                if known is not None and entry not in known:
                    raise ValueError(f"the zip has no entry {_shown(entry)}")
                if entry in line_of:
                    raise ValueError(f"{_shown(entry)} is in line {line_of[entry]} already, and would count twice")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            line_of[entry] = number
            labels.append(label)
    if not labels:
        raise ValueError(f"{path} lists no image: write one `path/in/the/zip.jpg<TAB>label` a line")
    numbers = list(line_of.values())
    check_largest(np.array(labels), lambda index: f"{path}, line {numbers[index]}", count)
    return list(line_of), labels


def _parse_line(line: str) -> tuple[str, int]:
    """Splits `path<TAB>label`; ValueError where it is something else, or where the path leaves the zip."""
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 2:
        raise ValueError(f"expected `path<TAB>label`, found {_shown(line.strip())}")
    entry, label = fields
    number = _LABEL.fullmatch(label)
    if number is None:
        raise ValueError(f"the label {_shown(label)} is not an integer from 0 to 999999999")
    if entry.startswith("/") or ".." in entry.split("/"):
        raise ValueError(f"{_shown(entry)} is not a path inside the zip: write it relative, without `..`")
    return entry, int(number[1])


def _shown(text: str) -> str:
    return shortened(repr(text))


class _Archive:
    """A zip file that each process opens on its first read: a shared handle would share its position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: ZipFile | None = None
        self._opened_by = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_zip": None, "_opened_by": 0}

    def _open(self) -> ZipFile:
        if self._zip is None or self._opened_by != os.getpid():
            try:
                self._zip = ZipFile(self.path)
            except OSError:
                raise
            except Exception as error:  # a file that is not a zip may raise anything
                raise ValueError(f"{self.path} is not a readable zip file ({error}): copy or pack it again") from error
            self._opened_by = os.getpid()
        return self._zip

    def names(self) -> set[str]:
        """Returns the paths of all entries."""
        return set(self._open().namelist())

    def read(self, entry: str) -> bytes:
        """Returns the bytes of an entry; OSError or ValueError where they are damaged, or too many."""
        try:
            archive = self._open()
            info = archive.getinfo(entry)
            if info.compress_type not in (ZIP_STORED, ZIP_DEFLATED):  # others unpack the whole entry at once
                raise ValueError(f"compression method {info.compress_type}: pack the images stored or deflated")
            if info.file_size > MAX_BYTES:
                raise ValueError(f"{info.file_size} bytes unpacked are no image, {MAX_BYTES} are the limit")
            with archive.open(info) as file:
                return file.read(info.file_size)
        except (OSError, ValueError):
            raise
        except Exception as error:  # damaged bytes may raise anything
            raise ValueError(f"damaged zip entry ({error})") from error
