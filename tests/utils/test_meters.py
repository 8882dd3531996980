"""Sums on the device, seeds by key, and the pace of a training."""

import math
import random
import time

import numpy as np
import pytest
import torch

from utils.meters import Mean, Pace
from utils.seed import keyed_rng, local_rng, seed_everything


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


def test_the_mean_of_nothing_is_no_number():
    assert math.isnan(mean().compute())
    meter = mean()
    meter.add(torch.tensor(float("nan")))
    assert math.isnan(meter.compute())


def test_a_mean_goes_on_from_its_state():
    first, second = mean(), mean()
    first.add(torch.tensor(1.0), 3)
    second.add(torch.tensor(100.0))  # which is forgotten
    second.load_state(first.state())
    second.add(torch.tensor(5.0))
    assert second.compute() == 2.0


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


def test_a_pace_counts_the_seconds_between_start_and_stop(monkeypatch: pytest.MonkeyPatch):
    now = iter((10.0, 13.0, 100.0, 101.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    pace = Pace()
    pace.start()
    pace.start()  # without effect: it has been started
    pace.add(20)
    pace.stop()
    pace.stop()  # likewise
    assert (pace.updates, pace.images) == (1, 20)
    assert (pace.seconds_per_update, pace.images_per_second) == (3.0, 20 / 3)
    pace.start()
    pace.add(12)
    pace.stop()
    assert (pace.seconds_per_update, pace.images_per_second) == (2.0, 8.0)


def test_a_pace_begins_anew():
    pace = Pace()
    pace.start()
    pace.add(20)
    time.sleep(0.01)
    pace.stop()
    assert pace.seconds_per_update >= 0.01
    pace.reset()
    assert (pace.updates, pace.images) == (0, 0)
    pace.stop()  # it does not run any more
    assert math.isnan(pace.seconds_per_update)
    assert math.isnan(pace.images_per_second)


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


def test_local_generators_depend_on_their_key_alone():
    state = random.getstate()
    keys = [(1, 23), (12, 3), (0, 0, 1), (0, 1, 0), (1, 0, 0), (5,), (2**32 - 1, 0, 7)]
    draws = [local_rng(*key).random() for key in keys]
    assert [local_rng(*key).random() for key in reversed(keys)] == draws[::-1]
    assert len({*draws}) == len(keys)
    assert random.getstate() == state


def test_local_generators_of_similar_keys_are_independent():
    draws = np.array([[local_rng(0, epoch, index).random() for index in range(100)] for epoch in range(20)])
    assert draws.mean() == pytest.approx(0.5, abs=0.03)
    assert np.abs(np.corrcoef(draws) - np.eye(20)).max() < 0.45
    assert np.abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.1
