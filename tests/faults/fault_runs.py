"""A training that may take several processes."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from processes import Process

from tools import soak

DRIVER = Path(__file__).with_name("fault_driver.py")


class Run:
    """A training with its folder; it may take several processes."""

    def __init__(self, start: Callable[..., Process], output: Path) -> None:
        self._start, self.output, self.folder = start, output, output / soak.RUN

    def start(self, *options: object, plan: dict | None = None, workers: int = 0, **how: object) -> Process:
        """Starts or resumes the short training; `options` replace keys of it, `plan` is for the driver."""
        changes = dict(zip(options[::2], options[1::2], strict=True))
        script, *words = soak.arguments(self.output, workers, changes)  # type: ignore[arg-type]
        if plan is not None:
            script, words = str(DRIVER), [json.dumps(plan), *words]
        return self._start(script, *words, **how)

    def start_ranks(self, count: int, *options: object, **how: object) -> list[Process]:
        """Starts the training in several processes, whose ranks are set in the environment only."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.start(*options, environment=environment, **how) for environment in ranks]

    def finish(self, *options: object, **how: object) -> Process:
        """Resumes and trains to the end."""
        process = self.start(*options, **how)
        status = process.wait()
        assert status == 0, process.out + process.err
        return process

    @property
    def log(self) -> str:
        return (self.folder / "log_rank0.txt").read_text()

    def records(self, kind: str) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def state(self, name: str = "latest.pth") -> dict:
        return torch.load(self.folder / name, weights_only=True)

    def leftovers(self) -> list[str]:
        return [path.name for path in self.folder.glob(".*") if path.name != ".lock"]

    def contents(self) -> dict[str, bytes]:
        """Every file of the run but its log."""
        return {p.name: p.read_bytes() for p in self.folder.iterdir() if not p.name.startswith("log_")}


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    return [int(child) for task in os.listdir(f"/proc/{pid}/task") for child in _children_of(pid, task)]


def _children_of(pid: int, task: str) -> list[str]:
    return Path(f"/proc/{pid}/task/{task}/children").read_text().split()


def one_line(process: Process) -> str:
    """Asserts that a process ended with status 2 and one line of error, and returns that line."""
    status = process.wait()
    text = process.err.strip()
    assert status == 2, process.out + text
    assert text.startswith("error: "), text
    assert len(text.splitlines()) == 1, text
    return text
