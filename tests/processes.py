"""Scripts in separate processes, without the environment of a launcher unless a test sets it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tools import soak

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SWITCHES = ("REPMLP_TRACEBACK", "PYTHONWARNINGS")


def in_launcher(name: str) -> bool:
    """Returns whether a launcher sets this environment variable."""
    return name in LAUNCHER or name.startswith("SLURM_")


def clean_environment() -> dict[str, str]:
    """The environment without a launcher and switches of the scripts; with one thread, so that runs are comparable."""
    kept = {k: v for k, v in os.environ.items() if not in_launcher(k) and k not in SWITCHES}
    return kept | soak.ENVIRONMENT


class Process:
    """A script in a separate process, which leads a process group of its own."""

    def __init__(self, ask: Callable[[dict], object], order: dict) -> None:
        self._ask, self._out, self._err = ask, Path(order["out"]), Path(order["err"])
        self.pid = int(str(ask(order)))
        self.status: int | None = None  # as `Popen.returncode`: -9 for SIGKILL

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def alive(self) -> bool:
        if self.status is None:
            self.status = self._ask({"poll": self.pid})  # type: ignore[assignment]
        return self.status is None

    def wait(self, timeout: float = 240) -> int:
        until = time.monotonic() + timeout
        while self.alive():
            assert time.monotonic() < until, f"still running after {timeout} s\n{self.out}\n{self.err}"
            time.sleep(0.01)
        assert self.status is not None
        return self.status

    def until(self, text: str, count: int = 1, timeout: float = 120) -> None:
        """Waits until the console shows a text `count` times."""
        until = time.monotonic() + timeout
        while self.out.count(text) < count:
            assert self.alive(), f"ended with {self.status} before {text!r}\n{self.out}\n{self.err}"
            assert time.monotonic() < until, f"no {text!r} after {timeout} s\n{self.out}\n{self.err}"
            time.sleep(0.005)


class Zygote:
    """The process that all others are forked from, with torch and timm imported.

    Not a forkserver of multiprocessing: there is one in a process, which `mutations.py` uses, Python 3.11 preloads no
    module of this project in it, and what it forks is no main process.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[Process] = []
        self._zygote = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._zygote.stdout is not None
        assert self._zygote.stdout.readline() == "ready\n"

    def _ask(self, order: dict) -> object:
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._zygote.stdout.readline())

    def start(
        self,
        script: str,
        *words: object,
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
        largest_file: int = 0,
    ) -> Process:
        """Starts a script in a new process, whose files may not exceed `largest_file` bytes (0: no limit)."""
        console = self._folder / f"console{len(self._started)}"
        order = {
            "script": str(soak.ROOT / script),
            "arguments": list(map(str, words)),
            "folder": str(folder or self._folder),
            "environment": environment or {},
            "largest_file": largest_file,
            "out": f"{console}.out",
            "err": f"{console}.err",
        }
        for name in ("out", "err"):
            Path(order[name]).touch()
        self._started.append(Process(self._ask, order))
        return self._started[-1]

    def close(self) -> None:
        """Kills the processes that still run and ends the zygote."""
        for process in self._started:
            if process.alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.wait()
        self._zygote.stdout.close()
