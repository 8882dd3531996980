"""Imports everything that a script needs once, then forks a process for each one that a test asks for on stdin."""

import json
import os
import resource
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def become(order: dict) -> None:
    """Makes this new process look like one that was started from a shell, in a session of its own."""
    os.setsid()
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv = [order["script"], *order["arguments"]]


def serve() -> dict | None:
    """Answers until stdin ends, and returns None then; in a new process, returns its order at once."""
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if not pid:
            return order
        print(pid, flush=True)
    return None


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import torch.utils.tensorboard  # noqa: F401

    import main_repmlp  # noqa: F401

    order = serve()
    if order is not None:
        become(order)
        runpy.run_path(order["script"], run_name="__main__")
