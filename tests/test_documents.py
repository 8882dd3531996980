"""The examples of the documents run as they stand, and files for other programs say what the project says."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = {
    f"{path.stem} {number}": code
    for path in sorted(DOCS.glob("*.md"))
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL), 1)
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name):
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "example"})


def test_the_examples_are_found():
    assert "add_local_branches(model" in EXAMPLES["extending 2"]


def read_yaml(name):
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture
def targets():
    """What `make` knows."""
    return set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_continuous_integration_calls_make(targets):
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == ["make lint", "make test"]
    assert {command.removeprefix("make ") for command in commands} <= targets


def test_every_supported_python_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = read_yaml(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    stated = [word.rpartition(" ")[2] for word in project["classifiers"] if word.startswith("Programming Language")]
    assert versions == [version for version in stated if "." in version]
    assert project["requires-python"] == f">={versions[0]}"


def test_a_commit_is_checked_by_make(targets):
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    assert "lint" in targets


def test_the_licence_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = read_yaml("CITATION.cff")
    assert project["license"] == citation["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")
    assert citation["authors"] == project["authors"]
    assert [author["name"] in (ROOT / "LICENSE").read_text() for author in citation["authors"]] == [True]
    assert project["urls"]["Paper"] in [paper["url"] for paper in citation["references"]]
