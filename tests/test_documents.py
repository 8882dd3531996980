"""The examples of the documents run as they stand."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
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
