"""Packs the images of a data set into tar files, which are read as DATA.FORMAT tar, and by WebDataset and timm.

The bytes of the images are copied as they are, in a random order that a seed decides. Per split there is also a file
`train.json` with the size and the SHA-256 of each tar file. A run that was stopped continues with the same command.
Labels are numbers, as timm expects; only where a class is named by a number are they names, which can't be mistaken.

python -m tools.pack_dataset IMAGENET SHARDS --verify
"""

import hashlib
import io
import json
import math
import os
import tarfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from configs import Override, load_config, parse_opts
from data import EncodedSource, TarSource, open_source
from data.decode import EXTENSIONS, FORMATS, image_file
from data.labels import NUMBER
from data.sources import SPLITS
from data.tars import MAX_LABEL_BYTES, NAMES, NUMBERS
from utils import cli
from utils.files import clear_about_space, user_path, write_json, write_text
from utils.text import printable, shortened


def parser() -> cli.Parser:
    """Describes the command line."""
    result = cli.Parser(description=__doc__, argument_default=None)
    result.add_argument("data", metavar="DATA", help="folder of the data set")
    result.add_argument("out", metavar="FOLDER", type=Path, help="folder to write to")
    result.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="train, val")
    result.add_argument("--megabytes", type=float, default=500.0, metavar="N", help="size of a tar file")
    result.add_argument("--images", type=int, metavar="N", help="images of a tar file, in place of its size")
    result.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the images")
    result.add_argument("--verify", action="store_true", default=False, help="read everything back and compare it")
    result.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="keys of DATA, such as DATA.FORMAT")
    return result


ROOM = "make room and start again: what is finished stays"


class Packed(NamedTuple):
    """A tar file: its name, its images, its size in bytes, and its SHA-256."""

    name: str
    images: int
    bytes: int
    sha256: str


