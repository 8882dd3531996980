"""Runs to be disturbed, each a process of its own, and the undisturbed run that they are compared with."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from fault_runs import Run
from PIL import Image


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
