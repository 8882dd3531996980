"""Labels as archives and lists write them, by number or by name, and the class names that they stand for."""

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.text import printable, shortened

from .class_names import in_order

CLASS_FILES = ("classes.txt", "classes.json")  # beside the images; the first that is there names the classes
FEW_CLASSES, LABELS_A_CLASS = 1000, 10  # classes that there may always be, and for each one that has images
NUMBER = re.compile(r"[0-9]{1,9}")
NEGATIVE = re.compile(r"-[0-9]+")


class Labels(NamedTuple):
    """The class of each image, int64 (N,), and the names of all classes."""

    labels: np.ndarray
    classes: list[str]


class Words(NamedTuple):
    """The labels that one split uses, as they are written, and where: `images/train.csv`."""

    place: str
    words: Collection[str]


def number_labels(
    texts: Sequence[str],
    place: str,
    where: Callable[[int], str],
    *,
    classes: list[str] | None = None,
    other: Words | None = None,
    are_names: bool = False,
) -> Labels:
    """Turns the labels of a split into positions in the list of classes.

    Labels that are names of `classes` mean these; integers mean positions, counted from 0. Which of them integers are
    is decided by the labels of both splits. Other names are ordered as class folders are, and then both splits must use
    the same ones, or a position would mean another class in each.

    Args:
        texts: the label of each image, as it is written.
        place: where they are written, and `where(index)` that of one of them, for messages.
        where: as above.
        classes: the names of all classes in their order, as `read_classes` returns them; None: those that are used.
        other: the labels of the other split; None: there is none, or its classes are others.
        are_names: integers are names, too, as those of folders are.

    Raises:
        ValueError: a label is none of the classes, negative, or too large for the number of one; integers may be names
            of classes as well as positions; two labels are one number; one split lacks a name.
    """
    own = set(texts)
    words = own | (set(other.words) if other else set())
    are_numbers = not are_names and all(map(NUMBER.fullmatch, words))
    if classes is not None and (words if are_numbers else own) <= set(classes):
        if are_numbers:
            _check_not_ambiguous(words, classes, place)
        return Labels(_positions(texts, classes), classes)
    if not are_names:
        _check_none_is_negative(texts, where)
    ordered = _in_order(words, place)
    if are_numbers:
        labels = np.array([int(text) for text in texts], dtype=np.int64)
        check_largest(labels, where, len(classes) if classes is not None else None)
        return Labels(labels, classes or [str(label) for label in range(int(ordered[-1]) + 1)])
    if classes is not None:
        index = next(index for index, text in enumerate(texts) if text not in set(classes))
        raise ValueError(
            f"{where(index)}: the label {shortened(repr(texts[index]))} is none of the {len(classes)} classes that "
            f"{' or '.join(CLASS_FILES)} names"
        )
    if other:
        check_same_classes(Words(place, own), other)
    return Labels(_positions(texts, ordered), ordered)


def _positions(texts: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    position = {name: label for label, name in enumerate(classes)}
    return np.array([position[text] for text in texts], dtype=np.int64)


def _in_order(words: Iterable[str], place: str) -> list[str]:
    try:
        return in_order(words)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _check_not_ambiguous(words: Collection[str], classes: Sequence[str], place: str) -> None:
    """Raises ValueError for numbers that are names of classes, and positions of others."""
    if any(int(word) >= len(classes) for word in words):
        return
    for word in sorted(words):
        if classes[int(word)] != word:
            raise ValueError(
                f"{place}: the label {word} is the name of one class in {' or '.join(CLASS_FILES)} and the position, "
                f"counted from 0, of another, {shortened(repr(classes[int(word)]))}: give the classes names that are "
                "no numbers there, and, where names are meant, in the labels"
            )


def _check_none_is_negative(texts: Sequence[str], where: Callable[[int], str]) -> None:
    index = next((index for index, text in enumerate(texts) if NEGATIVE.fullmatch(text)), None)
    if index is not None:
        raise ValueError(
            f"{where(index)}: the label {shortened(texts[index])} is negative, and classes are counted from 0: leave "
            "images without a class out"
        )


def check_largest(labels: np.ndarray, where: Callable[[int], str], count: int | None = None) -> None:
    """Raises ValueError, for a label that can't be the number of a class.

    `count` is the number of classes; None: not known, and then more than a thousand are implausible where fewer than
    every tenth has images.
    """
    largest, used = int(labels.max()), len(np.unique(labels))
    place = where(int(labels.argmax()))
    if count is not None and largest >= count:
        raise ValueError(
            f"{place}: the label {largest} is none of the {count} classes that {' or '.join(CLASS_FILES)} names, "
            "counted from 0"
        )
    if count is None and largest >= max(FEW_CLASSES, LABELS_A_CLASS * used):
        raise ValueError(
            f"{place}: with the label {largest} there would be {largest + 1} classes, of which {used} have images: "
            "number the classes from 0 on"
        )


def check_same_classes(own: Words, other: Words) -> None:
    """Raises a ValueError that names a class which only one of two splits has."""
    differing = sorted(set(own.words) ^ set(other.words))
    if differing:
        present, absent = (own, other) if differing[0] in own.words else (other, own)
        raise ValueError(
            f"{present.place} has a class {shortened(repr(differing[0]))} and {absent.place} has not: train and val "
            f"need the same classes; {CLASS_FILES[0]} beside them, one name a line, lets one of them lack some"
        )


def read_classes(folder: Path) -> list[str] | None:
    """Reads the class names beside the images, in the order of the labels; None where no file names them.

    `classes.txt` holds one a line, `classes.json` a list of them, or an object of names and numbers from 0.

    Raises:
        ValueError: the file holds something else, or a name twice.
    """
    path = next((folder / name for name in CLASS_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = text.removesuffix("\n").split("\n") if path.suffix == ".txt" else _names_in(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{path} holds no class names: {shortened(printable(error))}") from None
    names = [name.removesuffix("\r") for name in names]
    twice = _first_twice(names)
    if twice is not None:
        raise ValueError(f"{path} names the class {shortened(repr(twice))} twice: each is one class")
    if not all(names):
        raise ValueError(f"{path} has an empty name in it: give one class a line, without empty ones")
    return names


def _names_in(content: object) -> list[str]:
    if isinstance(content, dict):
        position = {str(number): name for name, number in content.items()}
        content = [position.get(str(label)) for label in range(len(content))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content) or not content:
        raise ValueError("expected a list of names, or an object of names and numbers from 0")
    return content


def _first_twice(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]
