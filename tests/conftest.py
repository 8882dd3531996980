"""What holds for all tests."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image
from processes import Process, Zygote

pytest_plugins = ["script_runs"]

# A busy machine is no reason to fail: how long an example takes is not what these tests are about.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

ROAD, PERSON, CAR, RECTIFICATION = 7, 24, 26, 3  # label ids of Cityscapes; the last one is not evaluated


def write_street(root: Path, split: str, city: str, number: int, size: tuple[int, int] = (64, 96)) -> None:
    """Writes a grey background with a red rectangle and a blue disc, and its mask, as Cityscapes names them."""
    rng, (height, width) = np.random.default_rng([number, len(split)]), size
    mask = np.full(size, ROAD, dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    side = rng.integers(16, 28)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2 - side)
    mask[top : top + side, left : left + side] = CAR
    centre = rng.integers(16, height - 16), rng.integers(width // 2 + 14, width - 14)
    mask[np.hypot(y - centre[0], x - centre[1]) < rng.integers(8, 14)] = PERSON
    mask[:2] = RECTIFICATION
    colours = {ROAD: (110, 110, 110), CAR: (200, 40, 40), PERSON: (40, 60, 200), RECTIFICATION: (0, 0, 0)}
    image = np.zeros((*size, 3), dtype=np.uint8)
    for label, colour in colours.items():
        image[mask == label] = colour
    noisy = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    name = f"{city}_{number:06}_000019"
    for kind, suffix, content in (("leftImg8bit", "leftImg8bit", noisy), ("gtFine", "gtFine_labelIds", mask)):
        folder = root / kind / split / city
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(folder / f"{name}_{suffix}.png")


@pytest.fixture(scope="session")
def cityscapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated streets in the layout of Cityscapes, of two cities: 12 to train on, 4 to evaluate."""
    root = tmp_path_factory.mktemp("cityscapes")
    for number in range(12):
        write_street(root, "train", ("aachen", "bochum")[number % 2], number)
    for number in range(4):
        write_street(root, "val", "lindau", number)
    return root


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Process]]:
    """Returns a function that starts a script in a new process; what still runs in the end is killed."""
    zygote = Zygote(tmp_path_factory.mktemp("processes"))
    yield zygote.start
    zygote.close()


@pytest.fixture
def disk_of(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Returns a function that mounts a file system of a size such as `4m`."""
    disk, mount = tmp_path / "disk", shutil.which("mount")

    def make(size: str) -> Path:
        if os.geteuid() or mount is None:
            pytest.skip("only root may mount a small file system")
        disk.mkdir()
        command = [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
        return disk

    yield make
    if disk.is_mount():
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
