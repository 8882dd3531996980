"""The output folder of a run: one run at a time, and no trace of a start that failed."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest

from utils.lock import first_missing, folder_lock, without_trace


def start(folder: Path, *names: str, locked: bool = True) -> None:
    """What a run does that fails once it has written these files."""
    made = first_missing(folder)
    with folder_lock(folder), without_trace(folder, made, locked):
        for name in names:
            (folder / name).write_text("")
        raise ValueError("wrong")


def test_the_topmost_folder_that_is_missing(tmp_path):
    assert first_missing(tmp_path) is None
    assert first_missing(tmp_path / "a") == tmp_path / "a"
    assert first_missing(tmp_path / "a" / "b" / "c") == tmp_path / "a"
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert first_missing(tmp_path / "a" / "b" / "c") == tmp_path / "a" / "b" / "c"


def test_a_start_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "output").mkdir()
    with pytest.raises(ValueError, match="wrong"):
        start(tmp_path / "output" / "arch" / "tag", "log_rank0.txt", "log_rank11.txt")
    assert list(tmp_path.iterdir()) == [tmp_path / "output"]
    assert list((tmp_path / "output").iterdir()) == []


@pytest.mark.parametrize("name", ["config.yaml", "latest.pth", "log_rank0.txt.old", "events.out", "a.lock"])
def test_whatever_else_lies_there_stays_with_its_log(tmp_path, name):
    with pytest.raises(ValueError, match="wrong"):
        start(tmp_path / "arch" / "tag", "log_rank0.txt", name)
    assert {path.name for path in (tmp_path / "arch" / "tag").iterdir()} == {".lock", "log_rank0.txt", name}


def test_a_folder_that_was_there_stays_with_its_log(tmp_path):
    (tmp_path / "tag").mkdir()
    with pytest.raises(ValueError, match="wrong"):
        start(tmp_path / "tag", "log_rank0.txt")
    assert (tmp_path / "tag" / "log_rank0.txt").exists()


def test_the_folders_above_stay_where_somebody_has_put_something(tmp_path):
    folder = tmp_path / "output" / "arch" / "tag"
    made = first_missing(folder)
    (tmp_path / "output" / "other").mkdir(parents=True)
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match="wrong"), without_trace(folder, made, locked=False):
        raise ValueError("wrong")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["other"]


def test_without_the_lock_the_folder_of_a_run_that_has_it_stays(tmp_path):
    folder = tmp_path / "tag"
    made = first_missing(folder)
    with folder_lock(folder), pytest.raises(ValueError, match="wrong"), without_trace(folder, made, locked=False):
        raise ValueError("wrong")
    assert (folder / ".lock").exists()


def test_success_leaves_all(tmp_path):
    folder = tmp_path / "tag"
    with without_trace(folder, first_missing(folder), locked=True):
        folder.mkdir()
    assert folder.exists()


def test_a_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"Not a directory: '.*file"), folder_lock(tmp_path / "file" / "tag"):
        pass


def test_a_full_disk_is_named_with_the_remedy(disk_of):
    folder = disk_of("64k") / "tag"
    folder.mkdir()
    (folder / ".lock").touch()
    with (folder / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"x" * 4096):
            pass
    with pytest.raises(OSError, match=rf"^{folder} can't be written to: No space .*; make room"), folder_lock(folder):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match=r"can't be locked \(No locks available\): set OUTPUT"), folder_lock(tmp_path):
        pass
