"""Runs of every task in `tasks.TASKS` by its row in `task_recipes`; no test writes to those that are shared."""

import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Process
from script_runs import Result, Run
from task_recipes import TWO_PROCESSES, keys_of, recipe_of

from tasks import TASKS

DRIVER = Path(__file__).parents[1] / "faults" / "fault_driver.py"


class TaskRuns:
    """Starts the short training of a task, and evaluations.

    Attributes:
        kind: the task.
        images: the folder of its images, which no test changes.
    """

    def __init__(self, name: str, images: Path, start: Callable[..., Process], folders: Iterator[Path]) -> None:
        self.kind, self.images, self._start, self._folders = TASKS[name], images, start, folders

    def new_folder(self) -> Path:
        return next(self._folders)

    def folder_in(self, output: Path, changes: str = "") -> Path:
        """The folder of the run in an output folder."""
        keys = keys_of(self.kind.name, changes)
        return output / keys["MODEL.ARCH"] / keys["TAG"]

    def words(self, output: Path, changes: str = "", *, flags: str = "", images: Path | None = None) -> list[str]:
        """The command line; `changes` are keys with other values."""
        place = ["--data-path", str(images or self.images), "--output", str(output)]
        pairs = [word for pair in keys_of(self.kind.name, changes).items() for word in pair]
        return [*place, *flags.split(), "--opts", *pairs]

    def start(
        self, output: Path, changes: str = "", *, plan: dict | None = None, rank: dict | None = None, **how: Any
    ) -> Process:
        """Starts a training; `plan` is for the driver that disturbs it, `rank` what a launcher says."""
        words = self.words(output, changes, **how)
        if plan is None:
            return self._start("main_repmlp.py", *words, environment=rank)
        return self._start(str(DRIVER), json.dumps(plan), *words, environment=rank)

    def start_ranks(self, count: int, output: Path, changes: str = "", **how: Any) -> list[Process]:
        """Starts it in several processes, told who they are by the environment alone."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [self.start(output, changes, rank=rank, **how) for rank in ranks]

    def train(self, changes: str = "", *, output: Path | None = None, processes: int = 1, **how: Any) -> Run:
        """Trains to the end, in a new folder unless one is given."""
        output = output or self.new_folder()
        if processes == 1:
            started = [self.start(output, changes, **how)]
        else:
            started = self.start_ranks(processes, output, f"{TWO_PROCESSES} {changes}", **how)
        statuses = [process.wait() for process in started]
        assert set(statuses) == {0}, [process.out + process.err for process in started]
        return Run(output, self.folder_in(output, changes), Result(0, started[0].out, started[0].err))

    def interrupt(
        self, output: Path, update: int, changes: str = "", *, processes: int = 1, kill: bool, **how: Any
    ) -> None:
        """Ends a training before an update by SIGKILL, or at the end of it by SIGUSR1, which saves its state."""
        plan = {"kill_at_update": update} if kill else {"signal_at_update": [update, signal.SIGUSR1]}
        if processes == 1:
            started = [self.start(output, changes, plan=plan, **how)]
        else:
            started = self.start_ranks(processes, output, f"{TWO_PROCESSES} {changes}", plan=plan, **how)
        expected = -signal.SIGKILL if kill else 128 + signal.SIGUSR1
        assert {process.wait() for process in started} == {expected}, [p.out + p.err for p in started]


# The runs of a task are shared by the tests of one worker.
@pytest.fixture(scope="session", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in TASKS])
def task(request: pytest.FixtureRequest, start: Any, tmp_path_factory: pytest.TempPathFactory) -> TaskRuns:
    """Each task in turn."""
    name = request.param
    root = tmp_path_factory.mktemp(name)
    recipe_of(name).write(root / "images")

    def folders() -> Iterator[Path]:
        while True:
            yield tmp_path_factory.mktemp(f"{name}_output")

    return TaskRuns(name, root / "images", start, folders())


@pytest.fixture(scope="session")
def finished(task: TaskRuns) -> Run:
    """The training of the task that nothing happened to."""
    return task.train()


@pytest.fixture(scope="session")
def together(task: TaskRuns) -> Run:
    """The same in two processes."""
    return task.train(processes=2)


@pytest.fixture(scope="session")
def converted(task: TaskRuns, finished: Run, script: Callable[..., Result]) -> Path:
    """The best weights of the training, converted."""
    path = task.new_folder() / "deploy.pth"
    result = script("convert.py", finished.folder / "best_ckpt.pth", path)
    assert result.status == 0, result.err
    return path


@pytest.fixture
def refused(call: Callable[..., Result]) -> Callable[..., str]:
    """Returns a function that runs a script and returns the one line that it ends with."""

    def run(script: str, *words: object) -> str:
        result = call(script, *words)
        assert result.status == 2, result.out + result.err
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1, result.err
        return result.err

    return run
