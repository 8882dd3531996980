"""The learning rate at every update: golden values, and each schedule against its formula."""

import json
import math
from pathlib import Path

import pytest
import torch
from settings import settings
from torch import nn
from training_parts import schedule_of

import configs
import models
from configs.constraints import CONSTRAINTS
from engine.optimizer import build_optimizer
from engine.plan import plan_training
from engine.schedule import SCHEDULES, build_schedule

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "optimisation.json").read_text())
PUBLISHED = "MODEL.ARCH RepMLPNet-T224 TRAIN.BASE_LR 0.001 TRAIN.WARMUP_LR 5e-7 TRAIN.MIN_LR 0.0 DATA.BATCH_SIZE 32"


def published():
    """The published recipe: its configuration and the numbers of eight processes."""
    cfg = configs.load_config(None, configs.parse_opts(f"{PUBLISHED} TRAIN.EPOCHS 100 TRAIN.WARMUP_EPOCHS 10".split()))
    return cfg, plan_training(cfg, world_size=8, steps_per_epoch=GOLDEN["recipe"]["steps_per_epoch"])


def sgd(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr)


def rates(schedule, optimizer, updates) -> list[float]:
    """The learning rate after `step_update` of each update."""
    result = []
    for update in updates:
        schedule.step_update(update)
        assert len({group["lr"] for group in optimizer.param_groups}) == 1
        result.append(optimizer.param_groups[0]["lr"])
    return result


def build(optimizer, **changes):
    settings = {
        "name": "cosine",
        "total_updates": 100,
        "warmup_updates": 20,
        "warmup_lr": 0.1,
        "min_lr": 0.0,
        "decay_updates": 30,
        "milestone_updates": (30, 45, 90),
        "decay_rate": 0.5,
    }
    return schedule_of(optimizer, **settings | changes)


def test_the_published_recipe_gives_the_golden_learning_rates():
    cfg, plan = published()
    optimizer = sgd(plan.lr)
    schedule = build_schedule(optimizer, cfg.TRAIN.LR_SCHEDULER, plan)
    golden = {int(update): rate for update, rate in GOLDEN["lr_after_step_update"].items()}
    assert len(golden) == 15
    assert rates(schedule, optimizer, golden) == pytest.approx(list(golden.values()), rel=1e-12, abs=1e-28)


