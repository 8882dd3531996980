"""Scripts that tests run, as a user would or without the time of the imports, and a training that all tests share.

A plugin, which `conftest.py` names: these fixtures are for more than one folder.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import in_process
import pytest
import torch
from processes import Process, clean_environment

ROOT = Path(__file__).parents[1]
ARCH = "RepMLPNet-Digits"
# Two epochs, so that there is a warm-up; a numbered checkpoint after each.
SHORT = f"--cfg {ROOT}/configs/quickstart.yaml --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 SAVE_FREQ 1"


class Result(NamedTuple):
    """How a script ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


class Run(NamedTuple):
    """A training that has ended: its output folder, its own folder there, and what it printed."""

    output: Path
    folder: Path
    result: Result

    def records(self, kind: str) -> list[dict]:
        """The records of one kind in `metrics.jsonl`."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def weights(self, name: str = "latest.pth", key: str = "model") -> dict[str, torch.Tensor]:
        """The weights in one of its checkpoints."""
        return torch.load(self.folder / name, weights_only=True)[key]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Returns whether two sets of weights have the same names and values."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def as_user(command: Sequence[str], folder: Path, timeout: float = 300) -> Result:
    """Runs a command as a user would, with a fresh interpreter."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def user() -> Callable[..., Result]:
    """Returns a function that runs `python <script> <arguments>` with a fresh interpreter, outside of the project."""

    def run(*arguments: object, folder: Path | None = None) -> Result:
        script, *rest = map(str, arguments)
        if script.startswith("-"):
            return as_user([sys.executable, script, *rest], folder or Path(tempfile.gettempdir()))
        return as_user([sys.executable, str(ROOT / script), *rest], folder or Path(tempfile.gettempdir()))

    return run


@pytest.fixture(scope="session")
def script(start: Callable[..., Process]) -> Callable[..., Result]:
    """Returns a function that runs a script in a process of its own, without the time that its imports take."""

    def run(*arguments: object, **options: object) -> Result:
        process = start(*arguments, **options)
        status = process.wait()
        return Result(status, process.out, process.err)

    return run


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Returns a function that runs a script within the process of the tests."""

    def run(script: str, *arguments: object) -> Result:
        capsys.readouterr()
        status = in_process.status_of(script, *arguments, folder=tmp_path)
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def train(script, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Returns a function that trains with some arguments to a new output folder, and asserts that it succeeds."""

    def run(arguments: str, *, arch: str = ARCH, tag: str = "run", output: Path | None = None, **options) -> Run:
        output = output or tmp_path_factory.mktemp("output")
        words = arguments.split()
        at = words.index("--opts") if "--opts" in words else len(words)
        result = script("main_repmlp.py", *words[:at], "--output", output, "--tag", tag, *words[at:], **options)
        assert result.status == 0, result.err
        return Run(output, output / arch / tag, result)

    return run


@pytest.fixture(scope="session")
def trained(user, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The short run on the digits that all tests share; no test writes to its folder."""
    output = tmp_path_factory.mktemp("trained")
    result = user("main_repmlp.py", "--output", output, "--tag", "first", *SHORT.split())
    assert result.status == 0, result.err
    return Run(output, output / ARCH / "first", result)


@pytest.fixture(scope="session")
def deployed(user, trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its best weights, converted."""
    path = tmp_path_factory.mktemp("deployed") / "deploy.pth"
    result = user("convert.py", trained.folder / "best_ckpt.pth", path, "-a", ARCH)
    assert result.status == 0, result.err
    return path
