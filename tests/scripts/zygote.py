"""Runs the scripts in processes of their own, each forked from one that has imported torch and timm already.

A request is a line of JSON on stdin: the script, its arguments, the folder to run in, variables of the environment, and
two files for what it prints. The forked child runs the script as `__main__`; its exit status is the answer, a line on
stdout. Importing takes seconds, and so does tearing down what was imported: forked children do neither.
"""

import atexit
import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parents[2]


def serve() -> dict | None:
    """Answers requests until stdin ends (then None), except in the forked children, to which it returns theirs."""
    print("ready", flush=True)
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            return json.loads(line)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(request: dict) -> None:
    """Turns this process into the one that was asked for."""
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.argv = [request["script"], *request["arguments"]]


def execute(script: Path) -> NoReturn:
    """Runs a script as `__main__` and ends this process with its status, at once."""
    try:
        runpy.run_path(str(script), run_name="__main__")
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
    import torch.utils.tensorboard  # noqa: F401

    import convert  # noqa: F401
    import main_repmlp  # noqa: F401

    gc.freeze()  # so that collecting garbage in a child copies no page of what it shares
    order = serve()
    if order is None:
        os._exit(0)
    become(order)
    execute(ROOT / order["script"])