class Packing:
    """One split on its way into tar files, as its JSON file records it.

    Raises ValueError where the folder holds tar files of another origin, or of another order of other images, or lacks
    one that the record names.
    """

    def __init__(self, source: EncodedSource, classes: list[str], args: Namespace, split: str) -> None:
        self.source, self.classes, self.split, self.folder = source, classes, split, user_path(args.out)
        self.limit = args.images, int(args.megabytes * 1e6)
        self.order = np.random.default_rng(args.seed).permutation(len(source)).tolist()
        self.names = _names(source)
        self.words = label_words(classes)
        self.record = self.folder / f"{split}.json"
        texts = [*self.names, *(self.words[label] for label in source.labels)]
        names = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass"))
        self.plan = {
            "images": len(source),
            "seed": args.seed,
            "images_of_a_shard": args.images,
            "bytes_of_a_shard": None if args.images else self.limit[1],
            "labels": NAMES if self.words == classes else NUMBERS,
            "names_and_labels": names.hexdigest(),
        }
        self.shards = self._recorded()

    def _recorded(self) -> list[Packed]:
        """Returns the tar files that an earlier run has finished."""
        if not self.record.exists():
            found = sorted(self.folder.glob(f"{self.split}*.tar"))
            if found:
                raise ValueError(
                    f"{found[0]} is there already, and no run of this program wrote it: give another folder"
                )
            return []
        try:
            content = json.loads(self.record.read_text())
            plan, shards = content["plan"], [Packed(**row) for row in content["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.record} is not a record of this program: give another folder") from error
        if plan != self.plan:
            differing = next(key for key in self.plan if plan.get(key) != self.plan[key]).replace("_", " ")
            raise ValueError(f"{self.record} is of another packing ({differing} differ): give another folder")
        for shard in shards:
            path = self.folder / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise ValueError(
                    f"{path} is missing or has not the {shard.bytes} bytes that {self.record} names: copy it again, or "
                    f"remove {self.folder}"
                )
        return shards

    def run(self) -> None:
        """Writes the tar files that are missing; each is there as a whole or not at all."""
        if not self.record.exists():  # before the first tar file, which a run that goes on then knows as its own
            self._save(complete=False)
        done = sum(shard.images for shard in self.shards)
        with tqdm(total=len(self.order), initial=done, unit=" images", desc=self.split, mininterval=1.0) as bar:
            while done < len(self.order):
                shard = self._write_shard(self.order[done:], bar)
                self.shards.append(shard)
                done += shard.images
                self._save(done == len(self.order))

    def _write_shard(self, indices: Sequence[int], bar: Any) -> Packed:
        path = self.folder / f"{self.split}-{len(self.shards):06}.tar"
        temporary = path.with_name(f".{path.name}.tmp")
        most_images, most_bytes = self.limit
        with clear_about_space(path, ROOM):
            try:
                with temporary.open("wb") as file, tarfile.open(fileobj=(out := Hashing(file)), mode="w") as archive:
                    count = 0
                    for index in indices:
                        if count and (count >= most_images if most_images else out.size >= most_bytes):
                            break
                        self._add(archive, index)
                        count += 1
                        bar.update()
                    archive.close()
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return Packed(path.name, count, out.size, out.sha256.hexdigest())

    def _add(self, archive: tarfile.TarFile, index: int) -> None:
        content = read(self.source, index)
        label = self.words[self.source.labels[index]].encode()
        key = self.names[index]
        for name, data in ((key + _extension(self.source, index, content), content), (f"{key}.cls", label)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

    def _save(self, complete: bool) -> None:
        rows = [shard._asdict() for shard in self.shards]
        write_json(self.record, {"plan": self.plan, "complete": complete, "shards": rows})

    def verify(self) -> None:
        """Raises ValueError for the first tar file or image that is not what was packed."""
        for shard in tqdm(self.shards, desc=f"{self.split}: SHA-256", unit=" files"):
            with (self.folder / shard.name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    raise ValueError(
                        f"{self.folder / shard.name} has changed since it was packed: remove {self.folder}"
                    )
        packed = TarSource(self.folder, self.split)
        if len(packed) != len(self.source) or packed.classes != self.classes:
            raise ValueError(
                f"{self.folder} holds {len(packed)} images of {len(packed.classes)} classes, others than packed"
            )
        pairs = zip(range(len(packed)), self.order, strict=True)
        for there, here in tqdm(
            pairs, total=len(packed), desc=f"{self.split}: images", unit=" images", mininterval=1.0
        ):
            same = read(packed, there) == read(self.source, here)
            if not same or packed.labels[there] != self.source.labels[here]:
                raise ValueError(f"{packed.locate(there)} is not {self.source.locate(here)}: pack it again")


class Hashing(io.RawIOBase):
    """A file to write to that counts and digests what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, content: Any) -> int:
        """Writes bytes."""
        self.size += len(content)
        self.sha256.update(content)
        return self._file.write(content)

    def tell(self) -> int:
        """Returns how many bytes have been written."""
        return self.size


def read(source: EncodedSource, index: int) -> bytes:
    """Returns the bytes of an image; raises OSError that says which one can't be read."""
    try:
        return source.read(index)
    except (OSError, ValueError) as error:
        raise OSError(f"{source.locate(index)}: {error}") from error


def label_words(classes: Sequence[str]) -> list[str]:
    """Returns what is written as the label of each class: its number, or the names if one could be taken for a number.

    The reader takes labels for names wherever these exist (`data/labels.py`).
    """
    if any(map(NUMBER.fullmatch, classes)):
        return list(classes)
    return [str(label) for label in range(len(classes))]


def common_classes(sources: Iterable[EncodedSource], folder: Path) -> list[str]:
    """Returns the classes of all splits, those that an earlier run has written to the folder among them.

    Where they are only numbered, a split may lack the last ones.

    Raises:
        ValueError: the splits have different classes, or a name can't be written as a line and a label.
    """
    lists = [source.classes for source in sources]
    path = folder / "classes.txt"
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else None
    classes = max(lists, key=len) if known is None else known
    numbered = classes == [str(label) for label in range(len(classes))]
    for own in lists:
        if own != (classes[: len(own)] if numbered else classes):
            raise ValueError(
                "the splits have different classes: name all of them in classes.txt beside the images"
                if known is None
                else f"{path} names other classes: give another folder"
            )
    for name in classes:
        text = name.encode(errors="ignore")
        if text.decode().splitlines() != [name] or name.strip() != name or len(text) > MAX_LABEL_BYTES:
            raise ValueError(
                f"the class {shortened(repr(name))} has a name with a line break, with a blank at an end, of more than "
                f"{MAX_LABEL_BYTES} bytes, or not in UTF-8: rename it"
            )
    return classes


def _names(source: EncodedSource) -> list[str]:
    """Returns names for the images, without extensions: those in the source, made distinct, free of dots, not hidden.

    Leading underscores are removed as well, for WebDataset leaves some of those names out.
    """
    names: dict[str, None] = {}
    for index in range(len(source)):
        path = PurePosixPath(source.name(index))
        *folders, last = [part for part in path.with_suffix("").parts if part not in ("/", "..")]
        name = "/".join(part.lstrip("._") or "image" for part in (*folders, last.replace(".", "_")))
        while name in names:
            name = f"{name}_{index}"
        names[name] = None
    return list(names)


def _extension(source: EncodedSource, index: int, content: bytes) -> str:
    """Returns the extension of an image: that of its name, else that of its format."""
    suffix = PurePosixPath(source.name(index)).suffix
    if suffix.lower() in EXTENSIONS:
        return suffix
    try:
        with image_file(io.BytesIO(content)) as image:
            return FORMATS[cast(str, "JPEG" if image.format == "MPO" else image.format)][0]
    except (OSError, ValueError) as error:
        raise ValueError(f"{source.locate(index)}: {error}") from error


def opened(args: Namespace) -> dict[str, EncodedSource]:
    """Returns the splits to pack; raises ValueError for a data set that is not stored as image files."""
    overrides = [Override("DATA", "DATA.DATA_PATH", args.data), *parse_opts(args.opts)]
    cfg = load_config(None, overrides).DATA
    sources = {}
    for split in args.splits:
        source = open_source(cfg, split)
        if not isinstance(source, EncodedSource):
            raise ValueError(f"{args.data} is not stored as image files, whose bytes could be copied")
        sources[split] = source
    return sources


def main(argv: Sequence[str] | None = None) -> None:
    """Opens all splits, packs, verifies."""
    args = parser().parse_args(argv)
    size_is_plausible = args.megabytes > 0 and math.isfinite(args.megabytes * 1e6)
    if not size_is_plausible or (args.images is not None and args.images < 1) or args.seed < 0:
        raise ValueError("--megabytes must be above 0 and finite, --images at least 1, and --seed at least 0")
    folder = user_path(args.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{args.out} is no folder: give the name of one to write to")
    sources = opened(args)
    classes = common_classes(sources.values(), folder)
    packings = [Packing(source, classes, args, split) for split, source in sources.items()]
    if not (folder / "classes.txt").exists():
        write_text(folder / "classes.txt", "\n".join(classes) + "\n")
    for packing in packings:
        packing.run()
        if args.verify:
            packing.verify()
        size = sum(shard.bytes for shard in packing.shards) / 1e9
        print(printable(f"{packing.split}: {len(packing.order)} images in {len(packing.shards)} files, {size:.2f} GB"))
    print(printable(f"to train on them: --data-path {args.out} --opts DATA.FORMAT tar"))


if __name__ == "__main__":
    cli.run(main)
