"""Text of unknown origin on one line, and tables."""

import os
import sys

import pytest

from utils.text import printable, shortened, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("ant 1.png", "ant 1.png"),
        ("Ärger 蚂蚁 🐜", "Ärger 蚂蚁 🐜"),
        (r"C:\new", r"C:\new"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[2J\x07\x7f", r"\x1b[2J\x07\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u2028b\u202egpj.exe", r"a\u2028b\u202egpj.exe"),
        ("tag\U000e0041", r"tag\U000e0041"),
        (os.fsdecode(b"caf\xe9.png"), r"caf\udce9.png"),
        (ValueError("two\nlines"), r"two\nlines"),
    ],
)
def test_what_is_not_printable_is_escaped(text, shown):
    assert printable(text) == shown


def test_every_character_becomes_printable_and_the_printable_ones_stay():
    for code in (*range(0x3000), *range(0xD800, 0xE000), *range(0x3000, sys.maxunicode, 97)):
        shown = printable(chr(code))
        assert shown.isprintable()
        assert (shown == chr(code)) == chr(code).isprintable()
        shown.encode("utf-8")


def test_long_text_keeps_its_ends():
    assert shortened("x" * 200) == "x" * 200
    assert shortened("a" * 500 + "b" * 500) == "a" * 100 + " ... " + "b" * 100


def test_table_is_aligned() -> None:
    text = table([{"name": "a", "x": 1.234}, {"name": "longer", "x": None}], [("form", "name", "s"), ("x", "x", ".1f")])
    assert text.splitlines() == ["form      x", "-----------", "a       1.2", "longer    -"]
