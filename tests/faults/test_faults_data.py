"""Images that can't be read and data loading processes that the system kills."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from fault_runs import children, one_line

from tools import soak


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """The image folder with three training images that are no images any more: a text, a cut one, an empty one."""
    root = Path(shutil.copytree(images, tmp_path / "broken"))
    (root / "train/ant/3.png").write_text("this is a text\n")
    cut = root / "train/bee/5.png"
    cut.write_bytes(cut.read_bytes()[:100])
    (root / "train/bee/30.png").write_bytes(b"")
    return root


def of(folder: Path) -> tuple[object, ...]:
    """Options that train on an image folder, with four updates an epoch."""
    return ("DATA.DATA_PATH", folder, "DATA.DATASET", "imagenet", "DATA.BATCH_SIZE", 16, "SAVE_STEPS", 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_once_replaced_and_counted(run, broken, workers):
    process = run.finish(*of(broken), workers=workers)
    for name in ("ant/3.png", "bee/5.png", "bee/30.png"):
        assert run.log.count(f"unreadable image replaced: {broken}/train/{name}: ") == 1
    assert process.out.count("unreadable image replaced") == 3
    assert "; 3 unreadable images, 0 skipped updates; " in run.log
    assert len(run.records("train")) == 4


def test_they_stay_known_and_counted_over_a_restart(run, broken):
    assert run.start(*of(broken), plan={"kill_at_update": 5}).wait() == -signal.SIGKILL
    assert run.log.count("unreadable image replaced") == len(run.state()["unreadable"]) == 3
    run.finish(*of(broken))
    assert run.log.count("unreadable image replaced") == 3
    assert "; 3 unreadable images, 0 skipped updates; " in run.log


def test_too_many_of_them_end_the_run(run, broken):
    error = one_line(run.start(*of(broken), "DATA.MAX_UNREADABLE", 2))
    assert "3 training images can't be read, DATA.MAX_UNREADABLE is 2; the last one is " in error
    assert f"{broken}/train/" in error
    assert error.removeprefix("error: ") in run.log


@pytest.fixture
def broken_val(images: Path, tmp_path: Path) -> Path:
    """The image folder with a test image that is cut off."""
    root = Path(shutil.copytree(images, tmp_path / "broken_val"))
    path = root / "val/bee/2.png"
    path.write_bytes(path.read_bytes()[:100])
    return root


def test_an_evaluation_refuses_to_count_with_an_image_missing(run, broken_val):
    error = one_line(run.start(*of(broken_val)))
    assert f"1 images can't be read, so the accuracy would be wrong: {broken_val}/val/bee/2.png: " in error
    assert run.records("eval") == []


def test_a_data_loading_process_that_the_system_kills(undisturbed, run):
    process = run.start(workers=2)
    process.until("Train: ", 3)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    error = one_line(process)
    assert error.startswith(
        "error: a data loading process was killed, probably for want of memory: lower DATA.NUM_WORKERS"
    )
    assert "stopped: a data loading process was killed" in run.log
    run.finish(workers=2)
    assert soak.differences(undisturbed.folder, run.folder) == []


def test_data_loading_processes_end_with_their_run(run):
    process = run.start(workers=2)
    process.until("Train: ", 1)
    workers = children(process.pid)
    assert len(workers) == min(2, len(os.sched_getaffinity(0)))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
