"""Writes to a file which lines of the project every test executes, in its own process and in those that it starts.

For `tests.mutations`, which puts this module into a folder of `PYTHONPATH` as `sitecustomize`, so that every
interpreter imports it at its start, and names it to pytest as a plugin. `LINE_TRACE` is the file, `LINE_TRACE_ROOT` the
project. In the file `path:number` is a line that was executed; `> seconds id` and `< seconds id` are a test's start and
end.
"""

import os
import sys
import threading
import time
from contextlib import suppress

ROOT = os.environ["LINE_TRACE_ROOT"] + os.sep
_FILE = os.open(os.environ["LINE_TRACE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
_seen = set()


def _write(line):
    with suppress(OSError):  # of a process that may write no large files
        os.write(_FILE, f"{line}\n".encode())


def _trace_line(frame, event, argument):
    where = frame.f_code.co_filename, frame.f_lineno
    if event == "line" and where not in _seen:
        _seen.add(where)
        _write(f"{where[0].removeprefix(ROOT)}:{where[1]}")
    return _trace_line


def _trace_call(frame, event, argument):
    return _trace_line if frame.f_code.co_filename.startswith(ROOT) else None


def pytest_runtest_logstart(nodeid):
    sys.settrace(_trace_call)  # anew, since a test that exhausts the stack ends it
    _seen.clear()
    _write(f"> {time.monotonic()} {nodeid}")


def pytest_runtest_logfinish(nodeid):
    _write(f"< {time.monotonic()} {nodeid}")


threading.settrace(_trace_call)
sys.settrace(_trace_call)
