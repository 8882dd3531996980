"""Ctrl-C while a script is still importing. This module itself imports quickly."""

import os
import signal
from types import FrameType


def end_on_interrupt() -> None:
    """Makes Ctrl-C end the process immediately, without a traceback: there is nothing to save or clean up yet."""
    # An ignored SIGINT, as in a background job of a shell, stays ignored.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, which is the default of Python."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)
