"""Text of unknown origin on one line of a terminal or a log."""


def printable(text: object) -> str:
    """Returns text with every character escaped that is not printable (`\\n`, `\\x1b`, `\\u202e`, `\\udcff`).

    Names of files and classes, keys and tags come from anybody. Printed as they are, a line break would forge a line
    of the log, an escape sequence would reach the terminal, and a lone surrogate (a byte of a file name that is no
    UTF-8) could not be encoded.
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)
