"""Numbers that are not finite: their update is skipped, logged and counted; too many end the run."""

import json
import logging
import math
import re
import signal

import pytest
import torch
from fault_runs import Run, one_line
from torch import nn
from training_parts import optimizer_of, trainer_of

from data import Batch
from engine.finite_guard import MIN_LOSS_SCALE
from engine.optimizer import OPTIMIZERS
from tools import soak


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def assert_finite(run) -> None:
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line, parse_constant=refuse).values()
        assert all(math.isfinite(value) for value in values if isinstance(value, float)), line
    state = run.state()
    for key in ("model", "ema"):
        assert all(tensor.isfinite().all() for tensor in state[key].values()), key


def test_a_nan_costs_one_update(run, images):
    options = ("DATA.DATA_PATH", images, "DATA.DATASET", "imagenet", "DATA.BATCH_SIZE", 16)
    run.finish(*options, plan={"nan_at": [2, 5]})
    told = re.findall(r"WARNING update (\d+) skipped at learning rate (\S+): non-finite loss, on images (.*)", run.log)
    assert [(int(update), float(rate)) for update, rate, _ in told] == [
        (2, pytest.approx(0.0005 * 2 / 4)),
        (5, pytest.approx(0.0005 * (1 + math.cos(math.pi * 5 / 8)) / 2, rel=1e-2)),
    ]
    for *_, names in told:
        assert re.fullmatch(rf"({re.escape(str(images))}/train/(ant|bee)/\d+\.png, ){{4}}\.\.\.", names)
    assert "2 skipped updates" in run.log.splitlines()[-1]
    assert run.state()["progress"] | {"best_metric": 0, "best_ema_metric": 0} == {
        "epoch": 2,
        "consumed": 0,
        "update": 8,
        "best_metric": 0,
        "best_ema_metric": 0,
        "skipped": 2,
    }
    assert len(run.records("train")) == 4
    assert_finite(run)


def test_answers_that_are_not_finite_are_wrong_and_never_the_best(run, images):
    """All 12 images of every evaluation: no accuracy that an epoch could be chosen for, and no NaN in the records."""
    options = ("DATA.DATA_PATH", images, "DATA.DATASET", "imagenet", "DATA.BATCH_SIZE", 16)
    run.finish(*options, plan={"nan_evaluated": 12})
    for kind in ("eval", "eval_ema"):
        assert [(r["top1"], r["top5"], r["loss"], r["images"]) for r in run.records(kind)] == [(0, 0, None, 12)] * 2
        assert len(re.findall(rf"WARNING Epoch \d {kind}: .*12 of them with non-finite outputs", run.log)) == 2
    assert not (run.folder / "best_ckpt.pth").exists()
    assert not (run.folder / "best_ema.pth").exists()
    progress = run.state()["progress"]
    assert (progress["best_metric"], progress["best_ema_metric"]) == (None, None)
    assert "Best Acc@1 none" in run.log
    assert_finite(run)


def test_one_of_them_costs_one_image(run, images):
    options = ("DATA.DATA_PATH", images, "DATA.DATASET", "imagenet", "DATA.BATCH_SIZE", 16)
    run.finish(*options, plan={"nan_evaluated": 1})
    last = run.records("eval")[-1]
    assert (last["top5"], last["loss"]) == (pytest.approx(100 * 11 / 12), None)
    assert "1 of them with non-finite outputs" in run.log
    assert run.state("best_ckpt.pth")["max_accuracy"] == max(r["top1"] for r in run.records("eval")) > 0


def test_the_count_and_the_state_survive_a_restart(start, run, tmp_path_factory):
    """The skipped update lies between two checks of the numbers, and a save between it and the kill."""
    options = ("PRINT_FREQ", 40)
    whole = Run(start, tmp_path_factory.mktemp("whole"))
    whole.finish(*options, plan={"nan_at": [6]})
    assert run.start(*options, plan={"nan_at": [6], "kill_at_update": 12}).wait() == -signal.SIGKILL
    assert run.state()["progress"]["skipped"] == 1
    assert run.log.count("update 6 skipped") == 1
    run.finish(*options)
    assert "1 skipped updates" in run.log.splitlines()[-1]
    assert soak.differences(whole.folder, run.folder) == []
    assert_finite(run)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_first_update_that_is_skipped_leaves_no_trace(run, name):
    process = run.start("TRAIN.OPTIMIZER.NAME", name, "SAVE_STEPS", 1, plan={"nan_at": [0], "kill_at_update": 1})
    assert process.wait() == -signal.SIGKILL
    state = run.state()
    assert state["progress"]["skipped"] == 1
    moments = [moment for each in state["optimizer"]["state"].values() for moment in each.values()]
    assert moments
    assert not any(moment.any() for moment in moments)
    norms = [key.rsplit(".", 1)[0] for key in state["model"] if key.endswith("running_mean")]
    assert norms
    assert not any(state["model"][f"{norm}.running_mean"].any() for norm in norms)
    assert all((state["model"][f"{norm}.running_var"] == 1).all() for norm in norms)