def test_the_golden_weight_decay_groups():
    cfg, plan = published()
    with torch.device("meta"):
        model = models.create_model(cfg.MODEL.ARCH)
    optimizer = build_optimizer(model, cfg.TRAIN, plan.lr)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {
            "weight_decay": group["weight_decay"],
            "count": len(group["params"]),
            "names": sorted(names[id(p)] for p in group["params"]),  # as the golden file has them
        }
        for group in optimizer.param_groups
    ]
    assert groups == GOLDEN["param_groups"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prefix", [False, True])
def test_the_warm_up_is_a_straight_line(name, prefix):
    optimizer = sgd(2.0)
    schedule = build(optimizer, name=name, warmup_prefix=prefix)
    expected = [0.1 + (2.0 - 0.1) * t / 20 for t in range(20)]
    assert rates(schedule, optimizer, range(20)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_with_the_warm_up_as_a_prefix_the_learning_rate_peaks_at_the_base(name):
    optimizer = sgd(2.0)
    before, at, after = rates(build(optimizer, name=name, warmup_prefix=True), optimizer, (19, 20, 21))
    rise = (2.0 - 0.1) / 20
    assert at == pytest.approx(2.0, rel=1e-12)
    assert at - before == pytest.approx(rise, rel=1e-9)
    assert 0 <= at - after < rise


def test_beneath_the_warm_up_the_cosine_has_fallen_already():
    optimizer = sgd(2.0)
    (at,) = rates(build(optimizer), optimizer, (20,))
    assert at == pytest.approx(1 + math.cos(math.pi * 20 / 100), rel=1e-12)


@pytest.mark.parametrize("lowest", [0.0, 0.25])
@pytest.mark.parametrize("prefix", [False, True])
def test_cosine_by_its_formula(lowest, prefix):
    optimizer = sgd(2.0)
    schedule = build(optimizer, min_lr=lowest, warmup_prefix=prefix)
    start, length = (20, 80) if prefix else (0, 100)
    updates = range(20, 101)
    expected = [lowest + (2.0 - lowest) * (1 + math.cos(math.pi * (t - start) / length)) / 2 for t in updates]
    assert rates(schedule, optimizer, updates) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("prefix", "start", "length"), [(False, 0, 100), (True, 20, 80)])
def test_linear_ends_at_a_hundredth(prefix, start, length):
    optimizer = sgd(2.0)
    schedule = build(optimizer, name="linear", warmup_prefix=prefix)
    updates = range(20, 101)
    expected = [2.0 * (1 - 0.99 * (t - start) / length) for t in updates]
    measured = rates(schedule, optimizer, [*updates, 130])
    assert measured[:-1] == pytest.approx(expected, rel=1e-12)
    assert measured[-1] == pytest.approx(0.02, rel=1e-12)


@pytest.mark.parametrize(("prefix", "start"), [(False, 0), (True, 20)])
def test_step_decays_by_its_rate(prefix, start):
    optimizer = sgd(2.0)
    schedule = build(optimizer, name="step", warmup_prefix=prefix)
    updates = range(20, 100)
    expected = [2.0 * 0.5 ** ((t - start) // 30) for t in updates]
    assert rates(schedule, optimizer, updates) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("lowest", [0.0, 0.25])
@pytest.mark.parametrize("power", [0.9, 2.0])
@pytest.mark.parametrize(("prefix", "start", "length"), [(False, 0, 100), (True, 20, 80)])
def test_poly_by_its_formula(lowest, power, prefix, start, length):
    optimizer = sgd(2.0)
    schedule = build(optimizer, name="poly", power=power, min_lr=lowest, warmup_prefix=prefix)
    updates = range(20, 101)
    expected = [lowest + (2.0 - lowest) * (1 - (t - start) / length) ** power for t in updates]
    measured = rates(schedule, optimizer, [*updates, 130])
    assert measured[:-1] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert measured[-1] == lowest


@pytest.mark.parametrize("prefix", [False, True])
def test_multistep_decays_from_the_update_of_each_milestone_on(prefix):
    optimizer = sgd(2.0)
    schedule = build(optimizer, name="multistep", warmup_prefix=prefix)
    updates = range(20, 130)
    expected = [2.0 * 0.5 ** sum(t >= milestone for milestone in (30, 45, 90)) for t in updates]
    assert rates(schedule, optimizer, updates) == pytest.approx(expected, rel=1e-12)


def test_the_stepped_schedule_of_the_first_paper_for_faces():
    """0.1 for 420 thousand updates of 512 images, divided by 10 at 252, 364 and 406 thousand."""
    cfg = settings(
        "TRAIN.BASE_LR 0.05 TRAIN.WARMUP_EPOCHS 0 DATA.BATCH_SIZE 64 TRAIN.EPOCHS 42 "
        "TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.MILESTONES 25.2,36.4,40.6"
    )
    plan = plan_training(cfg, world_size=8, steps_per_epoch=10_000)
    assert (plan.total_updates, plan.milestone_updates) == (420_000, (252_000, 364_000, 406_000))
    optimizer = sgd(plan.lr)
    schedule = build_schedule(optimizer, cfg.TRAIN.LR_SCHEDULER, plan)
    updates = (0, 251_999, 252_000, 363_999, 364_000, 405_999, 406_000, 419_999)
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    assert rates(schedule, optimizer, updates) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_warm_up_the_first_update_has_the_base(name):
    optimizer = sgd(2.0)
    assert rates(build(optimizer, name=name, warmup_updates=0), optimizer, (0,)) == [2.0]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_depends_on_the_update_alone(name):
    first, second = sgd(2.0), sgd(2.0)
    in_order = rates(build(first, name=name), first, range(100))
    assert rates(build(second, name=name), second, (77,)) == [in_order[77]]


def test_the_schema_allows_all_schedules_and_no_others():
    assert [*SCHEDULES] == ["cosine", "poly", "linear", "step", "multistep"]
    assert CONSTRAINTS["TRAIN.LR_SCHEDULER.NAME"].allowed == f"one of {', '.join(SCHEDULES)}"
