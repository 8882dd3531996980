"""The numbers of a training against values worked out by hand, and against the published 100-epoch recipe."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from training_parts import ema_of

from configs import flatten, load_config, parse_opts
from engine.plan import plan_training

ROOT = Path(__file__).parents[2]


def load(opts: str = ""):
    return load_config(overrides=parse_opts(opts.split()))


def test_the_published_recipe():
    golden = json.loads((ROOT / "tests/golden/optimisation.json").read_text())["recipe"]
    cfg = load_config(ROOT / "configs/repmlpnet_t224_100ep.yaml")
    flat = flatten(cfg)
    assert flat["MODEL.ARCH"] == golden["arch"]
    assert flat["TRAIN.LR_SCHEDULER.NAME"] == golden["schedule"]
    assert flat["DATA.BATCH_SIZE"] == golden["batch_size_per_gpu"]
    plan = plan_training(cfg, world_size=golden["world_size"], steps_per_epoch=golden["steps_per_epoch"])
    assert plan.global_batch == 256  # so that nothing is scaled
    assert plan.lr == golden["base_lr"]
    assert plan.warmup_lr == golden["warmup_lr"]
    assert plan.min_lr == golden["min_lr"]
    assert (plan.updates_per_epoch, plan.total_updates, plan.warmup_updates) == (5004, 500_400, 50_040)


# options, processes, steps an epoch -> global batch, lr, updates an epoch, in all, of warm-up, between decays
BY_HAND = [
    ("", 1, 1000, 128, 0.001, 1000, 100_000, 10_000, 30_000),
    ("", 4, 1000, 512, 0.004, 1000, 100_000, 10_000, 30_000),
    ("DATA.BATCH_SIZE 64", 1, 1000, 64, 0.0005, 1000, 100_000, 10_000, 30_000),
    ("TRAIN.ACCUMULATION_STEPS 1", 1, 1000, 128, 0.001, 1000, 100_000, 10_000, 30_000),
    ("TRAIN.ACCUMULATION_STEPS 4", 1, 1000, 512, 0.004, 250, 25_000, 2_500, 7_500),
    ("TRAIN.ACCUMULATION_STEPS 4", 2, 1003, 1024, 0.008, 250, 25_000, 2_500, 7_500),
    ("TRAIN.ACCUMULATION_STEPS 8", 1, 8, 1024, 0.008, 1, 100, 10, 30),
    ("TRAIN.EPOCHS 7 TRAIN.WARMUP_EPOCHS 0", 1, 10, 128, 0.001, 10, 70, 0, 300),
    ("TRAIN.LR_SCHEDULER.DECAY_EPOCHS 2", 1, 10, 128, 0.001, 10, 1000, 100, 20),
]


@pytest.mark.parametrize("row", BY_HAND)
def test_numbers_by_hand(row):
    opts, world_size, steps, batch, lr, *updates = row
    plan = plan_training(load(opts), world_size=world_size, steps_per_epoch=steps)
    assert plan.global_batch == batch
    assert plan.lr == pytest.approx(lr, rel=1e-12)
    assert dataclasses.astuple(plan)[4:8] == tuple(updates)


def test_milestones_are_rounded_to_updates():
    opts = "DATA.BATCH_SIZE 512 TRAIN.LR_SCHEDULER.MILESTONES 0.5,22.175,36.97"
    assert plan_training(load(opts), world_size=1, steps_per_epoch=1001).milestone_updates == (500, 22_197, 37_007)


@pytest.mark.parametrize("milestones", ["0.1", "9.9", "5,9.9"])
def test_milestones_outside_of_the_training(milestones):
    schedule = f"TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.MILESTONES {milestones}"
    opts = f"TRAIN.EPOCHS 10 TRAIN.WARMUP_EPOCHS 0 {schedule}"
    with pytest.raises(ValueError, match="with 2 updates per epoch, one is before the first update or after the last"):
        plan_training(load(opts), world_size=1, steps_per_epoch=2)
    assert plan_training(load(opts), world_size=1, steps_per_epoch=20).milestone_updates[-1] < 200


def test_all_three_learning_rates_scale():
    plan = plan_training(load("TRAIN.WARMUP_LR 1e-6 TRAIN.MIN_LR 1e-5"), world_size=4, steps_per_epoch=10)
    assert (plan.warmup_lr, plan.min_lr) == pytest.approx((2e-6, 2e-5), rel=1e-12)


def test_the_quickstart_learns_at_2e_3():
    cfg = load_config(ROOT / "configs/quickstart.yaml")
    assert plan_training(cfg, world_size=1, steps_per_epoch=22).lr == pytest.approx(2e-3, rel=1e-12)


def test_the_log_line():
    line = str(plan_training(load(), world_size=2, steps_per_epoch=10))
    assert line == (
        "global batch 256, learning rate 0.002 (warm-up from 0, down to 0), "
        "10 updates an epoch, 1000 in all, 100 of them warm-up"
    )


def test_less_than_one_update_is_an_error():
    with pytest.raises(ValueError, match="TRAIN.ACCUMULATION_STEPS = 8: an epoch has 7 batches only.* lower it"):
        plan_training(load("TRAIN.ACCUMULATION_STEPS 8"), world_size=1, steps_per_epoch=7)


def test_less_than_one_batch_of_images_is_an_error():
    with pytest.raises(ValueError, match=r"DATA.BATCH_SIZE = 128: .* do not fill one batch .* lower it"):
        plan_training(load(), world_size=2, steps_per_epoch=0)


def test_plan_numbers_stay():
    plan = plan_training(load(), world_size=1, steps_per_epoch=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.lr = 1.0


@pytest.mark.parametrize(
    ("opts", "weight", "remedies"),
    [
        ("TRAIN.EMA_ALPHA 0.9", "9.22", "below 0.098; 0.00098 gives a decay of 0.99, 9.8e-05 one of 0.999"),
        ("TRAIN.EMA_ALPHA 0.9 TRAIN.EPOCHS 20", "46.1", "below 0.02; 0.0002 gives a decay of 0.99, 2e-05 one of 0.999"),
        ("TRAIN.EMA_ALPHA 0.5 DATA.BATCH_SIZE 200 TRAIN.EMA_UPDATE_PERIOD 1", "1", "below 0.5; 0.005 gives"),
    ],
)
def test_an_average_that_would_be_a_copy_is_refused(opts, weight, remedies):
    with pytest.raises(ValueError, match=r"^TRAIN.EMA_ALPHA = 0.\d: with a global batch of") as caught:
        plan_training(load(opts), world_size=1, steps_per_epoch=10)
    assert f"would have the weight {weight} in their moving average" in str(caught.value)
    assert f"it must be {remedies}" in str(caught.value)


def test_an_average_just_below_that_is_allowed():
    plan_training(load("TRAIN.EMA_ALPHA 0.097"), world_size=1, steps_per_epoch=10)
    with pytest.raises(ValueError, match=r"TRAIN.EMA_ALPHA = 0.097"):
        plan_training(load("TRAIN.EMA_ALPHA 0.097"), world_size=2, steps_per_epoch=10)


def test_the_example_that_the_schema_gives():
    text = (ROOT / "configs/defaults.py").read_text()
    assert "0.998 for EMA_ALPHA 1e-4 with a global batch of 256, 100" in text
    model = torch.nn.Linear(1, 1)
    ema = ema_of(model, alpha=1e-4, period=8, global_batch=256, epochs=100, warmup_updates=0)
    assert ema.decay == pytest.approx(0.998, abs=1e-4)
