"""What `tests.mutations` changes, and which tests it runs for a change."""

from pathlib import Path

import pytest
from mutation_sites import find_mutations


def mutants(source: str) -> list[str]:
    content = source.encode()
    return [mutation.apply(content).decode() for mutation in find_mutations("a.py", content)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = b < c <= d", ["a = b <= c <= d", "a = b < c < d"]),
        ("a = b is not c", ["a = b is c"]),
        ("a = (b) + (c)", ["a = (b) - (c)"]),
        ("a += b // c", ["a -= b // c", "a += b % c"]),
        ("a = b and c and not d", ["a = b or c and not d", "a = b and c or not d", "a = b and c and d"]),
        ("a = f(-1, True)", ["a = f(-2, True)", "a = f(-1, False)"]),
        ("é = b[1:]", ["é = b[2:]"]),
        ("f(a)\n", ["pass\n"]),
        ("a = b if c else d", ["a = b if not (c) else d"]),
        ("a = b if c == d else e", ["a = b if c != d else e"]),
        ("while a:\n    raise b", ["while a:\n    pass"]),
    ],
)
def test_what_is_changed(source: str, expected: list[str]) -> None:
    assert mutants(source) == expected


def test_conditions_are_negated_and_early_returns_left_out() -> None:
    source = "def f(a, b):\n    if (\n        a  # or so\n        or b\n    ):\n        return b\n    return a\n"
    assert mutants(source) == [
        source.replace("a  # or so\n        or b", "not (a  # or so\n        or b)"),
        source.replace("return b", "pass"),
        source.replace("    or b", "    and b"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        '"""Returns 1 + 1."""',
        "def f(a: 'b < c', d: T[1] | None) -> T[2]: ...",
        "a: T[1] = b",
        "assert a < b, f(1)",
        "raise_ = f'{a + 1}'",
        "a = zip(b, c, strict=True)",
        "__all__ = ['a' * 2]",
        "return_ = 1.5",
    ],
)
def test_what_is_left_alone(source: str) -> None:
    assert mutants(source) == []


def test_a_change_names_the_lines_of_its_statement() -> None:
    source = b"LIMIT = 1\ndef f(a, b=2):\n    if (\n        a > 3\n    ):\n        g(a,\n          4)\n"
    places = {m.new: (m.line, m.lines) for m in find_mutations("a.py", source)}
    assert places["2"] == (1, range(0))
    assert places["3"] == (2, range(3, 8))
    assert places["4"] == (4, range(3, 6))
    assert places["5"] == (7, range(6, 8))


def test_every_change_of_the_project_is_python() -> None:
    for path in Path(__file__).parents[1].glob("models/*.py"):
        for mutation in find_mutations(path.name, path.read_bytes()):
            compile(mutation.apply(path.read_bytes()), path.name, "exec")
