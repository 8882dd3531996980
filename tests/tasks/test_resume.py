"""A run of every task that is ended, by SIGKILL or a signal, and resumes exactly; and runs that may not resume."""

import shutil

import pytest
import torch

from tools import soak
from utils.lock import folder_lock


def load(folder, name: str = "latest.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kill", [True, False], ids=["killed", "asked to stop"])
def test_a_run_goes_on_exactly_where_it_was(task, finished, together, processes, kill):
    """In the middle of the second epoch; the moving average, the loss and its directions are all at stake."""
    output, saves = task.new_folder(), "SAVE_STEPS 2" if kill else ""
    task.interrupt(output, 5 if kill else 3, saves, processes=processes, kill=kill)
    progress = load(task.folder_in(output))["progress"]
    done = 5 if processes == 2 and not kill else 4  # processes agree on stopping one update later
    assert (progress["epoch"], progress["update"], progress["consumed"]) == (1, done, 8 * (done - 3))
    resumed = task.train(saves, output=output, processes=processes)
    assert f"latest.pth, update {done}\n" in (resumed.folder / "log_rank0.txt").read_text()
    undisturbed = finished if processes == 1 else together
    assert soak.differences(undisturbed.folder, resumed.folder) == []


def test_a_run_goes_on_from_a_numbered_checkpoint_in_a_new_folder(task, finished):
    resumed = task.train("TAG other", flags=f"--resume {finished.folder}/ckpt_epoch_0.pth")
    assert all(torch.equal(value, resumed.weights()[name]) for name, value in finished.weights().items())
    assert [record["epoch"] for record in resumed.records("eval")] == [1]


def test_a_run_in_half_precision_goes_on_with_its_loss_scale(task):
    whole, output = task.train("AMP fp16"), task.new_folder()
    task.interrupt(output, 3, "AMP fp16", kill=False)
    resumed = task.train("AMP fp16", output=output)
    assert soak.differences(whole.folder, resumed.folder) == []


def test_a_run_that_is_complete_says_so_and_changes_nothing(task, finished):
    output = task.new_folder()
    shutil.copytree(finished.folder, task.folder_in(output))
    again = task.train(output=output)
    assert "already complete: 2 of 2 epochs are done" in again.result.out
    assert soak.differences(finished.folder, again.folder) == []


def test_a_folder_is_for_one_run_at_a_time(task):
    output = task.new_folder()
    with folder_lock(task.folder_in(output)):
        process = task.start(output)
        assert process.wait() == 2
    assert process.err.startswith("error: another run (process ")
    assert {path.name for path in task.folder_in(output).iterdir()} == {".lock"}


def as_older_programs_wrote(payload: dict) -> dict:
    """A checkpoint with the best figures by their old names, and of no task where the old programs named none."""
    old = {name.replace("metric", "top1"): value for name, value in payload["progress"].items()}
    assert {"best_top1", "best_ema_top1"} < old.keys()
    meta = {key: value for key, value in payload["meta"].items() if key != "task" or "network" in payload["meta"]}
    return {key: value for key, value in payload.items() if key != "metric"} | {"progress": old, "meta": meta}


def test_checkpoints_of_older_programs_resume(task, finished):
    output = task.new_folder()
    folder = task.folder_in(output)
    folder.mkdir(parents=True)
    torch.save(as_older_programs_wrote(load(finished.folder, "ckpt_epoch_0.pth")), folder / "latest.pth")
    resumed = task.train(output=output)
    whole = load(finished.folder)
    assert load(folder)["progress"] == whole["progress"]
    assert all(torch.equal(value, resumed.weights()[name]) for name, value in whole["model"].items())


def test_checkpoints_of_older_programs_evaluate_by_the_recipe(task, finished, call, tmp_path):
    path = tmp_path / "old.pth"
    torch.save(as_older_programs_wrote(load(finished.folder, "best_ckpt.pth")), path)
    figures = []
    for weights in (finished.folder / "best_ckpt.pth", path):
        result = call("main_repmlp.py", *task.words(tmp_path, flags=f"--eval --resume {weights}"))
        assert result.status == 0, result.err
        figures.append(result.out.splitlines()[-1].split(" * ")[-1])
    assert figures[0] == figures[1]


@pytest.mark.parametrize("changes", ["TRAIN.OPTIMIZER.NAME sgd", "DATA.IMG_SIZE 192", "MODEL.BLOCKS 1,2,1,1"])
def test_another_experiment_is_refused(task, finished, refused, changes):
    if task.kind.name == "classification" and "BLOCKS" in changes:
        changes = "MODEL.SHARE_SETS 2,8"
    if task.kind.name == "segmentation" and "IMG_SIZE" in changes:
        changes = "SEG.BACKBONE_SIZE 64"  # a crop is no property of the network
    output = task.new_folder()
    folder = task.folder_in(output)
    folder.mkdir(parents=True)
    shutil.copy(finished.folder / "ckpt_epoch_0.pth", folder / "latest.pth")
    said = refused("main_repmlp.py", *task.words(output, changes))
    assert str(folder / "latest.pth") in said
    assert "MODEL.PRETRAINED" in said
    assert (folder / "latest.pth").read_bytes() == (finished.folder / "ckpt_epoch_0.pth").read_bytes()
