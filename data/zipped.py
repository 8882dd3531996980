"""ImageNet as Swin zips it: `train.zip` with `train_map.txt`, `val.zip` with `val_map.txt`."""

import contextlib
import io
import os
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
from PIL import Image

from utils.files import user_path

from .sources import SPLITS, ImageSource, decode_rgb

CACHE_MODES = ("no", "part", "full")


class ZipSource(ImageSource):
    """The images of `root/split.zip` that `root/split_map.txt` lists, one `path/in/the/zip.jpg<TAB>label` a line.

    The classes are numbered from 0 to the largest label of the map. `cache_mode` says which images' bytes are kept in
    memory from the start: none (`no`), all (`full`), or those with `index % world_size == rank` (`part`).

    Raises ValueError for missing or damaged files and for map lines that cannot be right, naming file and line.
    """

    def __init__(
        self, root: str | Path, split: str, *, cache_mode: str = "part", rank: int = 0, world_size: int = 1
    ) -> None:
        assert split in SPLITS
        root = user_path(root)
        archive, map_file = root / f"{split}.zip", root / f"{split}_map.txt"
        for path in (archive, map_file):
            if not path.is_file():
                raise ValueError(f"{path} is missing: --zip reads {split}.zip and {split}_map.txt from the data path")
        self._archive = _Archive(archive)
        entries, labels = _read_map(map_file, known=self._archive.names())
        # One array instead of a million strings: forked workers then share the list, and others receive it quickly.
        self._entries = np.array([entry.encode() for entry in entries])
        self.labels = np.array(labels, dtype=np.int64)
        self.classes = [str(label) for label in range(max(labels) + 1)]
        self._cache = self._read_all(_cached_indices(cache_mode, len(labels), rank, world_size))

    def _read_all(self, indices: Iterable[int]) -> dict[int, bytes]:
        """Returns the bytes of these images, leaving out unreadable ones: `load` reports those when they are due."""
        cache = {}
        for index in indices:
            with contextlib.suppress(OSError, ValueError):
                cache[index] = self._archive.read(self._entries[index].decode())
        return cache

    def _image(self, index: int) -> Image.Image:
        content = self._cache.get(index) or self._archive.read(self._entries[index].decode())
        return decode_rgb(io.BytesIO(content))

    def locate(self, index: int) -> str:
        """Returns the path of the zip file, continued by that of the entry."""
        return f"{self._archive.path}/{self._entries[index].decode()}"


def _cached_indices(cache_mode: str, length: int, rank: int, world_size: int) -> range:
    """Returns the indices whose bytes `cache_mode` keeps in memory."""
    ranges = {"no": range(0), "part": range(rank, length, world_size), "full": range(length)}
    if cache_mode not in ranges:
        raise ValueError(f"DATA.CACHE_MODE is {cache_mode!r}: choose one of {', '.join(ranges)}")
    return ranges[cache_mode]


def _read_map(path: Path, known: set[str]) -> tuple[list[str], list[int]]:
    """Returns the entries and the labels of a map file; ValueError with file and line for what cannot be right."""
    entries, labels = [], []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry, label = _parse_line(line)
                if entry not in known:
                    raise ValueError(f"the zip has no entry {entry!r}")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            entries.append(entry)
            labels.append(label)
    if not labels:
        raise ValueError(f"{path} lists no image: write one `path/in/the/zip.jpg<TAB>label` a line")
    return entries, labels


def _parse_line(line: str) -> tuple[str, int]:
    """Splits `path<TAB>label`; ValueError where it is something else, or where the path leaves the zip."""
    fields = line.rstrip("\r\n").split("\t")
    if len(fields) != 2:
        raise ValueError(f"expected `path<TAB>label`, found {line.strip()!r}")
    entry, label = fields
    if not label.strip().isdecimal():
        raise ValueError(f"the label {label!r} is not an integer from 0 on")
    if PurePosixPath(entry).is_absolute() or ".." in PurePosixPath(entry).parts:
        raise ValueError(f"{entry!r} is not a path inside the zip: write it relative, without `..`")
    return entry, int(label)


class _Archive:
    """A zip file that each process opens for itself when it first reads: a shared handle would share its position."""

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
            except BadZipFile as error:
                raise ValueError(f"{self.path} is not a readable zip file ({error}): copy or pack it again") from error
            self._opened_by = os.getpid()
        return self._zip

    def names(self) -> set[str]:
        """Returns the paths of all entries."""
        return set(self._open().namelist())

    def read(self, entry: str) -> bytes:
        """Returns the bytes of an entry; OSError or ValueError where they are damaged."""
        try:
            return self._open().read(entry)
        except (BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted, unknown method
            raise ValueError(f"damaged zip entry ({error})") from error
