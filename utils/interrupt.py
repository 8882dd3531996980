"""Ctrl-C while a script still imports. This module itself imports nothing that takes time."""

import os
import signal
from types import FrameType


def end_on_interrupt() -> None:
    """Lets Ctrl-C end the process at once, without a traceback: there is nothing to save or to clear yet."""
    # Where SIGINT is ignored, as in a shell's background job, it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again, as Python does by itself."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
