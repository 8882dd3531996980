"""The documents: examples run, and links, files, keys and tests that they name exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from configs.command_line import parse
from configs.schema import FIELD_TYPES, SECTIONS
from tasks import TASKS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLES = {
    f"{path.stem} {number}": code
    for path in sorted(DOCS.glob("*.md"))
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL), 1)
}
TESTS = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py")))
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])}
# Files that a document may name without their being there: what was removed, what an example adds, what a run writes.
ABSENT = {
    "CHANGELOG.md": {"tools/train_segmentation.py", "tools/train_face.py"},
    "docs/quantization.md": {"quantize.py"},
    "docs/extending.md": {"tasks/multilabel.py", "configs/digits_multilabel.yaml"},
    "README.md": {"config.yaml"},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name):
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "example"})


def test_the_examples_are_found():
    assert any("add_local_branches(model" in code for code in EXAMPLES.values())


def slug(heading: str) -> str:
    """Returns the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = DOCUMENTS[name]
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name: str) -> None:
    text = re.sub(r"\]\([^)]*\)", "]", DOCUMENTS[name].read_text())
    named = set(re.findall(r"(?<![\w./-])[\w./-]*\w\.(?:py|ya?ml|md|npz|toml)\b(?![\w/])", text))
    found = {file for file in named if (ROOT / file).exists() or (ROOT / "configs" / file).exists()}
    assert named - found == ABSENT.get(name, set())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_programs_keys_and_tests_that_are_named_exist(name: str) -> None:
    text = DOCUMENTS[name].read_text()
    for module in re.findall(r"\b((?:tools|benchmarks|tests)(?:\.[a-z_]+)+)\b(?!\.?\w)", text):
        file = f"{module.removesuffix('.py').replace('.', '/')}.py"
        assert (ROOT / file).exists() or file in ABSENT.get(name, set()), module
    for key in re.findall(r"\b((?:DATA|MODEL|SEG|FACE|TRAIN|AUG|TEST)\.[A-Z_.]*[A-Z_])\b", text):
        assert key in FIELD_TYPES or key in SECTIONS, key
    for test in re.findall(r"`(test_\w+\*?)`", text):
        assert re.search(f"def {test}\\(".replace("*", "\\w*"), TESTS), test


def commands_of(text: str) -> list[str]:
    """Returns the arguments of `main_repmlp.py` in the complete commands of a document."""
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"main_repmlp\.py +(--[^`|#\n]*)", joined)
    return [arguments.strip() for arguments in found if "..." not in arguments]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for arguments in commands_of(DOCUMENTS[name].read_text()):
        if not any(file in arguments for file in ABSENT.get(name, ())):
            parse(shlex.split(arguments))


def test_the_commands_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tasks = {parse(shlex.split(arguments)).config.TASK for arguments in commands_of(DOCUMENTS["README.md"].read_text())}
    assert tasks == {*TASKS}


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
