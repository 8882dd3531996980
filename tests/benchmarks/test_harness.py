"""Times, ratios, limits, tables: by hand-made numbers, which need no clock."""

import math

import pytest
import torch
from torch import nn

import models
from benchmarks import harness, memory, work
from benchmarks.harness import Clock, Variant
from benchmarks.limits import COPIED, SIDES, Roofline
from models.fusion import fuse_batch_norms
from models.reparam import to_deploy


class HandClock(Clock):
    """Tells the time that the variants make pass."""

    time = 0.0

    def now(self) -> float:
        return HandClock.time


@pytest.fixture
def clock() -> HandClock:
    HandClock.time = 0.0
    return HandClock("wall")


def passing(seconds: list[float]):
    """Returns something to run that takes the next of these seconds each time."""
    iterator = iter(seconds)

    def run() -> None:
        HandClock.time += next(iterator)

    return run


def test_ratio_is_the_median_of_each_round() -> None:
    assert harness.ratio([4.0, 6.0, 100.0], [2.0, 2.0, 20.0]) == 3.0  # 2, 3, 5; the ratio of the medians agrees
    assert harness.ratio([1.0, 10.0, 1.0], [1.0, 5.0, 4.0]) == 1.0  # 1, 2, 1/4; that of the medians would be 1/4


def test_interleave_times_every_variant_in_every_round(clock) -> None:
    order: list[str] = []
    variants = [Variant(name, lambda name=name: order.append(name)) for name in "abcd"]
    times = harness.interleave(variants, clock, rounds=6, warmup=1)
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abcd", 6)
    rounds = ["".join(order[i : i + 4]) for i in range(4, len(order), 4)]
    assert [sorted(r) for r in rounds] == [list("abcd")] * 6
    assert len(set(rounds)) > 1, "every round has an order of its own"


def test_warmup_is_not_timed(clock) -> None:
    times = harness.interleave([Variant("a", passing([100.0, 50.0, 1.0, 2.0]))], clock, rounds=2, warmup=2)
    assert times == {"a": [1.0, 2.0]}


def test_short_runs_are_repeated(clock) -> None:
    times = harness.interleave(
        [
            Variant("a", passing([1.0, 1.0, 2.0, 3.0])),
        ],
        clock,
        rounds=1,
        warmup=1,
        min_seconds=3,
    )
    assert times == {"a": [2.0]}  # three runs of 1, 2 and 3


def test_preparation_is_not_timed(clock) -> None:
    prepared: list[int] = []

    def prepare() -> int:
        HandClock.time += 50
        prepared.append(len(prepared))
        return prepared[-1]

    def run(number: int) -> None:
        HandClock.time += number

    times = harness.interleave([Variant("a", run, prepare=prepare)], clock, rounds=2, warmup=1, min_seconds=9)
    assert times == {"a": [1.0, 2.0]}
    assert prepared == [0, 1, 2]


def test_summary() -> None:
    limits = Roofline({"fp32": 100.0, "bf16": 1000.0}, bandwidth=10.0)
    variants = [
        Variant("slow", print, flops=200, bytes=1),
        Variant("fast", print, flops=200, bytes=15, dtype="bf16"),
        Variant("unknown", print),
    ]
    times = {"slow": [4.0, 4.0, 8.0], "fast": [2.0, 3.0, 2.0], "unknown": [4.0, 4.0, 4.0]}
    slow, fast, unknown = harness.summarise(variants, times, "slow", limits)
    assert (slow["median"], slow["ratio"], slow["limit"], slow["fraction"]) == (4.0, 1.0, 2.0, 0.5)
    assert (fast["median"], fast["ratio"], fast["limit"], fast["fraction"]) == (2.0, 2.0, 1.5, 0.75)
    assert fast["seconds"] == [2.0, 3.0, 2.0]
    assert "fraction" not in unknown


@pytest.mark.parametrize("difference", [1e-3, math.inf, math.nan])
def test_a_wrong_result_stops_the_run(difference) -> None:
    with pytest.raises(ValueError, match="fused is wrong"):
        harness.check("fused", difference, 1e-4)
    assert harness.check("fused", 1e-5, 1e-4) == 1e-5


def test_rows_are_chosen_by_pattern() -> None:
    names = ["naive fp32", "ours fp32", "ours bf16"]
    assert harness.chosen(names, None) == names
    assert harness.chosen(names, ["*bf16"], "naive fp32") == ["naive fp32", "ours bf16"]
    with pytest.raises(ValueError, match="ours fp32"):
        harness.chosen(names, ["our"])


def test_clock_follows_device_and_threads() -> None:
    assert [Clock.choose(*c).kind for c in (("cpu", 1), ("cpu", 2), ("cuda", 1))] == ["cpu", "wall", "cuda"]


def test_measured_limits_are_positive(monkeypatch) -> None:
    monkeypatch.setitem(SIDES, "cpu", (64, 128))
    monkeypatch.setitem(COPIED, "cpu", 2**20)
    limits = Roofline.measure("cpu", harness.DTYPES, Clock("cpu").now, seconds=0.01)
    assert set(limits.peak) == {"fp32", "bf16"}
    assert all(0 < value < math.inf for value in (*limits.peak.values(), limits.bandwidth))
    twice = Roofline({dtype: 2 * value for dtype, value in limits.peak.items()}, limits.bandwidth / 2)
    assert limits.best(twice) == Roofline(twice.peak, limits.bandwidth)


def test_flops_of_all_forms_agree() -> None:
    model = models.create_model("RepMLPNet-Digits").eval()
    deploy = to_deploy(model)
    counts = [work.count_flops(m, (4, 3, 16, 16)) for m in (deploy, fuse_batch_norms(model), model)]
    assert counts[0] == counts[1]
    assert counts[2] > counts[0], "the training structure has branches"
    assert work.count_flops(deploy, (8, 3, 16, 16)) == 2 * counts[0]


def test_flops_of_products_by_hand() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_zeros(3, 5).addmm_(x, self.weight) + x.new_zeros(1, 3, 5).baddbmm_(x[None], self.weight[None])

    assert work.count_flops(Products(), (3, 4)) == 2 * (2 * 3 * 4 * 5)


def test_bytes_by_hand() -> None:
    model = models.create_model("RepMLPNet-Digits", num_classes=10)
    maps = 32 * 8 * 8 + 64 * 4 * 4
    assert work.stage_elements(model, (16, 16)) == maps
    weights = sum(p.numel() for p in model.parameters())
    assert work.inference_bytes(model, 2, (16, 16), 4) == 4 * (weights + 2 * (3 * 256 + 2 * maps + 10))
    for width in (4, 2):
        expected = 4 * (9 * weights + 2 * 3 * 256) + width * 2 * 4 * maps
        assert work.training_bytes(model, 2, (16, 16), width) == expected
    with pytest.raises(ValueError, match="Linear"):
        work.stage_elements(nn.Linear(1, 1), (16, 16))


def test_extra_peak_sees_what_is_given_back() -> None:
    assert 60 * 2**20 < memory.extra_peak(lambda: torch.ones(2**24).sum()) < 90 * 2**20
