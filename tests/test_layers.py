"""Imports go one way: scripts -> configs -> tasks -> engine -> data, models -> utils, and in no circle."""

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
# What a folder may import of the project besides itself. Scripts, the files that a user runs, may import everything.
LAYERS = {
    "utils": set(),
    "models": set(),
    "data": {"utils"},
    "engine": {"data", "models", "utils"},
    "tasks": {"engine", "data", "models", "utils"},
    "configs": {"tasks", "engine", "data", "models", "utils"},  # which asks for choices where they are defined
}
SCRIPT_FOLDERS = {"tools", "benchmarks"}
# The library installs alone. safetensors comes with timm and is imported where a file of that format is met;
# segmentation-models-pytorch is an extra and is imported where a segmentation network is built.
MODELS_NEED = {"torch", "timm"}
MODELS_IMPORT_LATE = {"safetensors", "segmentation_models_pytorch"}


class Import(NamedTuple):
    """One name that a file imports: absolute, whether at the top of the file or within a function."""

    target: str
    at_top: bool
    relative: bool


def project_files() -> dict[str, Path]:
    """Returns every module of the project, tests apart, by its dotted name."""
    folders = [ROOT / name for name in (*LAYERS, *SCRIPT_FOLDERS)]
    paths = sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


FILES = project_files()
PARTS = {name.split(".")[0] for name in FILES}


def imports(name: str, source: str, package: bool) -> Iterator[Import]:
    """Yields what a file imports; of `from a import b` it is `a.b` where that is a module, and `a` otherwise."""
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, id(node) in top, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: len(name.split(".")) - node.level + package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(inner if inner in FILES else base, id(node) in top, node.level > 0)


def imports_of(name: str) -> list[Import]:
    path = FILES[name]
    return list(imports(name, path.read_text(), path.name == "__init__.py"))


def part(name: str) -> str:
    return name.split(".")[0]


def violations(name: str, found: list[Import]) -> list[str]:
    """Returns the project's own modules that a file may not import."""
    own = part(name)
    allowed = {own, *LAYERS[own]} if own in LAYERS else PARTS
    return [i.target for i in found if part(i.target) in PARTS and part(i.target) not in allowed]


def test_the_project_is_found() -> None:
    assert {"main_repmlp", "test", "convert", "hubconf", "repmlpnet", *LAYERS} <= PARTS
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert folders - {"tests"} <= {*LAYERS, *SCRIPT_FOLDERS}, "give a new folder its place in the order"


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    assert violations(name, imports_of(name)) == []


@pytest.mark.parametrize("name", [name for name in FILES if part(name) == "models"])
def test_the_library_needs_torch_and_timm_alone(name: str) -> None:
    for found in imports_of(name):
        if part(found.target) == "models":
            assert found.relative, f"{found.target} must be imported relatively, for the package has another name"
        elif part(found.target) in MODELS_IMPORT_LATE:
            assert not found.at_top, f"{found.target} must be imported where it is needed"
        else:
            assert part(found.target) in MODELS_NEED | set(sys.stdlib_module_names), found.target


@pytest.mark.parametrize("name", [name for name in FILES if part(name) in LAYERS and part(name) != "configs"])
def test_sections_come_from_above(name: str) -> None:
    """Builders are given a section of the configuration; the library and the leaves know of none."""
    allowed = {"models": set(), "utils": set()}.get(part(name), {"yacs"})
    assert {part(i.target) for i in imports_of(name)} & {"configs", "yacs"} <= allowed


@pytest.mark.parametrize("name", [name for name in FILES if part(name) in LAYERS])
def test_scripts_alone_read_a_command_line(name: str) -> None:
    readers = {"utils.cli", "tasks.inference"}
    assert name in readers or "argparse" not in {part(i.target) for i in imports_of(name)}


def test_no_circles() -> None:
    graph = {name: {i.target for i in imports_of(name) if i.target in FILES and i.target != name} for name in FILES}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")
    assert order.index("models.reparam") < order.index("models.repmlpnet") < order.index("main_repmlp")


def path_of_a_run() -> list[str]:
    """Returns the modules on the path of a run that docs/design.md draws, from top to bottom."""
    section = (ROOT / "docs/design.md").read_text().split("## The path of a training run")[1]
    drawing = section.split("```")[1]
    return [name.replace("/", ".") for name in re.findall(r"^ *(\S+)\.py ", drawing, re.MULTILINE)]


def test_the_path_of_a_run_is_short_and_reads_from_top_to_bottom() -> None:
    path = path_of_a_run()
    assert path[0] == "main_repmlp"
    assert "engine.trainer" in path
    assert len(set(path)) == len(path) <= 10
    assert set(path) <= FILES.keys()
    for position, name in enumerate(path):
        assert {i.target for i in imports_of(name) if i.at_top} & {*path[:position]} == set(), name


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("data.loaders", "import models", ["models"]),
        ("data.loaders", "from models.build import create_model", ["models.build"]),
        ("models.build", "def f():\n    from data import datasets", ["data.datasets"]),
        ("models.build", "import utils.cli as c", ["utils.cli"]),
        ("models.build", "from ..utils import cli", ["utils.cli"]),
        ("utils.log", "import engine.train, os", ["engine.train"]),
        ("engine.train", "from main_repmlp import main", ["main_repmlp"]),
        ("engine.train", "from configs import load_config", ["configs"]),
        ("tasks.classification", "from configs.load import load", ["configs.load"]),
        ("engine.task", "from tasks import TASKS", ["tasks"]),
        ("engine.train", "import data\nfrom models import build\nfrom . import ema", []),
        ("tools.plot", "import engine.train, models, data, configs, utils.cli", []),
    ],
)
def test_the_rule_itself(name: str, source: str, expected: list[str]) -> None:
    assert violations(name, list(imports(name, source, package=False))) == expected
