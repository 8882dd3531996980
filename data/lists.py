"""Images that a list names, with their labels: CSV with or without a header, or lines as for Caffe."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.files import user_path
from utils.text import printable, shortened

from .labels import NUMBER, Words, number_labels, read_classes
from .sources import SPLITS, WHOLE, FileSource, PackedStrings, stored_split

SUFFIXES = (".csv", ".tsv", ".txt")
# What a header may call the two columns.
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")


class Row(NamedTuple):
    """A line of a list."""

    line: int  # counted from 1
    path: str
    label: str


class ListSource(FileSource):
    """The images that `root/split.csv`, `.tsv` or `.txt` lists, one `path,label` a line; paths are relative to root.

    A CSV file is as the csv module reads it, quotes included; a first line such as `path,label` names the columns, of
    which there may then be others; one of other names is refused where the labels are numbers. A TSV file has tabs for
    commas. A text file has a tab, or spaces of which the last one ends the path. Labels are names or numbers
    (`labels.py`). The images are only read when they are due.

    Raises ValueError, which names the file and the line, for lines of another form, several labels, an image that is
    listed twice, and classes that only one of train and val has (unless `same_classes` is off).
    """

    def __init__(self, root: str | Path, split: str, *, same_classes: bool = True) -> None:
        assert split in (*SPLITS, WHOLE)
        self.folder = user_path(root)
        path = _find(self.folder, stored_split(split))
        if path is None:
            files = ", ".join(f"{stored_split(split)}{suffix}" for suffix in SUFFIXES)
            raise ValueError(f"no list of images at {self.folder}: expected one of {files}, `path,label` a line")
        rows = read_list(path)
        other = _find(self.folder, "val" if split == "train" else "train") if same_classes and split != WHOLE else None
        self.paths = PackedStrings(row.path for row in rows)
        self.labels, self.classes = number_labels(
            [row.label for row in rows],
            str(path),
            lambda index: f"{path}, line {rows[index].line}",
            classes=read_classes(self.folder),
            other=Words(str(other), {row.label for row in read_list(other)}) if other else None,
        )

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file."""
        path = self.folder / self.paths[index]
        if not path.is_file() and path.exists():  # a pipe would wait for ever
            raise ValueError("is no regular file")
        return path.read_bytes()


def _find(root: Path, split: str) -> Path | None:
    found = [path for suffix in SUFFIXES if (path := root / f"{split}{suffix}").is_file()]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} both list the images of {split}: keep one of them")
    return found[0] if found else None


def read_list(path: Path) -> list[Row]:
    """Reads a list of images; raises ValueError with file and line for what can't be right."""
    line_of: dict[str, int] = {}
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows(path, _fields(path, file)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}") from None
    for row in rows:
        first = line_of.setdefault(os.path.normpath(os.path.join(path.parent, row.path)), row.line)
        if first != row.line:
            raise ValueError(
                f"{path}, line {row.line}: {_shown(row.path)} is in line {first} already, and would count twice"
            )
    if not rows:
        raise ValueError(f"{path} lists no image: write one `path,label` a line")
    _check_no_header(path, rows)
    return rows


def _check_no_header(path: Path, rows: Sequence[Row]) -> None:
    """Raises ValueError if the first label is the only one that is no number: that of a header with other names."""
    are_numbers = (NUMBER.fullmatch(row.label.removeprefix("-")) for row in rows)
    if len(rows) > 1 and not next(are_numbers) and all(are_numbers):
        raise ValueError(
            f"{path}, line {rows[0].line}: {_shown(rows[0].label)} is the only label that is no number: if the line is "
            "a header, write `path,label`, else number all classes or none"
        )


def _fields(path: Path, file: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields the number and the fields of each line that is not empty."""
    if path.suffix == ".txt":
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _words(line.strip())
        return
    reader = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    try:
        for fields in reader:
            if any(fields):
                yield reader.line_num, [field.strip() for field in fields]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _words(line: str) -> list[str]:
    """Splits a line of text at tabs or spaces: in two, as paths may have spaces, unless the rest are numbers."""
    if "\t" in line:
        return [field.strip() for field in line.split("\t")]
    words = line.split()
    several = len(words) > 2 and all(map(NUMBER.fullmatch, words[1:]))
    return words if several else line.rsplit(maxsplit=1)


def _rows(path: Path, lines: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    columns: Sequence[int] | None = None
    for position, (number, fields) in enumerate(lines):
        if position == 0 and (columns := _header(fields)) is not None:
            width = len(fields)
            continue
        if columns is not None and len(fields) != width:
            raise ValueError(f"{path}, line {number}: {len(fields)} fields, but the first line names {width}")
        chosen = [fields[column] for column in columns] if columns is not None else fields
        try:
            yield Row(number, *_checked(chosen))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _header(fields: Sequence[str]) -> tuple[int, int] | None:
    """Returns the columns of path and label that a first line names; None where it is a line as the others."""
    names = [field.lower() for field in fields]
    found = [[names.index(name) for name in known if name in names] for known in (PATH_COLUMNS, LABEL_COLUMNS)]
    return (found[0][0], found[1][0]) if all(found) else None


def _checked(fields: Sequence[str]) -> tuple[str, str]:
    """Returns path and label; ValueError for other fields and for several labels."""
    if len(fields) > 2 or (len(fields) == 2 and _is_several(fields[1])):
        raise ValueError(
            f"{_shown(fields[0])} has several labels ({_shown(' '.join(fields[1:]))}): classification takes one "
            "an image"
        )
    if len(fields) < 2 or not all(fields):
        raise ValueError(f"expected `path,label`, found {_shown(','.join(fields))}")
    if "\0" in fields[0] + fields[1]:
        raise ValueError("has a NUL character in it")
    return fields[0], fields[1]


def _is_several(label: str) -> bool:
    words = label.split()
    return ";" in label or (len(words) > 1 and all(map(NUMBER.fullmatch, words)))


def _shown(text: str) -> str:
    return shortened(printable(repr(text)))
