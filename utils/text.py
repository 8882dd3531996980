"""Text for a terminal or a log: of unknown origin and length on one line, and rows as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

Column = tuple[str, str, str]  # header, key of the row, format


def printable(text: object) -> str:
    """Returns text with every character escaped that is not printable (`\\n`, `\\x1b`, `\\u202e`, `\\udcff`).

    Names of files and classes, keys and tags are untrusted. Without escaping, a line break could forge a line of the
    log, an escape sequence could reach the terminal, and a lone surrogate (a byte of a file name that is not UTF-8)
    could not be encoded.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


def shortened(text: str, length: int = 200) -> str:
    """Returns text with its middle replaced by dots if it is longer than `length`; for user input in messages."""
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """Returns rows as text; the first column is set flush left, and a value that a row lacks is a dash."""
    cells = [[header for header, _, _ in columns]]
    cells += [[format(row[key], form) if row.get(key) is not None else "-" for _, key, form in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    lines = ["  ".join([line[0].ljust(widths[0]), *padded[1:]]) for line, padded in zip(cells, aligned, strict=True)]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
