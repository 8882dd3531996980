"""Text of unknown origin and length on one line of a terminal or a log."""


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
