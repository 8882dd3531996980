"""A training of every task: what it leaves, and the same network under every setting that only changes how."""

import json
import math
import re

import pytest
import torch
from task_recipes import RECIPES, recipe_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import configs
from tasks import DEFAULT, TASKS
from tools import soak


def records(run) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def state(run, name: str = "latest.pth") -> dict:
    return torch.load(run.folder / name, weights_only=True)


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first if first[name].is_floating_point())


def test_every_task_has_a_recipe_here():
    for name in TASKS:
        recipe_of(name)
    assert RECIPES.keys() == TASKS.keys()


def test_a_task_without_a_recipe_is_told_of():
    with pytest.raises(pytest.fail.Exception, match=r"no test covers the task detection: give it a row in task_recip"):
        recipe_of("detection")


# What a run leaves


def test_a_run_leaves_its_files(finished):
    names = {path.name for path in finished.folder.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    assert names - events == {
        *(".lock", "config.yaml", "log_rank0.txt", "metrics.jsonl"),
        *("latest.pth", "best_ckpt.pth", "best_ema.pth", "ckpt_epoch_0.pth", "ckpt_epoch_1.pth"),
    }
    assert finished.result.err == ""


def test_the_written_configuration_is_the_one_that_ran(task, finished):
    cfg = configs.load_config(finished.folder / "config.yaml")
    assert (task.kind.name, 0.05, str(task.images)) == (cfg.TASK, cfg.TRAIN.EMA_ALPHA, cfg.DATA.DATA_PATH)


def test_the_records_are_json_and_hold_the_figures_of_the_task(task, finished):
    kinds = [record["kind"] for record in records(finished)]
    assert kinds == ["train", "train", "train", "train_epoch", "eval", "eval_ema"] * 2
    for kind in ("eval", "eval_ema"):
        for record in finished.records(kind):
            assert isinstance(record[task.kind.metric], float)
            assert 0 <= record[task.kind.metric] <= 100
    assert all(math.isfinite(record["loss"]) for record in finished.records("train"))


def test_the_log_tells_the_figures(task, finished):
    pattern = recipe_of(task.kind.name).log
    log = (finished.folder / "log_rank0.txt").read_text()
    for kind in ("eval", "eval_ema"):
        told = re.findall(rf"Epoch \d {kind}: {pattern}", log)
        assert told == [f"{record[task.kind.metric]:.3f}" for record in finished.records(kind)]
    best = max(record[task.kind.metric] for record in finished.records("eval"))
    assert f"Best {task.kind.metric_label} {best:.3f}; 0 unreadable images, 0 skipped updates" in log.splitlines()[-1]


def test_the_best_checkpoints_are_those_of_the_best_figures(task, finished):
    for name, kind, key in (("best_ckpt.pth", "eval", "best_metric"), ("best_ema.pth", "eval_ema", "best_ema_metric")):
        figures = [record[task.kind.metric] for record in finished.records(kind)]
        payload = state(finished, name)
        assert payload["progress"][key] == max(figures)
        assert payload["epoch"] == figures.index(max(figures))
        assert state(finished)["progress"][key] == max(figures)


def test_checkpoints_describe_themselves(task, finished):
    for path in finished.folder.glob("*.pth"):
        payload = torch.load(path, weights_only=True)
        assert payload["metric"] == task.kind.metric
        assert payload["meta"]["task"] == task.kind.name
        assert payload["meta"]["form"] == "train"
        assert payload["meta"]["dataset"] == task.kind.default_dataset
        assert payload["meta"].get("weights") == ("ema" if path.name == "best_ema.pth" else None)


def test_the_curves_are_readable(task, finished):
    curves = EventAccumulator(str(finished.folder)).Reload()
    wanted = {"train/loss", "train/lr", "train/grad_norm", f"eval/{task.kind.metric}", f"eval_ema/{task.kind.metric}"}
    wanted |= {f"train/{name}" for name in ("images_per_second", "data_seconds", "data_share", "tflops", "memory")}
    assert wanted <= set(curves.Tags()["scalars"])
    drawn = [(event.step, event.value) for event in curves.Scalars(f"eval/{task.kind.metric}")]
    assert drawn == [
        (record["update"], pytest.approx(record[task.kind.metric], rel=1e-6)) for record in finished.records("eval")
    ]


def test_the_same_command_gives_the_same_run_bit_for_bit(task, finished):
    assert soak.differences(finished.folder, task.train().folder) == []


def test_another_seed_gives_another_run(task, finished):
    assert distance(finished.weights(), task.train("SEED 1 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0").weights()) > 1e-4


def test_two_processes_start_from_the_same_weights_and_train_on_the_same_images(finished, together):
    """Their statistics, images and augmentations are their own, so that no more than the first loss is alike."""
    payload = state(together)
    assert (payload["run"]["world_size"], payload["progress"]["update"]) == (2, 6)
    first, other = (run.records("train")[0]["loss"] for run in (finished, together))
    assert first == pytest.approx(other, rel=0.25)


# Settings that change how a network is trained


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision(task, finished, amp):
    run = task.train(f"AMP {amp}")
    assert f"amp {amp}" in run.result.out
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in run.weights().values())
    losses = [record["loss"] for record in run.records("train")]
    assert losses[0] == pytest.approx(finished.records("train")[0]["loss"], rel=0.05)
    assert losses != [record["loss"] for record in finished.records("train")]
    assert all(record[task.kind.metric] is not None for record in run.records("eval"))
    assert bool(state(run)["scaler"]) == (amp == "fp16")


def test_gradient_checkpointing_changes_no_weights(task, finished):
    run = task.train(flags="--use-checkpoint")
    assert distance(finished.weights(), run.weights()) < 1e-5


# Compiling takes long, and one task shows it as well as another.
COMPILED = [pytest.param(name, marks=[pytest.mark.slow] if name != DEFAULT else []) for name in TASKS]


@pytest.mark.parametrize("task", COMPILED, indirect=True)
def test_compiling_changes_no_weights_beyond_rounding(task):
    """By SGD: AdamW turns the rounding of a gradient near zero into a whole step.

    The learning rate is low, since every update amplifies the rounding of those before: by the updates of the recipe a
    hundredfold, with BatchNorm over four images.
    """
    opts = "TRAIN.OPTIMIZER.NAME sgd TRAIN.BASE_LR 0.003"
    plain, compiled = (task.train(opts, flags=flags) for flags in ("", "--compile"))
    assert distance(plain.weights(), compiled.weights()) < 1e-5
    assert [record["epoch"] for record in compiled.records("eval")] == [0, 1]


def test_batch_norms_that_are_synchronised(task):
    """Within an epoch each process has the running statistics of its own images, unless all of them have one."""
    spread = []
    for synchronised in (False, True):
        output = task.new_folder()
        task.interrupt(output, 1, f"TRAIN.SYNC_BN {synchronised}", processes=2, kill=False)
        first, second = torch.load(task.folder_in(output) / "latest.pth", weights_only=True)["rank_statistics"]
        spread.append(float((first - second).abs().max()))
    assert spread[0] > 1e-3
    assert spread[1] < 1e-6


def test_fewer_epochs_than_evaluations_and_no_average(task):
    run = task.train("EVAL_FREQ 2 TRAIN.EMA_ALPHA 0 SAVE_FREQ 5 KEEP_CHECKPOINTS 0")
    assert [record["epoch"] for record in run.records("eval")] == [1]
    assert run.records("eval_ema") == []
    assert {path.name for path in run.folder.glob("*.pth")} == {"latest.pth", "best_ckpt.pth"}
    assert "ema" not in state(run)
