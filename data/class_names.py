"""The names of classes: their order, and files that list them."""

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

from timm.data import ImageNetInfo

from utils.text import shortened

IMAGENET_CLASSES = 1000


@cache
def imagenet_names() -> list[str]:
    """Returns the WordNet ids of the classes of ImageNet-1k, in the order of the outputs of released weights."""
    return list(ImageNetInfo().label_names())


def in_order(names: Iterable[str]) -> list[str]:
    """Returns class names in the order of their labels: by number if all of them are numbers, else by text.

    By text, `10` would come before `2`, and label k would not be the class k of ImageNet-V2.

    Raises:
        ValueError: two names are the same number, such as `1` and `01`.
    """
    by_text = sorted(names)
    if not are_numbers(by_text):
        return by_text
    by_number = sorted(by_text, key=_number)
    for name, following in pairwise(by_number):
        if _number(name) == _number(following):
            raise ValueError(f"the classes {name!r} and {following!r} are one number: rename one of them, or join them")
    return by_number


def are_numbers(names: Iterable[str]) -> bool:
    """Returns whether all class names are numbers."""
    return all(map(_is_number, names))


def are_positions(names: Collection[str]) -> bool:
    """Returns whether class names are the numbers from 0 on, in order, and so say no more than the labels do."""
    return all(_is_number(name) and _number(name) == _number(str(label)) for label, name in enumerate(names))


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _number(name: str) -> tuple[int, str]:
    """Returns what orders numbers of any length as their values do."""
    digits = name.lstrip("0")
    return len(digits), digits


def numbered(names: Sequence[str] | None, count: int) -> list[str]:
    """Returns a name for each of `count` outputs: those of the first ones, where they are known, then numbers."""
    known = list(names or ())
    return known + [str(label) for label in range(len(known), count)]


def read_class_names(path: Path, count: int) -> list[str]:
    """Reads the names of the outputs of a network, one a line, from a text file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text in UTF-8, or has more or fewer names than the network has outputs.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file: give class names, one a line")
    try:
        names = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds no class names in UTF-8: {error}") from error
    if len(names) != count:
        raise ValueError(f"{path} names {len(names)} classes, the network has {count}")
    return names


def first_difference(names: Sequence[str], others: Sequence[str]) -> str:
    """Describes the first label whose classes differ: `class 3 is 'cat', not 'dog'`; empty where none does."""
    for label in range(max(len(names), len(others))):
        pair = [shortened(repr(of[label])) if label < len(of) else "missing" for of in (names, others)]
        if pair[0] != pair[1]:
            return f"class {label} is {pair[0]}, not {pair[1]}"
    return ""
