"""The training loop: accumulation, clipping, seeds, bookkeeping, mixed precision, unreadable images."""

import itertools
import json
import logging
import math
import re
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import models
from data import Batch, build_mixing
from engine.ema import ModelEma
from engine.loss import build_loss
from engine.optimizer import build_optimizer
from engine.schedule import build_schedule
from utils.log import MetricsWriter
from utils.seed import seed_everything


def joined(batches: list[Batch]) -> Batch:
    """One batch of all images."""
    images, labels, indices = (torch.cat(parts) for parts in zip(*(b[:3] for b in batches), strict=True))
    return Batch(images, labels, indices, [])


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("clip", [0.0, 0.2, 1000.0])
@pytest.mark.parametrize("accumulation", [2, 3])
def test_accumulated_batches_are_one_large_batch(plain_network, trainer_of, batch_of, accumulation, clip):
    batches = [batch_of(5, seed=number) for number in range(3 * accumulation)]
    small, large = plain_network(), plain_network()
    trainer_of(small, accumulation=accumulation, clip_grad=clip).train_epoch(batches)
    groups = [joined(batches[i : i + accumulation]) for i in range(0, len(batches), accumulation)]
    trainer_of(large, clip_grad=clip).train_epoch(groups)
    assert largest_difference(weights(small), weights(large)) < 1e-12
    assert largest_difference(weights(small), weights(plain_network())) > 1e-3


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_one_update_by_hand(plain_network, trainer_of, batch_of, clip):
    model, reference = plain_network(), plain_network()
    trainer = trainer_of(model, accumulation=2, clip_grad=clip)
    batches = [batch_of(5, seed=1), batch_of(5, seed=2)]
    trainer.train_epoch(batches)
    everything = joined(batches)
    images = (everything.images.double() / 255 - 0.5) / 0.25
    nn.functional.cross_entropy(reference(images), everything.labels).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
    assert norm > 0.2
    share = min(1.0, clip / norm) if clip else 1.0
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        decay = 0.01 if other.dim() > 1 else 0.0
        gradient = share * other.grad + decay * other
        # The first step of Nesterov momentum 0.9 goes 1.9 times the gradient.
        torch.testing.assert_close(own, other - 0.1 * 1.9 * gradient, rtol=1e-5 if clip else 1e-11, atol=1e-7)


def test_the_last_batches_that_fill_no_update_are_left_out(plain_network, trainer_of, batch_of):
    seven, six = plain_network(), plain_network()
    batches = [batch_of(4, seed=number) for number in range(7)]
    trainer_of(seven, accumulation=3).train_epoch(batches)
    trainer_of(six, accumulation=3).train_epoch(batches[:6])
    assert all(torch.equal(a, b) for a, b in zip(weights(seven), weights(six), strict=True))


def test_each_update_has_the_learning_rate_of_the_schedule(plain_network, trainer_of, batch_of):
    model = plain_network()
    optimizer = build_optimizer(model, name="sgd", lr=1.0, weight_decay=0.0, momentum=0.0)
    schedule = build_schedule(
        optimizer,
        name="linear",
        total_updates=6,
        warmup_updates=2,
        warmup_lr=0.0,
        min_lr=0.0,
        decay_updates=1,
        decay_rate=1.0,
    )
    trainer = trainer_of(model, optimizer=optimizer, schedule=schedule, updates_per_epoch=3)
    seen = []
    optimizer.register_step_post_hook(lambda used, *_: seen.append(used.param_groups[0]["lr"]))
    for _ in range(2):
        trainer.train_epoch([batch_of(4, seed=number) for number in range(3)])
    assert seen == pytest.approx([0.0, 0.5, *(1 - 0.99 * t / 6 for t in range(2, 6))], rel=1e-12)


def test_progress_counts_images_and_updates(plain_network, trainer_of, batch_of):
    trainer = trainer_of(plain_network(), accumulation=2)
    seen = []

    def batches():
        for number in range(6):
            progress = trainer.progress
            seen.append((progress.epoch, progress.consumed, progress.update))
            yield batch_of(5, seed=number)

    trainer.train_epoch(batches())
    assert seen == [(0, 0, 0), (0, 0, 0), (0, 10, 1), (0, 10, 1), (0, 20, 2), (0, 20, 2)]
    assert (trainer.progress.epoch, trainer.progress.consumed, trainer.progress.update) == (1, 0, 3)
    trainer.train_epoch(batch_of(5, seed=number) for number in range(4))
    assert (trainer.progress.epoch, trainer.progress.consumed, trainer.progress.update) == (2, 0, 5)


def digits_run(trainer_of, seed: int, *, mixup: float = 0.4) -> list[torch.Tensor]:
    """Three updates of a network with drop path, mixing and shifted images; returns the weights."""
    seed_everything(seed)
    model = models.create_model("RepMLPNet-Digits", 10, drop_path_rate=0.2)
    loader = data.build_train_loader(
        data.open_source("digits", "digits", "train"),
        data.train_transform((16, 16), preset="shift"),
        batch_size=100,
        seed=seed,
    )
    loader.sampler.set_position(0)
    mixing = build_mixing(num_classes=10, batch_size=100, mixup=mixup, cutmix=mixup, seed=seed)
    optimizer = build_optimizer(model, name="adamw", lr=0.001, weight_decay=0.05)
    criterion = build_loss(mixing is not None, 0.1)
    trainer_of(model, optimizer=optimizer, criterion=criterion, mixing=mixing, seed=seed).train_epoch(
        itertools.islice(loader, 3)
    )
    return weights(model)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(trainer_of):
    first = digits_run(trainer_of, 1)
    torch.rand(7)  # whatever was drawn before does not matter
    again, other, plain = digits_run(trainer_of, 1), digits_run(trainer_of, 2), digits_run(trainer_of, 1, mixup=0.0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))


