"""However two processes are started, it is the same training, bit for bit."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_ranks import free_port
from processes import clean_environment

from tools import soak

# One epoch of 11 updates with two processes; numbered checkpoints, so that the end of the epoch is kept.
OPTIONS = (
    f"--cfg {soak.ROOT}/configs/quickstart.yaml --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 EVAL_FREQ 2 SAVE_FREQ 1"
)
SCRIPT = f"{soak.ROOT}/main_repmlp.py"


class Launch:
    """Commands that run side by side, and the output folder that they share."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, output / soak.RUN
        self.processes: list[subprocess.Popen[bytes]] = []
        output.mkdir(parents=True, exist_ok=True)

    def start(self, command: str, *, options: str = OPTIONS, **variables: object) -> subprocess.Popen[bytes]:
        """Starts `python <command>` in an environment without any launcher but `variables`."""
        words = [sys.executable, *shlex.split(command), "--output", str(self.output), *shlex.split(options)]
        with (self.output / f"console{len(self.processes)}.txt").open("w") as console:
            process = subprocess.Popen(
                words,
                env=clean_environment() | {k: str(v) for k, v in variables.items()},
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def said(self, number: int = 0) -> str:
        return (self.output / f"console{number}.txt").read_text()

    def finish(self) -> "Launch":
        for number, process in enumerate(self.processes):
            assert process.wait(240) == 0, self.said(number)
        return self

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def launch(tmp_path: Path):
    launch = Launch(tmp_path / "output")
    yield launch
    launch.stop()


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Two processes with torchrun's variables set by hand."""
    launch, port = Launch(tmp_path_factory.mktemp("by_hand")), free_port()
    for rank in (0, 1):
        launch.start(SCRIPT, RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return launch.finish()


def test_two_processes(by_hand):
    assert "2 process(es) on cpu" in by_hand.said()
    assert by_hand.said(1) == "", "only the first process speaks"
    assert re.search(r"Best Acc@1 [\d.]+; 0 unreadable images", by_hand.said())
    assert (by_hand.folder / "log_rank1.txt").exists()
    assert "on 359 images" in by_hand.said()


def test_running_statistics_are_equal_on_all_processes_after_each_epoch(by_hand):
    """Also after the first one, which was not evaluated."""
    for name in ("ckpt_epoch_0.pth", "ckpt_epoch_1.pth"):
        state = torch.load(by_hand.folder / name, weights_only=True)
        first, second = state["rank_statistics"]
        assert torch.equal(first, second)
        own = [tensor.reshape(-1) for key, tensor in state["model"].items() if key.endswith(("_mean", "_var"))]
        assert torch.equal(torch.cat(own), first)


def test_plain_python(launch, by_hand):
    launch.start(SCRIPT)
    launch.finish()
    assert "1 process(es) on cpu" in launch.said()
    assert soak.differences(by_hand.folder, launch.folder), "one process is another training than two"


def test_torchrun(launch, by_hand):
    launch.start(f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()} {SCRIPT}")
    launch.finish()
    assert soak.differences(by_hand.folder, launch.folder) == []


def test_the_old_launcher(launch, by_hand):
    """It hands the local rank over as an argument, `--local-rank=1`."""
    launch.start(f"-m torch.distributed.launch --nproc_per_node 2 --master_port {free_port()} {SCRIPT}")
    launch.finish()
    assert soak.differences(by_hand.folder, launch.folder) == []


@pytest.mark.slow
def test_the_local_rank_in_both_spellings(launch, by_hand):
    """As launchers of all ages write it, without LOCAL_RANK in the environment."""
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    launch.start(f"{SCRIPT} --local-rank=0", RANK=0, **place)
    launch.start(f"{SCRIPT} --local_rank 1", RANK=1, **place)
    launch.finish()
    assert soak.differences(by_hand.folder, launch.folder) == []


def test_tasks_of_slurm(launch, by_hand):
    job = free_port() % 15000  # as good as any number of a job, and the port of another run hardly follows from it
    for task in (0, 1):
        launch.start(
            SCRIPT,
            SLURM_JOB_ID=job,
            SLURM_STEP_NUM_TASKS=2,
            SLURM_PROCID=task,
            SLURM_LOCALID=task,
            SLURM_STEP_NODELIST="localhost",
        )
    launch.finish()
    assert soak.differences(by_hand.folder, launch.folder) == []


def two_nodes(launch: Launch, options: str, flags: str = "") -> None:
    meeting = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id test --local-addr 127.0.0.1"
    for _ in range(2):
        launch.start(
            f"-m torch.distributed.run --nnodes 2 --nproc_per_node 1 {meeting} {flags} {SCRIPT}", options=options
        )


@pytest.mark.slow
def test_two_nodes_that_meet_by_c10d(launch, by_hand):
    two_nodes(launch, OPTIONS)
    launch.finish()
    assert soak.differences(by_hand.folder, launch.folder) == []


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_two_nodes_restart_when_a_process_is_killed(launch, by_hand, victim):
    """The launchers count restarts differently then: one of them had a process that failed, the other had not."""
    two_nodes(launch, f"{OPTIONS} SAVE_STEPS 3", "--max-restarts 2")
    until = time.monotonic() + 120
    while soak.lines(launch.folder) < 1:
        assert time.monotonic() < until, launch.said() + launch.said(1)
        time.sleep(0.01)
    os.kill(process_of(launch, victim), signal.SIGKILL)
    launch.finish()
    assert "resuming from" in (launch.folder / "log_rank0.txt").read_text()
    assert soak.differences(by_hand.folder, launch.folder) == []


def process_of(launch: Launch, rank: int) -> int:
    """The process id of a rank among those that the launchers have started."""
    for agent in launch.processes:
        for task in Path(f"/proc/{agent.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                    return int(child)
    raise AssertionError(f"no process of rank {rank}")
