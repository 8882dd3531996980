"""What goes wrong in a training of any task: numbers that are not finite, images that can't be read, mistakes."""

import shutil
from pathlib import Path

import pytest
import torch

import data
from tasks import TASKS

EVERY = 1000  # more images than a test set here has


def state(folder: Path, name: str = "latest.pth") -> dict:
    return torch.load(folder / name, weights_only=True)


def copied(task, folder: Path) -> Path:
    """The images of a task, to be damaged."""
    return Path(shutil.copytree(task.images, folder / "images"))


def damage(images: Path, split: str, count: int) -> list[Path]:
    """Makes texts of the first images of a split."""
    paths = sorted(path for path in images.rglob("*.png") if split in path.parts and "gtFine" not in path.parts)
    for path in paths[:count]:
        path.write_text("this is a text\n")
    return paths[:count]


def stopped(task, process) -> str:
    """Asserts that a process ended in one line, which its log has too, and returns it."""
    assert process.wait() == 2, process.out + process.err
    assert process.err.startswith("error: ")
    assert process.err.count("\n") == 1, process.err
    return process.err.removeprefix("error: ").strip()


# Numbers that are not finite


def test_a_nan_costs_one_update(task, finished):
    run = task.train(plan={"nan_at": [2, 3]})  # of the third and the fourth batch, the second update
    log = (run.folder / "log_rank0.txt").read_text()
    assert "WARNING update 1 skipped at learning rate" in log
    assert "1 skipped updates" in log.splitlines()[-1]
    assert run.records("train")[1]["loss"] is None
    payload = state(run.folder)
    assert payload["progress"]["skipped"] == 1
    for key in ("model", "ema", "criterion"):
        assert all(tensor.isfinite().all() for tensor in payload.get(key, {}).values()), key


def test_too_many_of_them_end_the_run(task):
    output = task.new_folder()
    process = task.start(output, "TRAIN.MAX_SKIPPED 2", plan={"nan_from": 0})
    said = stopped(task, process)
    assert said.startswith("3 updates were skipped, TRAIN.MAX_SKIPPED is 2")
    assert (task.folder_in(output) / "log_rank0.txt").read_text().endswith(f"ERROR stopped: {said}\n")


def test_answers_that_are_not_finite_are_never_the_best(task):
    run = task.train(plan={"nan_evaluated": EVERY})
    progress, log = state(run.folder)["progress"], (run.folder / "log_rank0.txt").read_text()
    assert (progress["best_metric"], progress["best_ema_metric"]) == (None, None)
    assert {path.name for path in run.folder.glob("best*")} == set()
    assert f"Best {task.kind.metric_label} none" in log.splitlines()[-1]
    assert "NaN" not in (run.folder / "metrics.jsonl").read_text()
    for kind in ("eval", "eval_ema"):
        assert [record[task.kind.metric] in (0, None) for record in run.records(kind)] == [True, True]
        assert log.count(f"WARNING Epoch 0 {kind}: ") == log.count(f"WARNING Epoch 1 {kind}: ") == 1


def test_an_evaluation_of_broken_weights_is_refused(task, finished, refused, tmp_path):
    payload = state(finished.folder, "best_ckpt.pth")
    name = next(name for name, tensor in payload["model"].items() if name.endswith("running_var"))
    payload["model"][name] = torch.full_like(payload["model"][name], -1.0)
    torch.save(payload, tmp_path / "broken.pth")
    said = refused("main_repmlp.py", *task.words(tmp_path, flags=f"--eval --resume {tmp_path}/broken.pth"))
    assert "are not finite" in said


# Images that can't be read


def test_an_unreadable_training_image_is_replaced_and_named(task, tmp_path):
    images = copied(task, tmp_path)
    (path,) = damage(images, "train", 1)
    run = task.train("DATA.MAX_UNREADABLE 1", images=images)
    log = (run.folder / "log_rank0.txt").read_text()
    assert log.count(f"WARNING unreadable image replaced: {path}: ") == 1
    assert "1 unreadable images" in log.splitlines()[-1]
    assert len(state(run.folder)["unreadable"]) == 1


def test_too_many_unreadable_training_images_end_the_run(task, tmp_path):
    images, output = copied(task, tmp_path), task.new_folder()
    damage(images, "train", 3)
    said = stopped(task, task.start(output, "DATA.MAX_UNREADABLE 2", images=images))
    assert said.startswith("3 training images can't be read, DATA.MAX_UNREADABLE is 2")
    assert (task.folder_in(output) / "log_rank0.txt").read_text().endswith(f"ERROR stopped: {said}\n")


