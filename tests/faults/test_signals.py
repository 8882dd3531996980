"""SIGTERM, SIGINT and SIGUSR1: the state is saved at the next update, and the run resumes from it exactly."""

import os
import signal

import pytest

from tools import soak

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_a_signal_saves_the_state_at_the_next_update(undisturbed, run, number):
    process = run.start("SAVE_STEPS", 0, plan={"signal_at_update": [57, number]})
    assert process.wait() == STATUS[number], process.err
    assert process.err == f"stopped by {number.name}\n"
    assert "stopping on request, state saved after update 58\n" in run.log
    assert run.state()["progress"]["update"] == 58
    assert run.leftovers() == []
    # Without further saves: the retention of the other run's files does not depend on them.
    run.finish()
    assert "latest.pth, update 58\n" in run.log
    assert soak.differences(undisturbed.folder, run.folder) == []


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_a_signal_to_all_processes_of_a_job(undisturbed, run, number):
    """As Slurm and the terminal send it: data loading processes get it too, and must not take the run along."""
    process = run.start(workers=2)
    process.until("Train: ", 5)
    os.killpg(process.pid, number)
    assert process.wait() == STATUS[number], process.err
    assert process.err == f"stopped by {number.name}\n"
    run.finish(workers=2)
    assert soak.differences(undisturbed.folder, run.folder) == []


def test_a_second_signal_does_not_wait(run):
    process = run.start("PRINT_FREQ", 1, plan={"signal_at_update": [3, signal.SIGTERM, signal.SIGTERM]})
    assert process.wait() == -signal.SIGTERM
    assert not (run.folder / "latest.pth").exists()


def test_a_signal_while_the_run_starts_or_after_its_end_changes_nothing(undisturbed, run):
    process = run.start()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait() in (-signal.SIGTERM, 143)
    run.finish()
    assert soak.differences(undisturbed.folder, run.folder) == []


def test_a_signal_in_the_last_update_of_an_epoch(undisturbed, run):
    """The next start then begins with the evaluation of that epoch."""
    process = run.start(plan={"signal_at_update": [43, signal.SIGUSR1]})
    assert process.wait() == 138
    assert run.records("eval") == []
    run.finish()
    assert soak.differences(undisturbed.folder, run.folder) == []
