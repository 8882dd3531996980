"""The command line: a parser that suggests the closest known word, and errors printed on one line."""

import argparse
import difflib
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import NoReturn, cast

from termcolor import colored

from . import console
from .interrupt import raise_on_interrupt
from .memory import clear_about_memory
from .signals import Stopped
from .text import printable

MAX_SIDE = 16384  # pixels of an image
USER_ERROR = 2  # the exit status of a user error, as in argparse
# Where no setting decides how much is needed.
MORE_MEMORY = "end other programs that use it, or take a machine with more"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `"; did you mean X?"` for the closest known word, or an empty string if none is close."""
    lookup = {candidate.lower(): candidate for candidate in known}
    lower = word.lower()
    longer = [candidate for candidate in lookup if candidate.startswith(lower)]
    shorter = [candidate for candidate in lookup if len(candidate) > 4 and lower.startswith(candidate)]
    close = longer or difflib.get_close_matches(lower, lookup, n=1, cutoff=0.75) or shorter
    return f"; did you mean {lookup[close[0]]}?" if close else ""


def listing(title: str, words: Iterable[str]) -> str:
    """Returns `title: word, word, ...`, wrapped, for the end of a `--help`."""
    return textwrap.fill(f"{title}: {', '.join(words)}", 100, subsequent_indent="  ", break_on_hyphens=False)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of an option only if it has one, and keeps the line breaks of description and epilog."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, whose error for an unknown flag names the closest known one.

    Args:
        hint: called with an unknown argument and all known ones; returns a hint such as "; did you ...".
        kwargs: of `ArgumentParser`.
    """

    def __init__(self, *, hint: Callable[[str, Iterable[str]], str] = did_you_mean, **kwargs: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)  # type: ignore[arg-type]
        self._hint = hint

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with status 2."""
        if message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            message = f"unknown argument {word}{self._hint(word, self._option_string_actions)} (--help lists all)"
        print_error(message)
        raise SystemExit(USER_ERROR)


def side(text: str) -> int:
    """Reads the side of an image in pixels, as the type of an option; the bounds are those of DATA.IMG_SIZE."""
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MAX_SIDE:
        raise argparse.ArgumentTypeError(f"{text!r} is no side of an image: give 1 to {MAX_SIDE} pixels")
    return int(text)


def print_error(message: str) -> None:
    """Prints `error: message` to stderr on one line, red on a terminal."""
    _print_last(f"{colored('error:', 'red', force_color=sys.stderr.isatty() or None)} {printable(message)}")


def _print_last(line: str) -> None:
    """Prints to stderr; if stderr is gone, only the exit status remains."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        console.give_up(sys.stderr)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and exits with its status; a user error (ValueError, OSError) is printed on one line.

    A run that was stopped by a signal exits with 128 + its number, and so does Ctrl-C, whose KeyboardInterrupt may say
    how far it was. Results that could not be printed are an error. `REPMLP_TRACEBACK=1` adds the traceback to a user
    error. Any other exception is a defect and keeps its traceback.
    """
    console.prepare()
    raise_on_interrupt()
    status = status_of(main)
    problem = console.flush_stdout()
    if problem and not status:
        print_error(f"the output could not be printed to stdout: {problem}")
        status = USER_ERROR
    raise SystemExit(status)


def status_of(main: Callable[[], int | None]) -> int:
    """Runs a script's `main` and returns its exit status; prints a user error as `run` does."""
    try:
        with clear_about_memory(MORE_MEMORY):
            return main() or 0
    except SystemExit as stop:  # of the parser
        return cast(int, stop.code or 0)
    except Stopped as stop:
        _print_last(str(stop))
        return stop.status
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one does not wait for the cleanup
        _print_last(printable(stop) or "interrupted")
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        if os.environ.get("REPMLP_TRACEBACK"):
            raise
        print_error(" ".join(str(error).split()))
        return USER_ERROR
