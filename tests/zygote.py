"""Runs the scripts in processes of their own, each forked from this one, which has imported torch and timm already.

An order is a line of JSON on stdin, and has a line for its answer. One that names a script (with its arguments, the
folder to run in, variables of the environment, the size of the largest file it may write, two files for what it prints)
is answered by the number of the new process; `{"poll": number}` by the status that it has ended with, or null.
Importing takes seconds, and so does tearing down what was imported: forked processes do neither.
"""

import atexit
import gc
import json
import os
import resource
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[1]


def serve() -> dict | None:
    """Answers orders until stdin ends (then None), except in the forked processes, to which it returns theirs."""
    print("ready", flush=True)
    while line := sys.stdin.readline():
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return order
        print(json.dumps(answer), flush=True)
    return None


def become(order: dict) -> None:
    """Makes this process look like one that was started from a shell, in a session of its own."""
    os.setsid()
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    if order["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest_file"],) * 2)
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(order[name], os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv = [order["script"], *order["arguments"]]


def execute(script: str) -> NoReturn:
    """Runs a script as `__main__` and ends this process with its status, at once."""
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import pytorch_metric_learning.losses  # noqa: F401
    import segmentation_models_pytorch  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    import convert  # noqa: F401
    import main_repmlp  # noqa: F401

    gc.freeze()  # so that collecting garbage in a forked process copies no page of what it shares
    order = serve()
    if order is not None:
        become(order)
        execute(order["script"])
