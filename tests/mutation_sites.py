"""Where a source can be changed a little so that something should break: for `tests.mutations`.

Operators and constants are swapped, conditions negated, and early returns, `raise` and calls for their effect left out.
Annotations, messages (f-strings), assertions, `strict=` of `zip`, which is one too, and `__all__` are left as they are.
"""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

# By the name of the syntax tree's node.
# fmt: off
SWAPS = {
    "Lt": ("<", "<="), "LtE": ("<=", "<"), "Gt": (">", ">="), "GtE": (">=", ">"),
    "Eq": ("==", "!="), "NotEq": ("!=", "=="),
    "Is": ("is", "is not"), "IsNot": ("is not", "is"), "In": ("in", "not in"), "NotIn": ("not in", "in"),
    "Add": ("+", "-"), "Sub": ("-", "+"), "Mult": ("*", "/"), "Div": ("/", "*"), "FloorDiv": ("//", "%"),
    "Mod": ("%", "//"), "And": ("and", "or"), "Or": ("or", "and"),
}
# fmt: on


class Mutation(NamedTuple):
    """Bytes of a file to replace; `lines` are those of the statement, none outside of functions."""

    path: str
    line: int
    start: int
    end: int
    new: str
    lines: range

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def describe(self, source: bytes) -> str:
        old = " ".join(source[self.start : self.end].decode().split())
        line = source.splitlines()[self.line - 1].decode().strip()
        return f"{self.path}:{self.line}: {old!r} -> {self.new!r} in: {line}"


class Change(NamedTuple):
    """Bytes to replace, and by what."""

    start: int
    end: int
    new: str


class Source:
    """The bytes of a source file, with the places of the nodes of its syntax tree."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._lines = [0]
        for line in content.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def begin(self, node: ast.AST) -> int:
        return self._lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        return self.content[self.begin(node) : self.end(node)].decode()

    def whole(self, node: ast.AST, new: str) -> Change:
        return Change(self.begin(node), self.end(node), new)

    def swap(self, operator: ast.AST, left: ast.AST, right: ast.AST) -> Iterator[Change]:
        """Swaps an operator between two nodes, if it is one of `SWAPS`."""
        name = type(operator).__name__
        if name in SWAPS:
            old, new = SWAPS[name]
            between = re.finditer(rf"#.*|{re.escape(old)}".encode(), self.content[self.end(left) : self.begin(right)])
            at = self.end(left) + next(match.start() for match in between if not match[0].startswith(b"#"))
            yield Change(at, at + len(old), new)

    def changes(self, node: ast.AST) -> Iterator[Change]:
        """Yields what can be changed at a node itself, not below it."""
        match node:
            case ast.Compare():
                for operator, sides in zip(node.ops, pairwise([node.left, *node.comparators]), strict=True):
                    yield from self.swap(operator, *sides)
            case ast.BoolOp():
                for sides in pairwise(node.values):
                    yield from self.swap(node.op, *sides)
            case ast.BinOp():
                yield from self.swap(node.op, node.left, node.right)
            case ast.AugAssign():
                yield from self.swap(node.op, node.target, node.value)
            case ast.UnaryOp(op=ast.Not()):
                yield Change(self.begin(node), self.begin(node) + len("not "), "")
            case ast.Constant(value=bool()):
                yield self.whole(node, str(not node.value))
            case ast.Constant(value=int()):
                yield self.whole(node, str(node.value + 1))
            case ast.Raise() | ast.Expr(value=ast.Call()):
                yield self.whole(node, "pass")
            case ast.If() | ast.IfExp():
                if not negated_anyway(node.test):
                    yield self.whole(node.test, f"not ({self.text(node.test)})")
                if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return):
                    yield self.whole(node.body[-1], "pass")


def negated_anyway(test: ast.expr) -> bool:
    """Tells whether another change of a condition is its negation: `not` left out, `==` in place of `!=`, ..."""
    match test:
        case ast.UnaryOp(op=ast.Not()):
            return True
        case ast.Compare(ops=[ast.Eq() | ast.NotEq() | ast.Is() | ast.IsNot() | ast.In() | ast.NotIn()]):
            return True
    return False


def left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Assert() | ast.JoinedStr() | ast.keyword(arg="strict"):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
    return False


def find_mutations(path: str, content: bytes) -> list[Mutation]:
    """Returns all of a file, in the order of the syntax tree."""
    source = Source(content)

    def walk(node: ast.AST, lines: range, in_function: bool) -> Iterator[Mutation]:
        if left_alone(node):
            return
        if isinstance(node, ast.stmt) and in_function:
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            lines = range(node.lineno, last + 1)
        for change in source.changes(node):
            yield Mutation(path, content[: change.start].count(b"\n") + 1, *change, lines)
        for name, value in ast.iter_fields(node):
            if isinstance(node, ast.FunctionDef) and name == "args":  # defaults matter where the function is called
                lines = range(node.body[0].lineno, node.end_lineno + 1)
            inside = in_function or (isinstance(node, ast.FunctionDef) and name == "body")
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                    yield from walk(child, lines, inside)

    return list(walk(ast.parse(content), range(0), False))
