"""What all programs in `tools` and `benchmarks` have in common."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAMS = sorted(
    path
    for folder in ("tools", "benchmarks")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_every_program_explains_itself_and_knows_its_arguments(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    name = f"{path.parent.name}.{path.stem}"
    monkeypatch.delitem(sys.modules, name, raising=False)  # that of another test
    for argument, status, beginning in (("--help", 0, "usage: "), ("--nonsense", 2, "error: ")):
        monkeypatch.setattr(sys, "argv", [path.name, argument])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(name, run_name="__main__")
        printed = capsys.readouterr()
        assert stop.value.code == status
        assert (printed.out if status == 0 else printed.err).startswith(beginning)
        assert (printed.err if status == 0 else printed.out) == ""
    assert list(tmp_path.iterdir()) == []


def test_the_programs_are_found():
    assert {"quickstart", "predict", "soak", "inference"} <= {path.stem for path in PROGRAMS}
