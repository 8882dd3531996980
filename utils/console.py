"""The console of a process: it may have no character for what is printed, and it may vanish before the process does."""

import io
import os
import sys
from typing import TextIO


def prepare() -> None:
    """Lets stdout and stderr escape what their encoding has no character for, instead of raising.

    Where the process was started without a stderr, it gets one that leads nowhere.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  it stays open as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_up(stream: TextIO) -> None:
    """Sends what a stream still holds, and all that follows, nowhere, so that nothing fails on it once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def stdout_or_nowhere() -> TextIO:
    """Returns stdout; where the process was started without one, it gets one that leads nowhere."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    return sys.stdout


def flush_stdout() -> str:
    """Prints what stdout still holds; returns why that fails, or nothing where it does not."""
    if sys.stdout is None:
        return "it is closed"
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout)
        return error.strerror or str(error)
    return ""
