"""The moving average by value: a copy in the warm-up, then every few updates, with the published decay."""

import pytest
import torch
from torch import nn
from training_parts import ema_of

from engine.ema import ModelEma


def network(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    return fill(model, value)


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def average(model: nn.Module, **changes: object) -> ModelEma:
    settings = {"alpha": 0.001, "period": 4, "global_batch": 100, "epochs": 2, "warmup_updates": 8}
    return ema_of(model, **settings | changes)


def values(ema: ModelEma) -> set[float]:
    """The values of all weights and statistics that are not counters."""
    return {float(v) for t in ema.module.state_dict().values() if t.is_floating_point() for v in t.flatten()}


@pytest.mark.parametrize(
    ("alpha", "global_batch", "epochs", "period", "decay"),
    [
        (1e-5, 256, 100, 8, 1 - 1e-5 * 256 / 100 * 8),
        (0.001, 100, 2, 4, 0.8),
        (0.5, 256, 10, 8, 0.0),  # the weight of the newest value is at most 1
        (1e-4, 32, 300, 1, 1 - 1e-4 * 32 / 300),
    ],
)
def test_the_decay_scales_as_published(alpha, global_batch, epochs, period, decay):
    ema = average(network(0), alpha=alpha, global_batch=global_batch, epochs=epochs, period=period)
    assert ema.decay == pytest.approx(decay, rel=1e-12, abs=1e-12)


def test_it_starts_as_a_copy_in_evaluation_mode():
    model = network(3.0)
    ema = average(model)
    assert values(ema) == {3.0}
    assert not ema.module.training
    fill(model, 5.0)
    assert values(ema) == {3.0}


def test_it_averages_every_fourth_update_only():
    model = network(0.0)
    ema = average(model, warmup_updates=0)
    fill(model, 10.0)
    for update in (1, 2, 3, 5, 6, 7, 9):
        ema.update(model, update)
        assert values(ema) == {0.0}


def test_during_the_warm_up_it_is_a_copy():
    model = network(0.0)
    ema = average(model)
    for update in (4, 8):
        fill(model, float(update))
        ema.update(model, update)
        assert values(ema) == {float(update)}


def test_after_the_warm_up_it_averages():
    model = network(1.0)
    ema = average(model)
    expected = 1.0
    for update in (12, 16, 20):
        fill(model, float(update))
        ema.update(model, update)
        expected = 0.8 * expected + 0.2 * update
        assert sorted(values(ema)) == pytest.approx([expected] * len(values(ema)), rel=1e-12)


def test_counters_are_copied_and_statistics_averaged():
    model = network(0.0)
    ema = average(model)
    fill(model, 10.0)
    ema.update(model, 12)
    batch_norm = ema.module[1]
    assert batch_norm.num_batches_tracked.item() == 10
    torch.testing.assert_close(batch_norm.running_mean, torch.full((2,), 2.0, dtype=torch.float64))


def test_the_network_is_not_changed():
    model = network(7.0)
    ema = average(model)
    for update in range(20):
        ema.update(model, update)
    assert all((tensor == 7).all() for tensor in model.state_dict().values())
