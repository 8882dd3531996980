"""Checks of plain data from untrusted files: each names the value that is not as expected, and where it stands.

A check is called with the place of a value, for the message, and the value; it raises ValueError or returns nothing.
Checks combine to a schema, which is applied once, before the content of a file is used.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Check = Callable[[str, Any], None]
LARGEST = sys.float_info.max
VIEW_BYTES = 2**28  # of a tensor that repeats its stored elements


def expect(holds: object, where: str, value: object, expected: str) -> None:
    """Raises ValueError with the place, the value and what is expected instead, unless `holds`."""
    if not holds:
        raise ValueError(f"{where} is {_show(value)}, not {expected}")


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, str | int | float | bool | None):
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:40]}..."
    return f"a {type(value).__name__}"


def anything(where: str, value: object) -> None:
    """Accepts every value: for values that are checked where they are used."""


def integer(least: int = 0, most: int = 2**48) -> Check:
    """Builds the check for an integer within bounds, both included."""
    return lambda where, value: expect(
        type(value) is int and least <= value <= most, where, value, f"an integer from {least} to {most}"
    )


def number(where: str, value: object) -> None:
    """Checks for a finite number."""
    finite = type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]
    expect(finite, where, value, "a finite number")


def positive(where: str, value: object) -> None:
    """Checks for a finite number above 0."""
    number(where, value)
    expect(value > 0, where, value, "above 0")  # type: ignore[operator]


def boolean(where: str, value: object) -> None:
    """Checks for true or false."""
    expect(isinstance(value, bool), where, value, "true or false")


def text(where: str, value: object) -> None:
    """Checks for text."""
    expect(isinstance(value, str), where, value, "text")


def texts(most: int, longest: int, in_all: int) -> Check:
    """Builds the check for a list of at most so many texts, each and all of them of at most so many characters."""

    def checked(where: str, value: Any) -> None:
        sequence(text)(where, value)
        fits = len(value) <= most and max(map(len, value), default=0) <= longest and sum(map(len, value)) <= in_all
        expect(fits, where, value, f"at most {most} texts of {longest} characters, {in_all} in all")

    return checked


def one_of(*choices: object) -> Check:
    """Builds the check for one of several values."""
    expected = f"one of {', '.join(map(repr, choices))}"
    # `value in choices` would raise for a tensor, and take 1 for True.
    return lambda where, value: expect(
        any(type(value) is type(choice) and value == choice for choice in choices), where, value, expected
    )


def tensor(where: str, value: object) -> None:
    """Checks for a dense tensor on the CPU that is stored element by element, or has at most `VIEW_BYTES`.

    A view may repeat a few stored elements any number of times, so that a copy of it could exhaust the memory.
    """
    expect(isinstance(value, Tensor), where, value, "a tensor")
    assert isinstance(value, Tensor)
    dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
    expect(dense and value.device.type == "cpu", where, value, "dense, with its elements in the file")
    stored, whole = value.untyped_storage().nbytes(), value.numel() * value.element_size()
    expect(whole <= max(stored, VIEW_BYTES), where, value, "stored element by element")


def optional(check: Check) -> Check:
    """Builds the check for None or what another one accepts."""

    def checked(where: str, value: object) -> None:
        if value is not None:
            check(where, value)

    return checked


def any_of(expected: str, *checks: Check) -> Check:
    """Builds the check for what at least one of several accepts; `expected` describes it."""

    def passes(check: Check, value: object) -> bool:
        try:
            check("", value)
        except ValueError:
            return False
        return True

    return lambda where, value: expect(any(passes(check, value) for check in checks), where, value, expected)


def sequence(check: Check, length: int | None = None) -> Check:
    """Builds the check for a list or tuple, of a length where one is given, whose items all pass."""

    def checked(where: str, value: Any) -> None:
        expect(isinstance(value, list | tuple), where, value, "a list")
        expect(length is None or len(value) == length, where, value, f"a list of {length}")
        for i, item in enumerate(value):
            check(f"{where}[{i}]", item)

    return checked


def mapping(key: type, check: Check) -> Check:
    """Builds the check for a dictionary with keys of one type, whose values all pass."""

    def checked(where: str, value: Any) -> None:
        expect(isinstance(value, dict), where, value, "a dictionary")
        for name, item in value.items():
            expect(type(name) is key, f"a key of {where}", name, f"of type {key.__name__}")
            check(f"{where}.{name}", item)

    return checked


def record(fields: Mapping[str, Check], required: bool = False) -> Check:
    """Builds the check for a dictionary whose known keys pass, each; all must be there if `required`."""

    def checked(where: str, value: Any) -> None:
        expect(isinstance(value, dict), where, value, "a dictionary")
        for name, check in fields.items():
            if name in value:
                check(f"{where}.{name}" if where else name, value[name])
            elif required:
                raise ValueError(f"{where}.{name} is missing" if where else f"{name} is missing")

    return checked