def test_nan_from_some_update_on_ends_the_run(run):
    error = one_line(run.start("TRAIN.MAX_SKIPPED", 6, plan={"nan_from": 9}))
    assert re.fullmatch(
        r"error: 7 updates were skipped, TRAIN\.MAX_SKIPPED is 6; the last: update 15 skipped at learning rate \S+: "
        r"non-finite loss, on images digits image \d+, .*\. Lower TRAIN\.BASE_LR, look at the images, or train with "
        "AMP off",
        error,
    )
    assert "stopped: 7 updates were skipped" in run.log
    assert_finite(run)


class Steps:
    """A trainer of a linear layer, with gradients as it is told."""

    def __init__(self, *, half: bool, limit: int = 100) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.told: list[str] = []
        logger = logging.getLogger("tests.faults")
        logger.warning = self.told.append  # type: ignore[method-assign, assignment]
        self.trainer = trainer_of(
            self.network,
            optimizer=optimizer_of(self.network, "sgd", lr=0.5),
            logger=logger,
            print_freq=4,
            clip_grad=5,
            max_skipped=limit,
            dtype=torch.float16 if half else None,
        )
        self.scaler = self.trainer.scaler

    @property
    def skipped(self) -> int:
        return self.trainer.progress.skipped

    def update(self, number: int, *, gradient: float = 1.0, loss: float = 1.0) -> None:
        def backward(*_: object) -> torch.Tensor:
            self.scaler.scale(torch.zeros(()))
            for parameter in self.network.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            return torch.tensor(loss)

        self.trainer._backward = backward  # type: ignore[method-assign]
        assert self.trainer.progress.update == number
        self.trainer._update([Batch(torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64), torch.arange(3), [])])
        if number % 4 == 3:
            self.trainer.check_skipped()


@pytest.mark.parametrize("gradient", [math.inf, math.nan])
def test_gradients_that_are_not_finite_under_a_finite_loss(gradient):
    steps = Steps(half=False)
    for number in range(4):
        before = [p.clone() for p in steps.network.parameters()]
        steps.update(number, gradient=gradient if number == 2 else 1.0)
        same = all(torch.equal(p, q) for p, q in zip(before, steps.network.parameters(), strict=True))
        assert same == (number == 2)
    assert steps.told == ["update 2 skipped at learning rate 0.5: non-finite gradients"]
    assert steps.skipped == 1


def test_overflow_under_a_loss_scale_is_its_normal_work():
    steps = Steps(half=True, limit=0)
    for number in range(8):
        steps.update(number, gradient=math.inf if number == 2 else 65536.0)
    assert steps.told == []
    assert steps.skipped == 0
    assert steps.scaler.get_scale() == 2.0**15


def test_a_loss_scale_that_collapses_ends_the_run():
    steps = Steps(half=True, limit=0)
    # 2^16 halves with every overflow; looks are four updates apart.
    last = next(number for number in range(3, 100, 4) if 2.0**16 / 2.0 ** (number + 1) < MIN_LOSS_SCALE)
    for number in range(last):
        steps.update(number, gradient=math.inf)
    with pytest.raises(ValueError, match=r"the loss scale has collapsed to .*; use AMP bf16 or off"):
        steps.update(last, gradient=math.inf)


def test_a_loss_that_is_not_finite_counts_with_a_loss_scale_too():
    steps = Steps(half=True, limit=1)
    for number in range(3):
        value = math.nan if number in (1, 2) else 1.0
        steps.update(number, gradient=value, loss=value)
    with pytest.raises(ValueError, match=r"2 updates were skipped, TRAIN\.MAX_SKIPPED is 1; the last: update 2 "):
        steps.update(3)
