"""SIGKILL at any moment: a restarted run equals the undisturbed run, bit for bit."""

import os
import random
import shutil
import signal

import pytest
import torch

from tools import soak

KILLS = soak.KILLS_A_ROUND  # of each run below: 28 in all


@pytest.mark.parametrize(
    ("seed", "workers"),
    [
        pytest.param(0, (0,), marks=pytest.mark.slow),
        pytest.param(1, (2,), marks=pytest.mark.slow),
        pytest.param(2, (0, 2), marks=pytest.mark.slow),
        (3, (2, 1, 0)),
    ],
)
def test_killed_repeatedly_at_random_moments(undisturbed, run, seed, workers):
    """The number of data loading processes changes with each start; about half of the kills hit a save."""
    rng, hits = random.Random(seed), []
    while len(hits) < KILLS:
        before = soak.lines(run.folder)
        process = run.start(workers=workers[len(hits) % len(workers)])
        hits.append(soak.kill(run.folder, process.alive, process.pid, rng, lines_before=before))
        assert hits[-1] != "nothing", "it ended before it was killed"
        assert process.wait() == -signal.SIGKILL
    print(f"{hits.count('training')} kills hit training, {hits.count('saving')} saving")
    run.finish(workers=workers[0])
    assert soak.differences(undisturbed.folder, run.folder) == []
    assert run.leftovers() == []
    assert run.log.count("resuming from") <= KILLS + 1


def test_killed_at_each_file_in_turn(undisturbed, run):
    """Each start is killed just before, or just after, it renames its n-th checkpoint file, for rising n."""
    for start in range(2, 40):
        process = run.start(plan={("kill_at_rename", "kill_after_rename")[start % 2]: start // 2})
        if process.wait() == 0:
            break
        assert process.status == -signal.SIGKILL, process.err
    assert start > 6
    assert soak.differences(undisturbed.folder, run.folder) == []
    assert run.leftovers() == []


def test_an_evaluation_is_recorded_once_where_the_epoch_had_been_saved_before_it(run, start):
    """With a save after the last update of an epoch, a run that is killed later evaluates that epoch a second time."""
    options = ("SAVE_STEPS", 22)
    # Files: latest at updates 22 and 44; then, the epoch evaluated, latest again.
    process = run.start(*options, plan={"kill_at_rename": 3})
    assert process.wait() == -signal.SIGKILL, process.err
    assert [record["epoch"] for record in run.records("eval")] == [0]
    assert run.state()["progress"]["consumed"] == 44 * 32
    run.finish(*options)
    assert [record["epoch"] for record in run.records("eval")] == [0, 1]
    assert [record["epoch"] for record in run.records("eval_ema")] == [0, 1]


def test_leftovers_of_a_killed_run_do_not_block_the_next(undisturbed, interrupted):
    stray = interrupted.folder / ".latest.pth.abc123.tmp"
    stray.write_bytes(b"half a checkpoint")
    (interrupted.folder / ".lock").write_text("1")  # a live process that holds no lock
    metrics = interrupted.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind": "train", "upd')
    interrupted.finish()
    assert not stray.exists()
    assert soak.differences(undisturbed.folder, interrupted.folder) == []


def test_the_next_run_does_not_wait_for_the_data_loading_processes_of_a_killed_one(undisturbed, run):
    """They notice only seconds later that their run is gone, and hold no lock meanwhile."""
    process = run.start(workers=2)
    process.until("Train: ", 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert _group_exists(process.pid)
    run.finish(workers=2)
    assert soak.differences(undisturbed.folder, run.folder) == []


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_comparison_finds_a_single_bit(undisturbed, run):
    shutil.copytree(undisturbed.folder, run.folder)
    assert soak.differences(undisturbed.folder, run.folder) == []
    state = run.state()
    name = next(iter(state["ema"]))
    state["ema"][name].view(torch.int32).view(-1)[0] ^= 1
    torch.save(state, run.folder / "latest.pth")
    assert soak.differences(undisturbed.folder, run.folder) == [f"latest.pth differs in /ema/{name}"]