def test_training_leaves_the_network_in_training_mode_and_updates_statistics(trainer_of, batch_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).eval()
    trainer_of(model).train_epoch([batch_of(8), batch_of(8, seed=1)])
    assert model.training
    assert model[0].num_batches_tracked.item() == 2


def test_the_moving_average_sees_every_update(plain_network, trainer_of, batch_of):
    model = plain_network()
    ema = ModelEma(model, alpha=0.1, period=2, global_batch=5, epochs=1, warmup_updates=0)
    assert ema.decay == 0.0  # so that it is the network after each second update
    trainer = trainer_of(model, ema=ema)
    trainer.train_epoch(batch_of(5, seed=number) for number in range(2))
    after_two = weights(model)
    trainer.train_epoch([batch_of(5, seed=2)])
    assert all(torch.equal(a, b) for a, b in zip(weights(ema.module), after_two, strict=True))
    assert largest_difference(weights(model), after_two) > 0


def test_half_precision_scales_the_loss_and_trains(trainer_of, batch_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    before = deepcopy(model.state_dict())
    trainer = trainer_of(model, dtype=torch.float16, clip_grad=1.0)
    assert trainer.scaler.is_enabled()
    trainer.train_epoch([batch_of(8), batch_of(8, seed=1)])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(before["1.weight"], model.state_dict()["1.weight"])


def test_the_log_and_the_metrics_have_a_record_each_few_updates(
    plain_network, trainer_of, batch_of, caplog: pytest.LogCaptureFixture, tmp_path: Path, metrics: MetricsWriter
):
    trainer = trainer_of(plain_network(), print_freq=2, metrics=metrics)
    with caplog.at_level(logging.INFO, logger="tests.engine"):
        trainer.train_epoch(batch_of(5, seed=number) for number in range(5))
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["update"] for record in records] == [2, 4]
    assert {record["kind"] for record in records} == {"train"}
    assert all(record["lr"] == 0.1 and record["loss"] > 0 and record["grad_norm"] > 0 for record in records)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("Train: [0/10][2/5]")


def test_the_recorded_loss_is_the_mean_since_the_last_record(
    plain_network, trainer_of, batch_of, tmp_path: Path, metrics
):
    model = plain_network()
    frozen = build_optimizer(model, name="sgd", lr=0.0, weight_decay=0.0)
    batches = [batch_of(5, seed=number) for number in range(4)]
    trainer_of(model, optimizer=frozen, print_freq=2, metrics=metrics).train_epoch(batches)
    losses = []
    for batch in batches:
        images = (batch.images.double() / 255 - 0.5) / 0.25
        losses.append(nn.functional.cross_entropy(model(images), batch.labels).item())
    records = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-12)


def test_unreadable_images_are_named_once_and_too_many_end_the_run(
    plain_network, trainer_of, batch_of, caplog: pytest.LogCaptureFixture
):
    trainer = trainer_of(plain_network(), max_unreadable=1)
    with caplog.at_level(logging.WARNING, logger="tests.engine"):
        trainer.train_epoch([batch_of(4, unreadable=("a.png: cut off",)), batch_of(4, unreadable=("a.png: cut off",))])
    assert [record.getMessage() for record in caplog.records] == ["unreadable image replaced: a.png: cut off"]
    with pytest.raises(ValueError, match=r"DATA\.MAX_UNREADABLE is 1; the last one is b\.png: cut off"):
        trainer.train_epoch([batch_of(4, unreadable=("b.png: cut off",))])


def test_none_may_be_unreadable_where_the_limit_is_zero(plain_network, trainer_of, batch_of):
    with pytest.raises(ValueError, match="1 training images can't be read"):
        trainer_of(plain_network()).train_epoch([batch_of(4, unreadable=("a.png: cut off",))])


def test_the_time_that_is_left_and_the_rate_follow_from_each_other(
    plain_network, trainer_of, batch_of, caplog: pytest.LogCaptureFixture
):
    trainer = trainer_of(plain_network(), print_freq=4, epochs=1000)  # of 5 updates, of 5 images each
    trainer.progress.epoch, trainer.progress.update = 600, 3000

    def slow() -> Iterator[Batch]:
        for number in range(4):
            time.sleep(0.03)
            yield batch_of(5, seed=number)

    began = time.monotonic()
    with caplog.at_level(logging.INFO, logger="tests.engine"):
        trainer.train_epoch(slow())
    took = time.monotonic() - began
    (line,) = (record.getMessage() for record in caplog.records)
    hours, minutes, seconds = map(int, re.search(r"eta (\d+):(\d+):(\d+)", line).groups())
    rate = float(re.search(r"([\d.]+) img/s", line)[1])
    assert 20 / took < rate < 20 / (4 * 0.03)
    assert (3600 * hours + 60 * minutes + seconds) * rate / 5 == pytest.approx(5000 - 3004, rel=0.03)