def test_an_unreadable_test_image_ends_the_run_after_the_epoch(task, tmp_path):
    images, output = copied(task, tmp_path), task.new_folder()
    (path,) = damage(images, "val", 1)
    said = stopped(task, task.start(output, images=images))
    assert said.startswith(f"1 images can't be read, so the figures would be wrong: {path}: ")
    assert (task.folder_in(output) / "log_rank0.txt").read_text().endswith(f"ERROR stopped: {said}\n")


def test_an_unreadable_test_image_is_refused_by_every_evaluation(task, finished, refused, tmp_path):
    images, weights = copied(task, tmp_path), finished.folder / "best_ckpt.pth"
    (path,) = damage(images, "val", 1)
    expected = f"error: 1 images can't be read, so the figures would be wrong: {path}: "
    words = task.words(tmp_path / "output", flags=f"--eval --resume {weights}", images=images)
    assert refused("main_repmlp.py", *words).startswith(expected)
    for mode in ("train", "check"):
        json_file = tmp_path / "figures.json"
        own = ["--opts", "FACE.FOLDS", 2] if task.kind.section == "FACE" else []
        assert refused("test.py", images, mode, weights, "-j", 0, "--json", json_file, *own).startswith(expected)
        assert not json_file.exists()


# Mistakes


def test_labels_of_another_kind(task, refused, tmp_path):
    # Those of torchvision are labelled as imagenet is.
    others = [name for name, spec in data.DATASETS.items() if spec.labels != task.kind.labels and "/" not in name]
    assert others
    for name in others:
        path = tmp_path if name not in ("digits", "shapes") else name
        said = refused("main_repmlp.py", *task.words(tmp_path / "output", f"DATA.DATASET {name}", images=path))
        assert f"DATA.DATASET {name} has {data.DATASETS[name].labels}, TASK {task.kind.name} needs " in said
        assert f"set DATA.DATASET to {task.kind.default_dataset}" in said
    assert not (tmp_path / "output").exists()


def test_weights_of_another_task_are_refused_with_a_remedy(task, finished, refused, tmp_path):
    for other in TASKS.keys() - {task.kind.name}:
        words = f"--eval --resume {finished.folder}/best_ckpt.pth --data-path {task.images} --output {tmp_path}/new"
        opts = ["TASK", other, "DATA.DATASET", TASKS[other].default_dataset]
        said = refused("main_repmlp.py", *words.split(), "--opts", *opts)
        assert f"is of TASK {task.kind.name}, the configuration of TASK {other}: give the recipe" in said
        assert not (tmp_path / "new").exists()


def test_a_run_of_another_task_is_not_resumed(task, finished, start, tmp_path):
    """Under one architecture and tag: the metadata tell."""
    for other in TASKS.keys() - {task.kind.name}:
        payload = state(finished.folder, "ckpt_epoch_0.pth")
        folder = task.folder_in(tmp_path / other)
        folder.mkdir(parents=True)
        payload["meta"]["task"] = other
        torch.save(payload, folder / "latest.pth")
        said = stopped(task, task.start(tmp_path / other))
        assert f"of another experiment, with task {other} instead of {task.kind.name}" in said
        assert "another TAG" in said


def test_a_batch_of_the_whole_set(task, refused, tmp_path):
    said = refused("main_repmlp.py", *task.words(tmp_path / "output", "DATA.BATCH_SIZE 40 TRAIN.ACCUMULATION_STEPS 1"))
    assert "24" in said
    assert "lower DATA.BATCH_SIZE" in said
    assert not (tmp_path / "output").exists()


def test_a_failure_that_is_no_mistake_of_the_user_keeps_its_traceback_for_the_log(task, monkeypatch, call, tmp_path):
    """The log is of a folder that the run has written to before."""

    def broken(*_: object) -> None:
        raise RuntimeError("no mistake of a user")

    monkeypatch.setattr(task.kind, "build_criterion", broken)
    (task.folder_in(tmp_path)).mkdir(parents=True)
    with pytest.raises(RuntimeError, match="no mistake of a user"):
        call("main_repmlp.py", *task.words(tmp_path))
    log = (task.folder_in(tmp_path) / "log_rank0.txt").read_text()
    assert "ERROR stopped: no mistake of a user\nTraceback" in log
