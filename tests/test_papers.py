"""docs/papers.md: every row can be read, and what it says to work runs."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import in_process
import pytest

from configs.command_line import parse

ROOT = Path(__file__).parents[1]
STATUSES = ("works", "needs data", "cannot be known")
# Programs that read no configuration.
PARSED = ("test.py", "benchmarks/table2.py", "tools/plot_locality.py")


class Row(NamedTuple):
    """A statement of the material, what shows it here, and whether it can."""

    statement: str
    shown_by: str
    status: str

    @property
    def code(self) -> list[str]:
        """What stands in backticks."""
        return re.findall(r"`([^`]+)`", self.shown_by)


def rows() -> list[Row]:
    lines = (ROOT / "docs" / "papers.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [Row(*row) for row in cells if row != ["statement", "shown by", "status"]]


ROWS = rows()


def commands(status: str) -> list[str]:
    """Returns the commands of the rows of a status, each once."""
    return list(dict.fromkeys(code for row in ROWS if row.status == status for code in row.code if "python " in code))


def program(command: str) -> tuple[str, list[str]]:
    """Returns the file and the arguments of a command."""
    interpreter, *words = shlex.split(command)
    assert interpreter == "python"
    if words[0] == "-m":
        return f"{words[1].replace('.', '/')}.py", words[2:]
    return words[0], words[1:]


def test_every_row_says_what_shows_it() -> None:
    assert len(ROWS) > 80
    assert {row.status for row in ROWS} == {*STATUSES}
    for row in ROWS:
        assert row.statement
        assert row.shown_by
        assert row.code or row.status == "cannot be known", row


def test_no_statement_stands_twice() -> None:
    statements = [(row.statement, row.shown_by) for row in ROWS]
    assert len(set(statements)) == len(statements)


def test_tests_and_files_that_are_named_exist() -> None:
    for row in ROWS:
        for name in re.findall(r"tests/[\w/]+\.py", row.shown_by):
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("command", commands("needs data"))
def test_a_command_that_needs_data_is_accepted(command: str) -> None:
    """Down to the last key; what it reads is not opened."""
    file, words = program(command)
    if file == "main_repmlp.py":
        parse(words)
    else:
        assert file in PARSED
        in_process.module_of(file)["parser"]().parse_args(words)


@pytest.mark.xdist_group("papers")
@pytest.mark.parametrize("command", commands("works"))
def test_a_command_that_works_runs(command, trained, deployed, call, tmp_path):
    file, words = program(command)
    files = {
        "WEIGHTS.pth": trained.folder / "best_ckpt.pth",
        "DEPLOY.pth": deployed,
        "NEW.pth": tmp_path / "new.pth",
        "NEW.png": tmp_path / "new.png",
    }
    words = [str(files.get(word, ROOT / word if word.startswith("configs/") else word)) for word in words]
    result = call(file, *words)
    assert result.status == 0, result.err
    assert result.out
    assert all(files[name].stat().st_size > 1000 for name in ("NEW.pth", "NEW.png") if name in command)
