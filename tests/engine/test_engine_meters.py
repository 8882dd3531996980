"""Sums on the device, seeds by key, and a stopwatch."""

import random
import time

import numpy as np
import pytest
import torch

from utils.meters import Mean, Stopwatch
from utils.seed import keyed_rng, seed_everything


def mean() -> Mean:
    return Mean(torch.device("cpu"))


def test_a_weighted_mean():
    meter = mean()
    meter.add(torch.tensor(1.0), 3)
    meter.add(torch.tensor(5.0))
    assert meter.compute() == 2.0
    assert meter.compute() == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_left_out(value):
    meter = mean()
    meter.add(torch.tensor(2.0), 4)
    meter.add(torch.tensor(value), 100)
    meter.add(torch.tensor(8.0), 4)
    assert meter.compute() == 5.0


def test_nothing_has_the_mean_zero():
    assert mean().compute() == 0.0
    meter = mean()
    meter.add(torch.tensor(float("nan")))
    assert meter.compute() == 0.0


def test_a_million_small_numbers_do_not_get_lost():
    meter = mean()
    meter.add(torch.tensor(1e8), 1)
    for _ in range(1000):
        meter.add(torch.tensor(1e-3))
    assert meter.compute() == pytest.approx((1e8 + 1) / 1001, rel=1e-12)


def test_no_graph_is_kept():
    meter = mean()
    meter.add((torch.ones(1, requires_grad=True) * 3).sum())
    assert meter.compute() == 3.0


def test_laps():
    watch = Stopwatch()
    time.sleep(0.02)
    first = watch.lap()
    assert first >= 0.02
    assert watch.lap() < first


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_key_decides_all_three_generators():
    drawn = {}
    for key in ((0, 0), (0, 1), (1, 0), (1, 1), (2**32 - 1, 0)):
        seed_everything(*key)
        drawn[key] = draws()
        seed_everything(*key)
        assert draws() == drawn[key]
    for position in range(3):
        assert len({values[position] for values in drawn.values()}) == len(drawn)


def test_keyed_draws_leave_the_generators_where_they_were():
    seed_everything(7)
    expected = [draws(), draws()]
    seed_everything(7)
    first = draws()
    with keyed_rng(3, 4):
        inside = draws()
    assert [first, draws()] == expected
    with keyed_rng(3, 4):
        assert draws() == inside


def test_the_generators_are_restored_after_an_error():
    seed_everything(7)
    expected = draws()
    seed_everything(7)
    with pytest.raises(KeyError), keyed_rng(3, 4):
        raise KeyError
    assert draws() == expected
