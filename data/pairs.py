"""Pairs of images for verification: do both show the same class, such as a person?"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .sources import ImageSource

WORDS = {"same": True, "different": False}
MAX_TRIES = 100  # draws per requested pair


class Pairs(NamedTuple):
    """Indices of both images in a source, and whether they are of one class; each (P,)."""

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray


def read_pairs(path: str | Path, source: ImageSource) -> Pairs:
    """Reads lines `path path same` or `path path different`, of names of images of a source, such as the
    paths below its folder.

    Fields are separated by tabs, or by spaces if the line has no tab. Empty lines and lines that start with # are
    skipped.

    Raises:
        ValueError: the file is missing or has no pairs, a line has another form, or an image is not in the source.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no list of pairs at {path}")
    positions = {source.name(index): index for index in range(len(source))}
    rows: list[tuple[int, int, bool]] = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        *images, word = line.split("\t" if "\t" in line else None)
        if len(images) != 2 or word not in WORDS:
            raise ValueError(f"{path}, line {number}: expected `path path same` or `path path different`, not {line!r}")
        missing = [image for image in images if image not in positions]
        if missing:
            raise ValueError(f"{path}, line {number}: there is no image {missing[0]} in the data of {source.locate(0)}")
        rows.append((positions[images[0]], positions[images[1]], WORDS[word]))
    if not rows:
        raise ValueError(f"{path} holds no pairs")
    first, second, same = zip(*rows, strict=True)
    return Pairs(np.array(first), np.array(second), np.array(same))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that editors on Windows begin with
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a list of pairs in UTF-8: {error}") from error


def draw_pairs(labels: np.ndarray, count: int, seed: int = 0) -> Pairs:
    """Draws distinct pairs of different images, half of them of one class.

    Args:
        labels: int (N,) of the images.
        count: pairs to draw; fewer if there are no more, always equally many of each kind.
        seed: the same seed draws the same pairs.

    Raises:
        ValueError: fewer than two classes, or no class with two images.
    """
    if count < 2:
        raise ValueError(f"{count} pairs can't be drawn: one of a kind and one of two are the least")
    sizes = np.bincount(labels)
    if (sizes > 0).sum() < 2 or sizes.max() < 2:
        raise ValueError("pairs need two classes at least, one of them with two images")
    of_one, of_all = int((sizes * (sizes - 1) // 2).sum()), len(labels) * (len(labels) - 1) // 2
    wanted = min(count // 2, of_one, of_all - of_one)
    rng = np.random.default_rng(seed)
    found: dict[bool, dict[tuple[int, int], None]] = {True: {}, False: {}}
    with_partner = np.flatnonzero(sizes[labels] > 1)
    for same, pairs in found.items():
        for _ in range(wanted * MAX_TRIES):
            if len(pairs) == wanted:
                break
            first = rng.choice(with_partner if same else len(labels))
            others = np.flatnonzero((labels == labels[first]) == same)
            second = rng.choice(others)
            if first != second:
                pairs[min(first, second), max(first, second)] = None
    each = min(len(pairs) for pairs in found.values())
    rows = np.array([pair for pairs in found.values() for pair in list(pairs)[:each]])
    return Pairs(rows[:, 0], rows[:, 1], np.repeat(list(found), each))
