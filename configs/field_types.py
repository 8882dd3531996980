"""The types of keys: each `FieldType` converts what was written to a value of the type.

YAML files, the command line and Python callers share them, so `1e-3`, `"1e-3"`, `0.001` and a NumPy scalar mean the
same everywhere.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from numbers import Integral, Real
from typing import Any, NamedTuple

from utils.files import user_path

NULL_WORDS = ("None", "null")  # null on a command line, and None as Python writes it


class FieldType(NamedTuple):
    """A type: `name` completes "expects ..."; `read` converts a value, or raises ValueError."""

    name: str
    read: Callable[[object], Any]


def _boolean(value: object) -> bool:
    word = str(value).strip().lower()  # str() handles bool, NumPy's bool and text alike
    if word not in ("true", "false"):
        raise ValueError
    return word == "true"


def _switch(value: object) -> bool | str:
    return "auto" if str(value).strip().lower() == "auto" else _boolean(value)


def _number(value: object) -> float:
    # True is 1 to Python, but hardly to the user.
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
    # A forgotten value must not become a folder named None.
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


def _sequence(read: Callable[[object], Any], value: object) -> tuple[Any, ...]:
    several = isinstance(value, list | tuple | str)
    return tuple(map(read, _items(value))) if several else (read(value),)


def _size(value: object) -> int | tuple[int, int]:
    several = isinstance(value, list | tuple) or (isinstance(value, str) and "," in value)
    return _pair(_integer, value) if several else _integer(value)


def optional(field_type: FieldType) -> FieldType:
    """The same type, or null."""
    return FieldType(
        f"{field_type.name}, or null",
        lambda value: None if value is None or value in NULL_WORDS else field_type.read(value),
    )


BOOLEAN = FieldType("true or false", _boolean)
SWITCH = FieldType(f"{BOOLEAN.name}, or auto", _switch)
INTEGER = FieldType("an integer", _integer)
NUMBER = FieldType("a finite number", _number)
TEXT = FieldType("text", _text)
PATH = FieldType("text, a path in which ~ or ~USER is the home of an existing user", _path)
NUMBER_PAIR = FieldType("a pair of finite numbers such as [0.5, 1]", lambda value: _pair(_number, value))
NUMBERS = FieldType("finite numbers such as [30, 60.5]", lambda value: _sequence(_number, value))
INTEGERS = FieldType("integers such as [1, 3]", lambda value: _sequence(_integer, value))
SIZE = FieldType("an integer, or a pair of integers such as [224, 256]", _size)

_FIELD_TYPE_OF: dict[type, FieldType] = {bool: BOOLEAN, int: INTEGER, float: NUMBER, str: TEXT, tuple: NUMBER_PAIR}


def field_type_of(default: object) -> FieldType:
    """Returns the type of a key from its default; raises KeyError where there is none for the default's Python type."""
    return _FIELD_TYPE_OF[type(default)]
