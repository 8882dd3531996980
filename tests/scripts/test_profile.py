"""`--profile`: a real trace of a few updates, and a folder in which nothing else changes."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
from script_runs import ARCH, SHORT, Run


def steps_of(trace: Path) -> list[int]:
    """The updates in a trace, which is sound JSON, each with forward and backward passes in it."""
    with gzip.open(trace, "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    names = {event["name"] for event in events}
    assert {"aten::convolution", "aten::convolution_backward", "Optimizer.step#AdamW.step"} <= names
    steps = [event for event in events if event["name"].startswith("ProfilerStep#")]
    assert all(event["dur"] > 0 for event in steps)
    return sorted(int(event["name"].split("#")[1]) for event in steps)


@pytest.fixture
def profile(script, tmp_path):
    """Returns a function that profiles the short training in the folder of the test, and what it printed."""

    def run(*opts: object) -> str:
        result = script("main_repmlp.py", "--profile", "--output", tmp_path, "--tag", "first", *SHORT.split(), *opts)
        assert result.status == 0, result.err
        return result.out

    return run


def test_a_profile_disturbs_nothing_in_the_folder_of_a_run(profile, trained: Run, tmp_path: Path):
    folder = tmp_path / ARCH / "first"
    shutil.copytree(trained.folder, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    out = profile()
    assert out.rstrip().endswith(f"profile of updates 5 to 7 in {folder / 'profile0'}")
    assert re.search(r"^ +aten::mm +[\d.]+%", out, re.MULTILINE)
    profile("DATA.BATCH_SIZE", 700)  # two updates an epoch
    assert [path.name for path in sorted(folder.glob("profile*/*"))] == ["rank0.pt.trace.json.gz"] * 2
    assert [steps_of(trace) for trace in sorted(folder.glob("profile*/*"))] == [[5, 6, 7], [5, 6, 7]]
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after.pop("log_rank0.txt").startswith(before.pop("log_rank0.txt"))
    assert after == before


def test_a_new_run_is_not_begun(profile, tmp_path: Path):
    profile()
    assert {path.name for path in (tmp_path / ARCH / "first").iterdir()} == {"log_rank0.txt", "profile0"}
