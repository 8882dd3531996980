"""Several processes: one killed, all stopped, and runs that resume with another number of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fault_runs import Process, Run, children, one_line

from tools import soak


def ended_well(ranks: list[Process]) -> None:
    assert [process.wait() for process in ranks] == [0] * len(ranks), [process.err for process in ranks]


@pytest.fixture(scope="module")
def two(start, tmp_path_factory) -> Run:
    """The short training in two processes, undisturbed; each has half of the batch, so that updates are as many."""
    run = Run(start, tmp_path_factory.mktemp("two"))
    ended_well(run.start_ranks(2, *HALF))
    return run


HALF = ("DATA.BATCH_SIZE", 16)


class Torchrun:
    """The short training in two processes that torchrun starts."""

    def __init__(self, run: Run, *flags: object, workers: int = 0) -> None:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *flags]
        words += soak.arguments(run.output, workers, dict([HALF]))
        self._console = run.output.with_suffix(".console")
        with self._console.open("w") as console:
            self._agent = subprocess.Popen(
                [sys.executable, *map(str, words)],
                env=os.environ | soak.ENVIRONMENT,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._agent.pid

    def until(self, text: str, count: int) -> None:
        until = time.monotonic() + 120
        while self.said.count(text) < count:
            assert self._agent.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.01)

    @property
    def said(self) -> str:
        return self._console.read_text()

    def rank(self, number: int) -> int:
        """The process id of a rank."""
        (pid,) = (p for p in children(self.pid) if f"\0RANK={number}\0" in Path(f"/proc/{p}/environ").read_text())
        return pid

    def wait(self) -> int:
        return self._agent.wait(240)


@pytest.mark.parametrize(("count", "accumulation"), [pytest.param(3, 0, marks=pytest.mark.slow), (4, 2)])
def test_more_than_two_ranks_resume_exactly(start, run, tmp_path_factory, count, accumulation):
    """Sums over three and more depend on the order of adding; killed within an epoch, and between two of them."""
    options = ("DATA.BATCH_SIZE", 24, "TRAIN.ACCUMULATION_STEPS", accumulation, "SAVE_STEPS", 3)
    whole = Run(start, tmp_path_factory.mktemp("whole"))
    ended_well(whole.start_ranks(count, *options))
    updates = whole.state()["progress"]["update"]
    for update in (updates // 2 - 1, updates // 2):
        ranks = run.start_ranks(count, *options, plan={"kill_at_update": update})
        assert [process.wait() for process in ranks] == [-signal.SIGKILL] * count, [p.err for p in ranks]
    ended_well(run.start_ranks(count, *options))
    assert run.log.count("resuming from") == 2
    assert soak.differences(whole.folder, run.folder) == []


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_rank_of_two_is_killed(two, run, victim):
    """The other one says so and ends, instead of waiting forever; both resume exactly from the last checkpoint."""
    ranks = run.start_ranks(2, *HALF)
    ranks[0].until("Train: ", 4)
    os.kill(ranks[victim].pid, signal.SIGKILL)
    assert ranks[victim].wait() == -signal.SIGKILL
    assert ranks[1 - victim].wait(60) == 2
    line = ranks[1 - victim].err.splitlines()[-1]  # torch itself warns of the store, which has ended with rank 0
    silent = "rank 0 has ended" if victim == 0 else "rank 1 does not answer, it hangs or was killed"
    assert line.startswith(f"error: rank {1 - victim} lost contact: {silent}")
    log = (run.folder / f"log_rank{1 - victim}.txt").read_text()
    assert log.splitlines()[-1].endswith(f"ERROR stopped: {line.removeprefix('error: ')}")
    assert run.leftovers() == []
    ended_well(run.start_ranks(2, *HALF))
    assert soak.differences(two.folder, run.folder) == []


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_of_three_that_hangs_is_named_by_the_others(run, victim):
    """They wait three seconds for it."""
    plan = {"sleep_at_update": [4, victim, 3600]}
    options = ("DATA.BATCH_SIZE", 8, "DIST.TIMEOUT", 0.05)
    ranks = run.start_ranks(3, *options, plan=plan)
    ranks[0].until("Train: ", 2)
    began = time.monotonic()
    for rank in {0, 1, 2} - {victim}:
        line = one_line(ranks[rank])
        assert re.fullmatch(
            rf"error: rank {rank} lost contact: rank {victim} does not answer, it hangs or was killed \(processes wait "
            r"0\.05 minutes for each other, DIST\.TIMEOUT\); docs/distributed\.md .*",
            line,
        )
        assert "Traceback" not in ranks[rank].err
    assert 3 < time.monotonic() - began < 30
    assert ranks[victim].alive()
    os.kill(ranks[victim].pid, signal.SIGKILL)


def test_a_rank_that_fails_is_named_with_its_reason(run):
    ranks = run.start_ranks(2, *HALF, plan={"fail_at_update": [4, 1]})
    assert one_line(ranks[1]) == "error: made up"
    assert one_line(ranks[0]) == "error: rank 0 lost contact: rank 1 has failed: made up"


@pytest.mark.slow
def test_torchrun_ends_when_a_rank_is_killed(two, run):
    torchrun = Torchrun(run)
    torchrun.until("Train: ", 4)
    os.kill(torchrun.rank(1), signal.SIGKILL)
    assert torchrun.wait() != 0
    ended_well(run.start_ranks(2, *HALF))
    assert soak.differences(two.folder, run.folder) == []


@pytest.mark.slow  # tests/distributed/test_launch.py has it on two nodes
def test_torchrun_restarts_a_run_automatically(two, run):
    """With data loading processes, which outlast the rank that is killed."""
    torchrun = Torchrun(run, "--max_restarts", 2, workers=1)
    torchrun.until("Train: ", 4)
    os.kill(torchrun.rank(0), signal.SIGKILL)
    assert torchrun.wait() == 0, torchrun.said
    assert run.log.count("resuming from") == 1
    assert soak.differences(two.folder, run.folder) == []


def test_torchrun_forwards_a_signal(two, run):
    """The launcher sends it to the data loading processes, too."""
    torchrun = Torchrun(run, workers=1)
    torchrun.until("Train: ", 4)
    os.kill(torchrun.pid, signal.SIGTERM)
    assert torchrun.wait() != 0
    assert "stopping on request, state saved after update" in run.log
    ended_well(run.start_ranks(2, *HALF))
    assert soak.differences(two.folder, run.folder) == []


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_update(two, run, asked):
    ranks = run.start_ranks(2, *HALF, "SAVE_STEPS", 0)
    ranks[0].until("Train: ", 4)
    os.kill(ranks[asked].pid, signal.SIGUSR1)
    assert [process.wait() for process in ranks] == [138, 138], [process.err for process in ranks]
    logs = [(run.folder / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    saved = [re.findall(r"state saved after update (\d+)", log) for log in logs]
    assert saved[0] == saved[1] == [str(run.state()["progress"]["update"])]
    ended_well(run.start_ranks(2, *HALF))
    assert soak.differences(two.folder, run.folder) == []


def test_an_error_on_rank_0_alone_ends_both_ranks_in_one_line(interrupted):
    for path in interrupted.folder.glob("*.pth"):
        path.write_bytes(b"")
    ranks = interrupted.start_ranks(2, *HALF)
    assert [process.wait(60) for process in ranks] == [2, 2]
    for process in ranks:
        assert re.fullmatch(r"error: none of the \d checkpoints in .* can be read: .*\n", process.err), process.err


def test_two_ranks_on_a_locked_folder(undisturbed, run):
    first = run.start()
    first.until("Train: ", 2)
    ranks = run.start_ranks(2, *HALF)
    assert [process.wait(60) for process in ranks] == [2, 2]
    for process in ranks:
        assert re.fullmatch(rf"error: another run \(process {first.pid}\) is writing to .*\n", process.err), process.err
    assert first.wait() == 0
    assert not (run.folder / "log_rank1.txt").exists()
    assert soak.differences(undisturbed.folder, run.folder) == []


@pytest.mark.parametrize(("before", "after"), [pytest.param(1, 2, marks=pytest.mark.slow), (2, 1), (2, 3)])
def test_another_number_of_processes_repeats_and_skips_no_image(run, tmp_path, before, after):
    """In the middle of the second epoch; batches are of 32 images a process."""
    parts = []
    for part, count in enumerate((before, after)):
        plan = {"record_images": str(tmp_path / f"images{part}_")}
        if part == 0:
            plan["signal_at_update"] = [44 // before + 6, signal.SIGUSR1]
        ranks = run.start_ranks(count, "SAVE_STEPS", 0, plan=plan)
        assert {process.wait() for process in ranks} == {138 if part == 0 else 0}, [p.err for p in ranks]
        parts.append(drawn(tmp_path, f"images{part}_*", epoch=1))
        if part == 0:
            recorded = run.records("train") + run.records("eval")
            done = run.state()["progress"]
    assert done["epoch"] == 1
    assert len(parts[0]) == done["consumed"] > 0
    images = parts[0] + parts[1]
    assert len(images) == len(set(images)), "an image was trained on twice"
    order = np.random.default_rng([0, 1]).permutation(1438)  # of seed 0 and epoch 1
    assert sorted(images) == sorted(order[: len(images)]), "an image was skipped"
    assert 1438 - len(images) < 32 * after, "more than an incomplete step was left out"
    changed = re.search(
        r"this run has changed \((.*)\); it resumes after image (\d+) of epoch 1, which is now update \d+", run.log
    )
    assert changed is not None
    assert f"world_size {before} -> {after}, global_batch {32 * before} -> {32 * after}" in changed[1]
    assert int(changed[2]) == done["consumed"]
    kept = run.records("train") + run.records("eval")
    assert all(record in kept for record in recorded), "a record of the first part was lost"
    assert [record["epoch"] for record in run.records("eval")] == [0, 1]


def drawn(folder: Path, pattern: str, epoch: int) -> list[int]:
    """The images of an epoch in the files that the driver wrote."""
    updates = [json.loads(line) for path in folder.glob(pattern) for line in path.read_text().splitlines()]
    return [image for number, images in updates if number == epoch for image in images]
