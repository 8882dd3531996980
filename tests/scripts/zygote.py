"""Runs the scripts in processes of their own, each forked from one that has imported torch and timm already.

A request is a line of JSON on stdin: the script, its arguments, the folder to run in, variables of the environment, and
two files for what it prints. The forked child runs the script as `__main__` and ends as any Python process does; its
exit status is the answer, a line on stdout. Importing takes seconds, forking takes none.
"""

import json
import os
import runpy
import sys
from pathlib import Path

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


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import tensorboard.summary
    import torch.utils.tensorboard  # noqa: F401

    import convert  # noqa: F401
    import main_repmlp  # noqa: F401

    order = serve()
    if order is not None:
        become(order)
        runpy.run_path(str(ROOT / order["script"]), run_name="__main__")
