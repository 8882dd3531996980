"""Runs to be disturbed, each a process of its own, and the undisturbed run that they are compared with."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_runs import HERE, Process, Run
from PIL import Image

from tools import soak

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "REPMLP_TRACEBACK", "PYTHONWARNINGS")


def clean_environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith("SLURM_")}
    return kept | soak.ENVIRONMENT


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Returns a function that starts a script in a new process."""
    work = tmp_path_factory.mktemp("work")
    zygote = subprocess.Popen(
        [sys.executable, str(HERE / "fault_zygote.py")],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    assert zygote.stdout.readline() == "ready\n"
    started: list[Process] = []

    def ask(order: dict) -> object:
        zygote.stdin.write(json.dumps(order) + "\n")
        return json.loads(zygote.stdout.readline())

    def begin(script: str, *words: object, environment: dict | None = None, largest_file: int = 0) -> Process:
        console = work / f"console{len(started)}"
        order = {
            "script": str(soak.ROOT / script),
            "arguments": list(map(str, words)),
            "folder": str(work),
            "environment": environment or {},
            "largest_file": largest_file,
            "out": f"{console}.out",
            "err": f"{console}.err",
        }
        for name in ("out", "err"):
            Path(order[name]).touch()
        started.append(Process(ask, order))
        return started[-1]

    yield begin
    for process in started:
        if process.alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    zygote.stdin.close()
    zygote.wait()
    zygote.stdout.close()


@pytest.fixture
def run(start, tmp_path: Path) -> Run:
    """A training that has not begun."""
    return Run(start, tmp_path / "output")


@pytest.fixture(scope="session")
def undisturbed(start, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The short training that nothing happened to."""
    run = Run(start, tmp_path_factory.mktemp("undisturbed"))
    run.finish()
    return run


@pytest.fixture(scope="session")
def _interrupted(start, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(start, tmp_path_factory.mktemp("interrupted"))
    assert run.start(plan={"kill_at_update": 63}).wait() == -signal.SIGKILL
    assert run.state()["progress"]["update"] == 60
    return run


@pytest.fixture
def interrupted(_interrupted: Run, run: Run) -> Run:
    """A training that was killed before update 63 of 88, in the second of two epochs; its latest state is of 60."""
    shutil.copytree(_interrupted.folder, run.folder)
    return run


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of two classes with 32 training and 6 test images each, every one in the colour of its class."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 32), ("val", 6)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([count, label, number]).integers(0, 60, (16, 20, 3), dtype=np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    return root
