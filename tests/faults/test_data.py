"""Images that can't be read, data loading processes that the system kills, and those for which it has no room."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_runs import Run, children, one_line
from processes import Process

from tools import soak

FULL = (
    "error: the shared memory /dev/shm is full: start the container with --shm-size=8g (docker) or --ipc=host, "
    "or lower DATA.NUM_WORKERS (test.py: -j) or DATA.BATCH_SIZE (-b)"
)


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


def test_unreadable_images_are_counted_over_a_restart(run, broken):
    assert run.start(*of(broken), plan={"kill_at_update": 5}).wait() == -signal.SIGKILL
    assert run.log.count("unreadable image replaced") == len(run.state()["unreadable"]) == 3
    run.finish(*of(broken))
    assert run.log.count("unreadable image replaced") == 3
    assert "; 3 unreadable images, 0 skipped updates; " in run.log


def test_too_many_unreadable_images_end_the_run(run, broken):
    error = one_line(run.start(*of(broken), "DATA.MAX_UNREADABLE", 2))
    assert "3 training images can't be read, DATA.MAX_UNREADABLE is 2; the last one is " in error
    assert f"{broken}/train/" in error
    assert error.removeprefix("error: ") in run.log


@pytest.mark.parametrize("workers", [0, 2])
def test_lost_storage_is_one_line_however_the_images_are_loaded(run, images, tmp_path, workers):
    root = Path(shutil.copytree(images, tmp_path / "lost"))
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"")
    error = one_line(run.start(*of(root), workers=workers))
    line = (
        r"error: 16 images in a row cannot be read, the first being \S+/lost/train/(ant|bee)/\d+.png: not an image .*"
    )
    assert re.fullmatch(line, error)
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
    assert f"1 images can't be read, so the figures would be wrong: {broken_val}/val/bee/2.png: " in error
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


@pytest.fixture
def small(start) -> Callable[..., Callable[..., Process]]:
    """Returns a function from what a system has to a function that starts a script in it."""
    driver = Path(__file__).with_name("small_system.py")

    def of_size(**plan: object) -> Callable[..., Process]:
        def run(*words: object, **how: object) -> Process:
            return start(driver, json.dumps(plan), *words, **how)

        return run

    trial = of_size(shared_memory="1m")("nothing")
    if trial.wait():
        pytest.skip(f"no file system can be mounted here: {trial.err.splitlines()[-1]}")
    return of_size


def group_has_ended(group: int) -> bool:
    """Waits for all processes of a group to end; they must not need long."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


LARGE = ("DATA.IMG_SIZE", 64, "DATA.BATCH_SIZE", 64)


@pytest.mark.parametrize("size", ["1m", "64k"])
def test_too_little_shared_memory_for_a_batch_or_for_a_start(small, tmp_path, size):
    """A batch has 0.8 MB; a start needs a few pages. torch alone prints a traceback and waits for ever."""
    run = Run(small(shared_memory=size), tmp_path)
    process = run.start(*LARGE, workers=2)
    assert one_line(process) == FULL
    assert f"stopped: {FULL.removeprefix('error: ')}\n" in run.log
    assert "Traceback" not in run.log
    assert group_has_ended(process.pid)


def test_too_little_shared_memory_in_each_of_two_processes(small, tmp_path):
    ranks = Run(small(shared_memory="700k"), tmp_path).start_ranks(2, *LARGE, workers=2)
    assert [one_line(process) for process in ranks] == [FULL, FULL]
    assert all(group_has_ended(process.pid) for process in ranks)


def test_too_little_shared_memory_for_an_evaluation(small, undisturbed, tmp_path):
    """A batch of 359 digits has 276 KB."""
    weights, start = undisturbed.folder / "latest.pth", small(shared_memory="200k")
    run = Run(start, tmp_path)
    options = ("EVAL_MODE", True, "MODEL.RESUME", weights, "DATA.TEST_BATCH_SIZE", 359)
    assert one_line(run.start(*options, workers=2)) == FULL
    run.finish(*options, workers=0)
    process = start(soak.ROOT / "test.py", "digits", "train", weights, "-b", 359, "-j", 2)
    assert one_line(process) == FULL
    assert group_has_ended(process.pid)


def test_too_few_open_files_for_data_loading_processes(small, tmp_path):
    run = Run(small(files=25), tmp_path)
    error = one_line(run.start(workers=2))
    assert error == (
        "error: too many open files: raise the limit, `ulimit -n 65536`, or lower DATA.NUM_WORKERS (test.py: -j)"
    )
    assert error.removeprefix("error: ") in run.log


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_that_vanishes_ends_the_run_in_one_line(run, images, tmp_path, workers):
    root = Path(shutil.copytree(images, tmp_path / "mounted"))
    process = run.start(*of(root), "TRAIN.EPOCHS", 1000, "DATA.MAX_UNREADABLE", 1, workers=workers)
    process.until("Train: ", 1)
    (root / "train").rename(tmp_path / "elsewhere")
    error = one_line(process)
    assert re.fullmatch(
        rf"error: the folder {root}/train/(ant|bee) can't be read: No such file or directory; start again once it can",
        error,
    )
    assert f"stopped: {error.removeprefix('error: ')}\n" in run.log
