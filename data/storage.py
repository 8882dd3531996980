"""Storage that hangs or has gone: named, instead of a silent wait or a list of unreadable images."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple

from torch.utils.data import get_worker_info

from utils.log import NAME
from utils.text import printable

PATIENCE_S = 60.0  # after which a read that has not ended is named
LOOKS = 6  # at the reads, within that time
FIELDS = 3  # of a slot: 1 + index of the image (0: none), its process, when it was begun in ns


class Read(NamedTuple):
    """A read that has not ended."""

    image: int
    pid: int  # of the process that reads it
    seconds: float  # so far


class PendingReads:
    """What each process that loads images is reading, and since when, in memory that they share with the run.

    To note a read costs two microseconds; the run looks only while it iterates, from a thread.

    Args:
        locate: returns where an image comes from.
        slots: processes that may load images, numbered as torch numbers them.
    """

    def __init__(self, locate: Callable[[int], str], slots: int) -> None:
        self._locate = locate
        self._slots = RawArray("q", FIELDS * slots)

    @contextmanager
    def of(self, index: int) -> Iterator[None]:
        """Notes that this process reads an image, within the `with`."""
        worker = get_worker_info()
        first = FIELDS * worker.id if worker else 0
        # The index comes last and goes first: a slot that has one is complete.
        self._slots[first + 2] = time.monotonic_ns()
        self._slots[first + 1] = os.getpid()
        self._slots[first] = 1 + index
        try:
            yield
        finally:
            self._slots[first] = 0

    @contextmanager
    def named(self, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Within the `with`, logs which read hangs: after `patience_s`, and after each doubling."""
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(patience_s, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            if thread is not threading.current_thread():  # which may be the one that collects an abandoned iterator
                thread.join()  # at once, so that no process is forked beside it

    def _watch(self, patience_s: float, done: threading.Event) -> None:
        due = patience_s
        while not done.wait(patience_s / LOOKS):
            hanging = sorted((read for read in self._reads() if read.seconds >= patience_s), key=lambda r: -r.seconds)
            if not hanging:
                due = patience_s
            elif hanging[0].seconds >= due:
                logging.getLogger(NAME).warning(self._describe(hanging[0], len(hanging) - 1))
                due = 2 * hanging[0].seconds

    def _reads(self) -> Iterator[Read]:
        now = time.monotonic_ns()
        for first in range(0, len(self._slots), FIELDS):
            index, pid, since = self._slots[first : first + FIELDS]
            if index:
                yield Read(index - 1, pid, (now - since) / 1e9)

    def _describe(self, read: Read, others: int) -> str:
        also = f", and for {others} more" if others else ""
        return f"waiting for {self._locate(read.image)} for {read.seconds:.0f} s (process {read.pid}){also}"


def check_folder(error: OSError) -> None:
    """Raises OSError if the folder of the file that an error names can't be read either: no fault of one image."""
    if not isinstance(error.filename, str):
        return
    folder = os.path.dirname(error.filename) or os.curdir
    try:
        os.stat(os.path.join(folder, os.curdir))
    except OSError as reason:
        text = f"the folder {printable(folder)} can't be read: {reason.strerror}; start again once it can"
        raise OSError(text) from error
