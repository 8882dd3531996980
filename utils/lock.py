"""The output folder of a run: locked by one run at a time, and removed again if the start fails."""

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
    """Locks a folder for this process; the system releases the lock with the process, so it cannot go stale.

    Raises:
        ValueError: another process holds it.
        OSError: the folder can't be written, or its file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        with clear_about_space(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: on a full disk, closing the file would try to write the buffer again.
            file = stack.enter_context((folder / LOCK).open("a+b", buffering=0))
            try:
                # flock would be held by the data workers too, which outlive a killed run by seconds.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                file.seek(0)
                holder = file.read(20).decode(errors="replace")
                raise ValueError(
                    f"another run (process {holder}) is writing to {folder}: wait for it, or give this one another TAG"
                ) from None
            except OSError as error:
                raise OSError(
                    f"{folder} can't be locked ({error.strerror}): set OUTPUT to a folder elsewhere"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


def first_missing(folder: Path) -> Path | None:
    """Returns the topmost missing folder of a path, or None if the whole path exists."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


@contextmanager
def without_trace(folder: Path, made: Path | None, locked: bool) -> Iterator[None]:
    """Removes the folder again if the body fails while the folder holds nothing but logs.

    Args:
        folder: the output folder.
        made: the topmost folder that this start creates, from `first_missing`; None removes nothing.
        locked: whether this process, or rank 0 for it, holds the lock, whose file is then removed as well.
    """
    try:
        yield
    except BaseException:
        if made is not None:
            _remove(folder, made, rf"log_rank\d+\.txt|{re.escape(LOCK) if locked else ''}")
        raise


def _remove(folder: Path, top: Path, removable: str) -> None:
    with contextlib.suppress(OSError):  # other processes may remove it too, or have written files
        names = os.listdir(folder)
        if all(re.fullmatch(removable, name) for name in names):
            for name in names:
                (folder / name).unlink(missing_ok=True)
            for path in [folder, *folder.parents][: len(folder.parts) - len(top.parts) + 1]:
                path.rmdir()
