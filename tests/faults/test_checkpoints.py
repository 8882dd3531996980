"""Damaged checkpoints, full disks, locked folders: the older state is kept, and a run resumes from it exactly."""

import contextlib
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from fault_runs import Run, one_line

from models.checkpoints import read_checkpoint
from tools import soak


def replace(path: Path, content: bytes) -> None:
    """Puts a file in the place of another one, which may have other names too: those keep what they had."""
    path.unlink()
    path.write_bytes(content)


def truncate(path: Path) -> None:
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """Turns over one bit in the middle, where the tensors are."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    replace(path, bytes(content))


def empty(path: Path) -> None:
    replace(path, b"")


def overwrite(path: Path) -> None:
    replace(path, random.Random(0).randbytes(1000))


DAMAGES = (truncate, flip, empty, overwrite)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_replaced_by_the_previous_one(undisturbed, interrupted, damage):
    damage(interrupted.folder / "latest.pth")
    process = interrupted.finish()
    passed_over = [line for line in process.out.splitlines() if "passing over a checkpoint" in line]
    assert len(passed_over) == 1
    assert f"warning: passing over a checkpoint: {interrupted.folder}/latest.pth is damaged" in passed_over[0]
    assert re.search(r"resuming from \S+/(best_ckpt|ckpt_epoch_0)\.pth, update 44\n", interrupted.log)
    assert soak.differences(undisturbed.folder, interrupted.folder) == []


def test_several_damaged_checkpoints(undisturbed, interrupted):
    for name in ("latest.pth", "ckpt_epoch_0.pth", "best_ema.pth"):
        truncate(interrupted.folder / name)
    process = interrupted.finish()
    assert process.out.count("passing over a checkpoint") >= 2
    assert "best_ckpt.pth, update 44\n" in interrupted.log
    assert soak.differences(undisturbed.folder, interrupted.folder) == []


def test_only_damaged_checkpoints_are_left_untouched(interrupted):
    found = sorted(interrupted.folder.glob("*.pth"))
    for path, damage in zip(found, DAMAGES, strict=False):
        damage(path)
    before = interrupted.contents()
    error = one_line(interrupted.start())
    folder = re.escape(str(interrupted.folder))
    assert re.fullmatch(rf"error: none of the {len(found)} checkpoints in {folder} can be read: .* another TAG", error)
    assert interrupted.contents() | {".lock": b""} == before | {".lock": b""}
    assert error.removeprefix("error: ") in interrupted.log


def test_the_newest_is_judged_by_its_content_and_not_by_its_date(undisturbed, interrupted):
    for age, name in enumerate(("best_ckpt.pth", "ckpt_epoch_0.pth", "latest.pth")):
        os.utime(interrupted.folder / name, (2e9 - 1e6 * age,) * 2)
    interrupted.finish()
    assert "latest.pth, update 60\n" in interrupted.log
    assert soak.differences(undisturbed.folder, interrupted.folder) == []


def test_a_run_resumes_equally_from_each_file_of_a_state(undisturbed, interrupted):
    (interrupted.folder / "latest.pth").rename(interrupted.folder / "best_ema.pth")
    interrupted.finish()
    assert "best_ema.pth, update 60\n" in interrupted.log
    # The best averaged weights come with the end of the second epoch, so that this one was overwritten.
    assert soak.differences(undisturbed.folder, interrupted.folder) == []


def test_no_flipped_bit_goes_unnoticed(interrupted, tmp_path):
    path, rng = tmp_path / "flipped.pth", random.Random(0)
    sound = (interrupted.folder / "latest.pth").read_bytes()
    expected = interrupted.state()["model"]
    noticed = 0
    # A third of them in the directory at the end and in the pickle at the beginning, which are short.
    places = [rng.randrange(len(sound)) for _ in range(40)]
    places += [rng.randrange(4000) for _ in range(20)] + [len(sound) - 1 - rng.randrange(4000) for _ in range(20)]
    for place in places:
        content = bytearray(sound)
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            found = read_checkpoint(path).state_dict
        except ValueError:
            noticed += 1
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), place
    assert noticed > 40


def test_a_file_size_limit_leaves_the_older_checkpoint_intact(undisturbed, interrupted):
    before = interrupted.contents()
    error = one_line(interrupted.start(largest_file=1_000_000))
    assert f"{interrupted.folder}/latest.pth could not be written, is the disk full?" in error
    assert "stopped: " in interrupted.log
    after = interrupted.contents()
    assert {k: v for k, v in after.items() if k.endswith(".pth")} == {
        k: v for k, v in before.items() if k.endswith(".pth")
    }
    assert interrupted.leftovers() == []
    interrupted.finish()
    assert soak.differences(undisturbed.folder, interrupted.folder) == []


@pytest.fixture
def small_disk(disk_of) -> Path:
    """A file system with room for one checkpoint and a half."""
    return disk_of("4m")


def test_a_full_disk_leaves_the_older_checkpoint_intact(undisturbed, start, small_disk, tmp_path):
    run = Run(start, small_disk)
    process = run.start()
    error = one_line(process)
    assert f"{run.folder}/latest.pth could not be written, is the disk full?" in error
    assert run.state()["progress"]["update"] == 5
    assert run.leftovers() == []
    elsewhere = Run(start, tmp_path / "output")
    shutil.copytree(run.folder, elsewhere.folder)
    elsewhere.finish()
    assert "latest.pth, update 5\n" in elsewhere.log
    assert soak.differences(undisturbed.folder, elsewhere.folder) == []


def test_a_completely_full_disk(start, small_disk):
    run = Run(start, small_disk)
    process = run.start("SAVE_STEPS", 0, "PRINT_FREQ", 1)
    process.until("Train: ", 3)
    with (small_disk / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"x" * 4096):
            pass
    assert process.wait() == 2
    (error,) = process.err.splitlines()
    assert re.fullmatch(
        rf"error: {re.escape(str(run.folder))} can't be written to: No space left .*; make room .*", error
    )


def test_two_runs_on_one_folder(undisturbed, run):
    first = run.start()
    first.until("Train: ", 2)
    log = run.log
    error = one_line(run.start())
    assert re.fullmatch(
        rf"error: another run \(process {first.pid}\) is writing to {re.escape(str(run.folder))}: wait for it, or give "
        "this one another TAG",
        error,
    )
    assert first.alive()
    assert first.wait() == 0
    assert run.log.startswith(log)
    assert run.log.count("process(es) on cpu") == 1, "the second one wrote to the log of the first"
    assert soak.differences(undisturbed.folder, run.folder) == []
