"""One run at a time in an output folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process; the system drops the lock with the process, so that none goes stale.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            # flock would live on in the data loading processes, which outlast a killed run by seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"another run (process {file.read().strip()}) is writing to {folder}: wait for it, or give this one "
                "another --tag"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
