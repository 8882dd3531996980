"""How a batch travels from a data loading process to the run, or the reason why there is none.

torch would put a batch into shared memory in a thread of its own, where an error is printed and the batch is lost,
for which the run then waits for ever. Here the process that has loaded a batch also packs it, so that it fails where a
failure can travel. What a user can mend travels as text, and everything else as torch sends it, with its traceback.
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

FEWER = "lower DATA.NUM_WORKERS (test.py: -j)"
SHARED_MEMORY = (
    "the shared memory /dev/shm is full: start the container with --shm-size=8g (docker) or --ipc=host, "
    f"or {FEWER} or DATA.BATCH_SIZE (-b)"
)
# What the system may refuse while images are loaded, whichever they are.
REFUSALS = {
    errno.ENOSPC: SHARED_MEMORY,
    errno.EMFILE: f"too many open files: raise the limit, `ulimit -n 65536`, or {FEWER}",
    errno.ENFILE: f"too many open files on this machine: close others, or {FEWER}",
    errno.ENOMEM: f"the memory is full: {FEWER} or DATA.BATCH_SIZE (-b)",
}
# Files that the run opens for each of its data loading processes and the batches from it, and that others have open.
FILES_OF_A_WORKER, SPARE_FILES = 10, 16
SEMAPHORES_OF_A_WORKER = 8  # each takes a page of shared memory


@contextmanager
def with_remedy() -> Iterator[None]:
    """Turns a refusal of memory or files into an OSError of one line with the remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        refused = _refused(error)
        if refused is None:
            raise
        raise OSError(REFUSALS[refused]) from error


def _refused(error: Exception) -> int | None:
    """Returns the entry of `REFUSALS` that an error is, if any."""
    if isinstance(error, OSError):
        return error.errno if error.errno in REFUSALS else None
    if "ancdata" in str(error):  # a file that was sent could not be opened here
        return errno.EMFILE
    return next((number for number in REFUSALS if f"{os.strerror(number)} ({number})" in str(error)), None)


class Failure(NamedTuple):
    """An error that ended the loading of a batch: its type and its line."""

    kind: type[OSError] | type[ValueError]
    text: str

    @classmethod
    def of(cls, error: OSError | ValueError) -> "Failure":
        """Keeps the type and the text of an error."""
        return cls(OSError if isinstance(error, OSError) else ValueError, str(error))


class Parcel:
    """A packed batch: tensors in shared memory, passed as open files, and everything else as bytes."""

    def __init__(self, batch: object) -> None:
        """Packs a batch; raises OSError with the remedy if the system refuses shared memory or files."""
        with with_remedy():
            _check_files(SPARE_FILES)
            self._content = bytes(ForkingPickler.dumps(batch))

    def open(self) -> Any:
        """Returns the batch, once; raises as `__init__`, and other errors if the sender has died."""
        with with_remedy():
            return ForkingPickler.loads(self._content)

    def pin_memory(self) -> Any:
        """Returns the batch in page-locked memory, or why not; a thread of torch calls this for each batch."""
        try:
            return self.open().pin_memory()
        except ConnectionError:  # the run notices that the sender has died
            raise
        except OSError as error:
            return Failure.of(error)


def check_room(num_workers: int) -> None:
    """Raises OSError with the remedy if this number of data loading processes can't be started."""
    with with_remedy():
        _check_files(SPARE_FILES + FILES_OF_A_WORKER * num_workers)
        space = os.statvfs("/dev/shm")
        if space.f_bavail * space.f_frsize < SEMAPHORES_OF_A_WORKER * (num_workers + 1) * resource.getpagesize():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_files(count: int) -> None:
    """Raises OSError if this process can't open this number of files.

    Other threads need files at any time; the one that passes on those of a batch would retry forever.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < len(os.listdir("/proc/self/fd")) + count:  # below 0: none
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
