"""What a key may hold: one `Kind` for each type, which turns what was written into the value that was meant.

YAML files, the command line and Python callers all pass through here, so `1e-3`, `"1e-3"`, `0.001` and a NumPy scalar
mean the same everywhere.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, NamedTuple

from utils.files import user_path

NULL_WORDS = ("None", "null")  # how nothing is spelt on a command line, and by a Python hand in YAML


class Kind(NamedTuple):
    """A type that keys have: `name` completes "expects ..."; `read` converts, or raises ValueError."""

    name: str
    read: Callable[[object], Any]


def _boolean(value: object) -> bool:
    word = str(value).strip().lower()  # str() serves bool, NumPy's bool and text alike
    if word not in ("true", "false"):
        raise ValueError
    return word == "true"


def _number(value: object) -> float:
    # Python counts True as 1, which nobody means by it.
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def _integer(value: object) -> int:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    number = _number(value)  # 10.0, or text such as 1e3
    if not number.is_integer():
        raise ValueError
    return int(number)


def _text(value: object) -> str:
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    # A forgotten value must not become a folder that is called None.
    if isinstance(value, bool) or not isinstance(value, str | Real) or value in NULL_WORDS:
        raise ValueError
    return str(value)


def _path(value: object) -> str:
    text = _text(value)
    return str(user_path(text)) if text.startswith("~") else text


def _items(value: object) -> list[object]:
    """Splits a list, a tuple, or their text with or without brackets: `(0.9, 0.999)`, `[0.9,0.999]`, `0.9,0.999`."""
    if isinstance(value, str):
        text = value.strip()
        if text[:1] + text[-1:] in ("()", "[]"):
            text = text[1:-1]
        text = text.strip().removesuffix(",")
        return list(text.split(",")) if text else []
    if isinstance(value, list | tuple):
        return list(value)
    raise ValueError


def _pair(read: Callable[[object], Any], value: object) -> tuple[Any, Any]:
    first, second = map(read, _items(value))  # any other count is the ValueError of unpacking
    return first, second


def _integers(value: object) -> tuple[int, ...]:
    several = isinstance(value, list | tuple | str)
    return tuple(map(_integer, _items(value))) if several else (_integer(value),)


def _size(value: object) -> int | tuple[int, int]:
    several = isinstance(value, list | tuple) or (isinstance(value, str) and "," in value)
    return _pair(_integer, value) if several else _integer(value)


def optional(kind: Kind) -> Kind:
    """The same kind, where nothing (null) has a meaning too."""
    return Kind(
        f"{kind.name}, or null",
        lambda value: None if value is None or value in NULL_WORDS else kind.read(value),
    )


BOOLEAN = Kind("true or false", _boolean)
INTEGER = Kind("an integer", _integer)
NUMBER = Kind("a finite number", _number)
TEXT = Kind("text", _text)
PATH = Kind("text, a path in which ~ or ~USER stands for the home of a user who exists", _path)
NUMBER_PAIR = Kind("a pair of finite numbers such as [0.5, 1]", lambda value: _pair(_number, value))
INTEGERS = Kind("integers such as [1, 3]", _integers)
SIZE = Kind("an integer, or a pair of integers such as [224, 256]", _size)

_KIND_OF_TYPE: dict[type, Kind] = {bool: BOOLEAN, int: INTEGER, float: NUMBER, str: TEXT, tuple: NUMBER_PAIR}


def kind_of(default: object) -> Kind:
    """Returns the kind of a key by its default; KeyError for a default of a type that no key has."""
    return _KIND_OF_TYPE[type(default)]
