"""What holds for all tests."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from pictures import write_street
from processes import Process, Zygote

pytest_plugins = ["script_runs"]

# A busy machine is no reason to fail: how long an example takes is not what these tests are about.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# A shell lets its background jobs ignore Ctrl-C, and so would every process that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
