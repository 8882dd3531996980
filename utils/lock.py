"""The output folder of a run: one run at a time in it, and no trace of a start that failed."""

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import clear_about_space

LOCK = ".lock"


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process; the system drops the lock with the process, so that none goes stale.

    Raises:
        ValueError: another process holds it.
        OSError: the folder can't be written, or its file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        with clear_about_space(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Without a buffer, which a full disk would keep from being written once more when the file is closed.
            file = stack.enter_context((folder / LOCK).open("a+b", buffering=0))
            try:
                # flock would live on in the data loading processes, which outlast a killed run by seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read(20).decode(errors="replace")
                raise ValueError(
                    f"another run (process {holder}) is writing to {folder}: wait for it, or give this one another "
                    "--tag"
                ) from None
            except OSError as error:
                raise OSError(f"{folder} can't be locked ({error.strerror}): give an --output elsewhere") from error
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


def first_missing(folder: Path) -> Path | None:
    """Returns the topmost of a folder and those that it lies in that is not there yet; None where all are."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


@contextmanager
def without_trace(folder: Path, made: Path | None, locked: bool) -> Iterator[None]:
    """Removes the folder again where what is done within fails before more than a log lies in it.

    Args:
        folder: the output folder.
        made: the topmost folder that this start makes, as `first_missing` told before; None removes nothing.
        locked: whether this process, or rank 0 for it, holds the lock; it goes with the log.
    """
    try:
        yield
    except BaseException:
        if made is not None:
            _remove(folder, made, rf"log_rank\d+\.txt|{re.escape(LOCK) if locked else ''}")
        raise


def _remove(folder: Path, top: Path, removable: str) -> None:
    with contextlib.suppress(OSError):  # other processes may do the same, or have put something there
        names = os.listdir(folder)
        if all(re.fullmatch(removable, name) for name in names):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            for path in [folder, *folder.parents][: len(folder.parts) - len(top.parts) + 1]:
                path.rmdir()
