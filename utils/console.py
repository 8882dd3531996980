"""The console of a process, whose encoding may lack characters and which may close before the process ends."""

import io
import os
import sys
from typing import TextIO


def prepare() -> None:
    """Lets stdout and stderr escape characters that their encoding lacks, instead of raising.

    A process that was started without stderr gets the null device.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  stays open until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_up(stream: TextIO) -> None:
    """Redirects a stream to the null device, so that its buffer and later output cannot fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def stdout_or_nowhere() -> TextIO:
    """Returns stdout, or the null device in a process that was started without stdout."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    return sys.stdout


def flush_stdout() -> str:
    """Flushes stdout; returns the reason if that fails, or an empty string."""
    if sys.stdout is None:
        return "it is closed"
    try:
        sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout)
        return error.strerror or str(error)
    return ""
