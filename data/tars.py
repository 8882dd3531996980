"""Images in tar files, uncompressed: each is read by its position, in any order, as from a folder.

The positions are read from the headers once and saved in an index beside the files, or in the cache folder of the user
where these are read-only. The index is made anew when a file lies elsewhere, is another one, or has changed.
"""

import hashlib
import json
import os
import posixpath
import secrets
import tarfile
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from utils.files import cache_folder, user_path
from utils.text import printable, shortened

from .decode import EXTENSIONS
from .folders import OTHER_SPLITS
from .index import checksum, state
from .labels import Words, number_labels, read_classes
from .sources import SPLITS, WHOLE, EncodedSource, PackedStrings, stored_split
from .zipped import MAX_BYTES

LABEL = "cls"  # the extension of a label in WebDataset's naming
MAX_LABEL_BYTES = 1000
MAX_OPEN = 128  # files of a process
VERSION = 2  # of the saved index
NAMES, NUMBERS = "names", "numbers"  # what `tools/pack_dataset.py` has written as labels
# The first bytes of compressed files, in which nothing can be read by its position.
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarSource(EncodedSource):
    """The images in the tar files of a split: `root/split.tar`, `root/split-000000.tar ...` or `root/split/*.tar`.

    They are named as for WebDataset, `7.jpg` with its label in `7.cls` (a number or a name; further files of that name
    are ignored), or lie in a folder for each class, `n01440764/7.JPEG`, or in a tar file for each class,
    `n01440764.tar`. Images lie at any depth below the folder of a class, which is the first one on their path that is
    not common to all. Hidden names are left out. `classes.txt` in the root says what numbers mean (`labels.py`).

    Raises ValueError, which names the file, for missing, damaged, truncated or compressed ones, for what has no label
    or image, a name that is there twice, folders of splits in place of classes, links and sparse files in place of
    images, and classes that only one of train and val has. With `same_classes` off, they may have different ones.
    """

    def __init__(self, root: str | Path, split: str, *, same_classes: bool = True) -> None:
        assert split in (*SPLITS, WHOLE)
        root = user_path(root)
        shards = find_shards(root, split)
        if not shards:
            raise ValueError(
                f"no tar files of {split} at {root}: expected {split}.tar, {split}-000000.tar ... or {split}/*.tar, "
                "uncompressed"
            )
        are_names = _labels_recorded(root / f"{stored_split(split)}.json", shards) == NAMES
        index = open_index(shards)
        others = find_shards(root, "val" if split == "train" else "train") if same_classes and split != WHOLE else []
        other = Words(_place(others), open_index(others).words) if others else None
        self.shards = Shards(shards)
        self._index = index
        texts = [index.words[code] for code in index.codes]
        classes = read_classes(root if root.is_dir() else root.parent)
        self.labels, self.classes = number_labels(
            texts, _place(shards), self.locate, classes=classes, other=other, are_names=are_names or index.by_folders
        )

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file."""
        at = self._index
        return self.shards.read(int(at.shards[index]), int(at.offsets[index]), int(at.sizes[index]))

    def name(self, index: int) -> str:
        """Returns the path of the image in its tar file, below the class that the file stands for if it does."""
        return self._index.names[index]

    def locate(self, index: int) -> str:
        """Returns the path of the tar file, continued by that of the image in it."""
        return printable(f"{self.shards.paths[self._index.shards[index]]}/{self._index.names[index]}")


def find_shards(root: Path, split: str) -> list[Path]:
    """Returns the tar files of a split in the order of their names; none where there are none.

    Raises:
        ValueError: they lie at two of the places, or numbered ones are missing at the start or in between; the whole is
            asked for, and there are files of other splits, but none of train.
    """
    if split == WHOLE:
        return [root] if root.is_file() else find_shards(root, "train") or _all_shards(root)
    places = {
        f"{split}.tar": _tars([root / f"{split}.tar"]),
        f"{split}-*.tar": _tars(root.glob(f"{split}-*.tar")),
        f"{split}/*.tar": _tars((root / split).glob("*.tar")),
    }
    found = {place: shards for place, shards in places.items() if shards}
    if len(found) > 1:
        raise ValueError(f"{root} holds {' and '.join(found)}, which may be the same images: keep one of them")
    shards = next(iter(found.values()), [])
    _check_no_gap(shards)
    return shards


def _all_shards(root: Path) -> list[Path]:
    """Returns all tar files of a folder; raises ValueError where some of them are named as those of a split."""
    shards = _tars(root.glob("*.tar"))
    for path in shards:
        name = path.stem if _number_of(path) is None else path.stem.rpartition("-")[0]
        if name.lower() in OTHER_SPLITS.union(SPLITS):
            raise ValueError(
                f"{root} holds {path.name}, and no train.tar, train-000000.tar ... or train/*.tar to divide: rename "
                "the files of the training images so, or give as data path the one tar file to divide"
            )
    return shards


def _labels_recorded(path: Path, shards: Sequence[Path]) -> str | None:
    """Returns what labels are by the record of `tools/pack_dataset.py`, `NAMES` or `NUMBERS`; None without a record.

    Raises:
        ValueError: the packing was not finished, or wrote other files as well.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete, names = record["complete"], {row["name"] for row in record["shards"]}
        labels = record["plan"]["labels"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or a file of another program
        return None
    if not complete:
        raise ValueError(f"{path}: the packing is not finished, continue it with the same command")
    missing = sorted(names - {shard.name for shard in shards})
    if missing:
        raise ValueError(
            f"{path} names {len(missing)} files that are missing, the first is {missing[0]}: copy them again"
        )
    return str(labels)


def _tars(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if not path.name.startswith(".") and path.is_file())


def _check_no_gap(shards: Sequence[Path]) -> None:
    """Raises ValueError if numbered files, `train-000000.tar ...`, do not follow each other from 0 or 1 on."""
    numbers = [_number_of(path) for path in shards]
    if shards and numbers[0] is not None and numbers[0] > 1:
        raise ValueError(f"{shards[0]} is the first: the files before number {numbers[0]} are missing, copy them again")
    for (before, after), path in zip(pairwise(numbers), shards[1:], strict=True):
        if before is not None and after is not None and after != before + 1:
            raise ValueError(f"{path} follows number {before}: the files in between are missing, copy them again")


def _number_of(path: Path) -> int | None:
    digits = path.stem.rpartition("-")[2]
    return int(digits) if len(digits) >= 4 and digits.isdecimal() and digits.isascii() else None


def _place(shards: Sequence[Path]) -> str:
    """Returns what names the files in messages: the only one, or the folder with the first one's name."""
    return str(shards[0]) if len(shards) == 1 else f"{shards[0]} ..."


class Index(NamedTuple):
    """Where each image lies: its shard's number, and its first byte and their count in that; and its label.

    `words` are the labels that occur, and `codes` says which of them an image has. With `by_folders` they are names of
    folders or of the tar files.
    """

    names: PackedStrings
    shards: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    codes: np.ndarray
    words: list[str]
    by_folders: bool


def open_index(shards: Sequence[Path]) -> Index:
    """Returns the index of tar files: the saved one if they are as they were then, else a new one, which is saved.

    Raises:
        ValueError: as `TarSource`.
    """
    stamp = _stamp(shards)
    places = [shards[0].with_name(f".{shards[0].stem}.index.safetensors")]
    with suppress(ValueError):  # there is no home folder
        places.append(cache_folder() / f"{stamp}.safetensors")
    for place in places:
        index = _load(place, stamp)
        if index is not None:
            return index
    index = build_index(shards)
    for place in places:
        with suppress(OSError, SafetensorError):  # read-only or full: the next place, and at last none
            _save(place, stamp, index)
            break
    return index


def _stamp(shards: Sequence[Path]) -> str:
    """Returns a digest of the files' places, sizes and states, and of how an index is made.

    Other files may have the same names, sizes and dates, where a program sets all dates to one.
    """
    states = [(str(path.resolve()), status.st_size, state(status)) for path in shards for status in [path.stat()]]
    return hashlib.sha256(repr((VERSION, EXTENSIONS, states)).encode()).hexdigest()


def _load(place: Path, stamp: str) -> Index | None:
    try:
        with safe_open(place, framework="numpy") as saved:
            about = saved.metadata() or {}
            if about.get("stamp") != stamp:
                return None
            arrays = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    if about.get("checksum") != checksum(arrays):
        return None
    names, words = (arrays.pop(key).tobytes().decode("utf-8", "surrogatepass") for key in ("names", "words"))
    by_folders = bool(arrays.pop("by_folders"))
    return Index(PackedStrings(names.split("\0")), **arrays, words=words.split("\0"), by_folders=by_folders)


def _save(place: Path, stamp: str, index: Index) -> None:
    arrays = {key: getattr(index, key) for key in ("shards", "offsets", "sizes", "codes")}
    for key, strings in {"names": index.names, "words": PackedStrings(index.words)}.items():
        joined = "\0".join(strings).encode("utf-8", "surrogatepass")  # no name in a tar file holds a NUL
        arrays[key] = np.frombuffer(joined, dtype=np.uint8)
    arrays["by_folders"] = np.array(index.by_folders)
    place.parent.mkdir(parents=True, exist_ok=True)
    about = {"stamp": stamp, "checksum": checksum(arrays)}
    temporary = place.with_name(f"{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(save(arrays, about))
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


class Member(NamedTuple):
    """A file within a tar file: its first byte and their count."""

    offset: int
    size: int


def build_index(shards: Sequence[Path]) -> Index:
    """Reads the headers of tar files, and the labels in them; raises ValueError as `TarSource`."""
    contents = [read_members(path) for path in shards]
    by_files = any(content.labels for content in contents)
    label_of = _label_beside if by_files else partial(_label_of_folder, depth=_class_depth(contents, _place(shards)))
    rows: list[tuple[int, int, int, int]] = []
    first: dict[str, Path] = {}
    codes: dict[str, int] = {}
    for number, (path, content) in enumerate(zip(shards, contents, strict=True)):
        if by_files:
            _check_pairs(path, content)
        for name, member in content.images.items():
            label, name = label_of(path, name, content)
            if name in first:
                raise ValueError(
                    f"{path} and {first[name]} both hold {_shown(name)}, which would count twice: remove one of them"
                )
            first[name] = path
            rows.append((number, *member, codes.setdefault(label, len(codes))))
    if not rows:
        raise ValueError(f"no image in {_place(shards)} ({', '.join(EXTENSIONS)})")
    if not by_files:
        _check_no_split(codes, _place(shards))
    where, offsets, sizes, labels = map(np.ascontiguousarray, np.array(rows, dtype=np.int64).T)
    return Index(PackedStrings(first), where, offsets, sizes, labels, list(codes), by_folders=not by_files)


class Contents(NamedTuple):
    """The images of a tar file by name, and the labels by key, the name up to the first dot of its last part."""

    images: dict[str, Member]
    labels: dict[str, str]


def read_members(path: Path) -> Contents:
    """Returns the images and labels of a tar file; raises ValueError as `TarSource`."""
    contents = Contents({}, {})
    _check_plain(path)
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or they would add up to gigabytes
                _take(path, info, file, contents)
            _check_end(path, file, archive.offset)
    except (OSError, ValueError):
        raise
    except Exception as error:  # damaged headers may raise anything
        raise ValueError(f"{path} is damaged or truncated ({error}): copy or pack it again") from error
    return contents


def _check_plain(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(512)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path} is compressed ({name}), so that no image can be read by its position: decompress it, for "
                "images are hardly larger then"
            )


def _check_end(path: Path, file: BinaryIO, offset: int) -> None:
    """Raises ValueError unless nothing but zeros, which mark the end of a tar file, is left from here on."""
    file.seek(offset)
    left = 0
    while chunk := file.read(2**20):
        if chunk.count(0) != len(chunk):
            raise ValueError(f"{path} is damaged, or several in one, from byte {offset} on: copy or pack it again")
        left += len(chunk)
    if left < tarfile.BLOCKSIZE:
        raise ValueError(f"{path} is truncated, the mark of its end is missing: copy or pack it again")


def _take(path: Path, info: tarfile.TarInfo, file: BinaryIO, contents: Contents) -> None:
    """Adds one entry of a tar file to its contents, if it is an image or a label; nothing is ever unpacked."""
    name = posixpath.normpath(f"/{info.name}").lstrip("/")
    parts = name.split("/")
    is_label, is_image = name.endswith(f".{LABEL}"), name.lower().endswith(EXTENSIONS)
    if info.isdir() or not (is_label or is_image) or any(part.startswith(".") for part in parts):
        return
    if not info.isreg() or info.issparse():
        kind = "sparse" if info.issparse() else "a link" if info.issym() or info.islnk() else "no regular file"
        raise ValueError(
            f"{path}: {_shown(name)} is {kind}: pack it again as a plain file (tar --dereference --hard-dereference)"
        )
    if "\0" in name:
        raise ValueError(f"{path}: {_shown(name)} has a NUL character in its name: rename it")
    known = contents.labels if is_label else contents.images
    key = key_of(name) if is_label else name
    if key in known:
        raise ValueError(f"{path} holds {_shown(name)} twice, which would count twice: remove one of them")
    if not 0 <= info.size <= (MAX_LABEL_BYTES if is_label else MAX_BYTES):
        raise ValueError(f"{path}: {_shown(name)} of {info.size} bytes is no {'label' if is_label else 'image'}")
    if is_label:
        file.seek(info.offset_data)
        content = file.read(info.size)
        if len(content) != info.size:
            raise ValueError(f"{path} is truncated within {_shown(name)}: copy or pack it again")
        contents.labels[key] = _label(path, name, content)
    else:
        contents.images[name] = Member(info.offset_data, info.size)


def _label(path: Path, name: str, content: bytes) -> str:
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        text = ""
    if not text or "\0" in text:
        raise ValueError(f"{path}: {_shown(name)} holds no label: expected the number or the name of a class, in UTF-8")
    return text


def key_of(name: str) -> str:
    """Returns what the files of an image share for WebDataset: the path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _label_beside(path: Path, name: str, contents: Contents) -> tuple[str, str]:
    """Returns the label of an image and its name; ValueError where it has no label."""
    label = contents.labels.get(key_of(name))
    if label is None:
        raise ValueError(
            f"{path}: {_shown(name)} has no label: expected {_shown(key_of(name))}.{LABEL} in the same file"
        )
    return label, name


def _class_depth(contents: Sequence[Contents], place: str) -> int:
    """Returns how many folders lie above those of the classes: as many as are common to all images.

    Raises:
        ValueError: images lie beside these folders, so that they have no class, or all have the same one.
    """
    folders = {name.rpartition("/")[0] for content in contents for name in content.images if "/" in name}
    if len(folders) <= 1:
        return len(next(iter(folders), "").split("/")) - 1
    common = posixpath.commonpath(folders)
    if common in folders:
        raise ValueError(
            f"{place}: {_shown(common)} has images and folders of images in it, and nothing lies elsewhere: "
            "expected a folder for each class"
        )
    return len(common.split("/")) if common else 0


def _check_no_split(labels: Collection[str], place: str) -> None:
    """Raises ValueError for folders that are those of splits, not of classes."""
    names = sorted(set(labels) & set(SPLITS) or (set(labels) if OTHER_SPLITS.issuperset(labels) else ()))
    if names:
        raise ValueError(
            f"{place}: the folder {names[0]} of its images is that of a split, not of a class: pack each split on its "
            "own, with a folder for each class"
        )


def _label_of_folder(path: Path, name: str, _: Contents, depth: int) -> tuple[str, str]:
    """Returns as `_label_beside`: the folder below `depth` others, or else the class that the tar file stands for."""
    if "/" in name:
        return name.split("/")[depth], name
    if path.stem in SPLITS or _number_of(path) is not None:
        raise ValueError(
            f"{path}: {_shown(name)} has no label: expected {_shown(key_of(name))}.{LABEL} beside it, or a folder for "
            "each class"
        )
    return path.stem, f"{path.stem}/{name}"


def _check_pairs(path: Path, contents: Contents) -> None:
    """Raises ValueError for two images of one key, and for a label without an image."""
    images: dict[str, str] = {}
    for name in contents.images:
        other = images.setdefault(key_of(name), name)
        if other is not name:
            raise ValueError(f"{path}: {_shown(other)} and {_shown(name)} share one label: give each its own name")
    for key in contents.labels:
        if key not in images:
            raise ValueError(f"{path}: the label {_shown(f'{key}.{LABEL}')} has no image ({', '.join(EXTENSIONS)})")


def _shown(name: str) -> str:
    return shortened(printable(name))


class Shards:
    """Tar files that each process opens when it first reads them; at most `MAX_OPEN` stay open."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._open: OrderedDict[int, int] = OrderedDict()  # the descriptors of some, the last one used at the end
        self._opened_by = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict(), "_opened_by": 0}

    def __del__(self) -> None:
        self._close(keep=0)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Returns bytes of a file; raises OSError where it has fewer."""
        content = os.pread(self._descriptor(number), size, offset)
        if len(content) != size:
            raise OSError(f"{self.paths[number]} has become shorter: {len(content)} of {size} bytes from {offset} on")
        return content

    def _descriptor(self, number: int) -> int:
        if self._opened_by != os.getpid():
            self._close(keep=0)  # those of the process that this one was forked from, here alone
            self._opened_by = os.getpid()
        if number not in self._open:
            self._open[number] = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
            self._close(keep=MAX_OPEN)
        self._open.move_to_end(number)
        return self._open[number]

    def _close(self, keep: int) -> None:
        while len(self._open) > keep:
            os.close(self._open.popitem(last=False)[1])
