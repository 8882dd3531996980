"""The training script with one fault built in: `fault_driver.py '{"nan_at": [7]}' <arguments of main_repmlp.py>`.

kill_at_update n    SIGKILL to itself before update n
kill_at_rename n    SIGKILL to itself when its n-th checkpoint is about to get its name
kill_after_rename n the same, when it has just got it
signal_at_update    [n, signal, ...]: sends itself signals before update n
sleep_at_update     [n, rank, seconds]: this rank sleeps before update n
fail_at_update      [n, rank]: this rank ends with a user error before update n
ignore              a signal that is ignored from the start, as in a background job of a shell
record_images       prefix of files, one a rank, that get the epoch and the images of each update
nan_at              updates whose images become NaN, counted from the start of the process
nan_from            all from this one on
nan_evaluated       images of each evaluation's first batch that become NaN
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import data
import engine.train
import main_repmlp
from utils import cli


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_updates(plan: dict) -> None:
    update = engine.train.Trainer._update

    def disturbed(trainer, group):
        if trainer.progress.update == plan.get("kill_at_update"):
            kill_oneself()
        at, *signals = plan.get("signal_at_update", [None])
        if trainer.progress.update == at:
            for number in signals:
                os.kill(os.getpid(), number)
        at, rank, seconds = plan.get("sleep_at_update", [None, 0, 0])
        if (trainer.progress.update, trainer.rank_info.rank) == (at, rank):
            time.sleep(seconds)
        if [trainer.progress.update, trainer.rank_info.rank] == plan.get("fail_at_update"):
            raise ValueError("made up")
        update(trainer, group)
        if "record_images" in plan:
            images = [int(index) for batch in group for index in batch.indices]
            with open(f"{plan['record_images']}{trainer.rank_info.rank}", "a") as file:
                file.write(json.dumps([trainer.progress.epoch, images]) + "\n")

    engine.train.Trainer._update = disturbed


def around_renames(plan: dict) -> None:
    rename, count = os.replace, 0

    def disturbed(source, target):
        nonlocal count
        count += str(target).endswith(".pth")
        if count == plan.get("kill_at_rename"):
            kill_oneself()
        rename(source, target)
        if count == plan.get("kill_after_rename"):
            kill_oneself()

    os.replace = disturbed


class Poisoned(data.Normalize):
    """Gives NaN in the chosen updates and evaluated images."""

    plan: dict
    calls = 0

    def forward(self, images):
        out = super().forward(images)
        if torch.is_inference_mode_enabled():
            out[: self.plan.get("nan_evaluated", 0)] = torch.nan
            return out
        update, self.calls = self.calls, self.calls + 1
        wanted = update in self.plan.get("nan_at", []) or update >= self.plan.get("nan_from", 2**63)
        return out * torch.nan if wanted else out


if __name__ == "__main__":
    Poisoned.plan = json.loads(sys.argv.pop(1))
    if "ignore" in Poisoned.plan:
        signal.signal(Poisoned.plan["ignore"], signal.SIG_IGN)
    before_updates(Poisoned.plan)
    around_renames(Poisoned.plan)
    data.Normalize = Poisoned
    cli.run(main_repmlp.main)
