"""The training loop: accumulation, clipping, seeds, bookkeeping, mixed precision, unreadable images."""

import itertools
import json
import logging
import math
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from settings import settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from training_parts import checkpoint_folder, ema_of, optimizer_of, resume, schedule_of

import data
import models
from data import Batch
from engine.optimizer import OPTIMIZERS
from engine.trainer import Trainer
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
    optimizer = optimizer_of(model, name="sgd", lr=1.0, weight_decay=0.0, momentum=0.0)
    schedule = schedule_of(optimizer, name="linear", total_updates=6, warmup_updates=2)
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
    cfg = settings(
        "DATA.DATASET digits DATA.DATA_PATH digits DATA.BATCH_SIZE 100 DATA.NUM_WORKERS 0 "
        f"AUG.PRESET shift AUG.MIXUP {mixup} AUG.CUTMIX {mixup}"
    )
    source = data.open_source(cfg.DATA, "train")
    loader = data.build_train_loader(source, data.train_transform((16, 16), cfg.AUG), cfg.DATA, seed=seed)
    loader.set_position(0)
    augmentation = data.build_batch_augmentation(
        cfg.AUG, num_classes=10, batch_size=100, label_smoothing=0.1, seed=seed
    )
    optimizer = optimizer_of(model, name="adamw", lr=0.001, weight_decay=0.05)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1) if augmentation is None else SoftTargetCrossEntropy()
    parts = {"optimizer": optimizer, "criterion": criterion, "batch_augmentation": augmentation, "seed": seed}
    trainer_of(model, **parts).train_epoch(itertools.islice(loader, 3))
    return weights(model)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(trainer_of):
    first = digits_run(trainer_of, 1)
    torch.rand(7)  # earlier draws do not matter
    again, other, plain = digits_run(trainer_of, 1), digits_run(trainer_of, 2), digits_run(trainer_of, 1, mixup=0.0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))


@pytest.mark.parametrize("epoch", [0, 3])
def test_the_network_sees_the_images_of_randaugment_each_time_the_same(plain_network, trainer_of, batch_of, epoch):
    """Passes without effect see a batch before the update does, and on a CPU it is not copied."""
    cfg = settings("AUG.PRESET raug15 AUG.DEVICE gpu").AUG
    policy = data.build_rand_augment(cfg, torch.device("cpu"), interpolation="bilinear", seed=5)
    trainer, batch = trainer_of(plain_network(), rand_augment=policy), batch_of(8)
    trainer.progress.epoch = epoch
    batch = batch._replace(indices=torch.tensor([7, 6, 5, 40, 41, 42, 0, 1]))
    augmented = policy(batch.images.clone(), batch.indices, epoch=epoch)
    assert not torch.equal(augmented, batch.images)
    for _ in range(2):
        assert torch.equal(trainer.inputs(batch), trainer.normalize(augmented))
    seen = []
    trainer.forward.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer.train_epoch([batch])
    assert torch.equal(seen[0], trainer.normalize(augmented))


def test_training_leaves_the_network_in_training_mode_and_updates_statistics(trainer_of, batch_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)).eval()
    trainer_of(model).train_epoch([batch_of(8), batch_of(8, seed=1)])
    assert model.training
    assert model[0].num_batches_tracked.item() == 2


def test_the_moving_average_sees_every_update(plain_network, trainer_of, batch_of):
    model = plain_network()
    ema = ema_of(model, alpha=0.1, period=2, global_batch=5, epochs=1, warmup_updates=0)
    assert ema.decay == 0.0  # so that it is the network after each second update
    trainer = trainer_of(model, ema=ema)
    trainer.train_epoch(batch_of(5, seed=number) for number in range(2))
    after_two = weights(model)
    trainer.train_epoch([batch_of(5, seed=2)])
    assert all(torch.equal(a, b) for a, b in zip(weights(ema.module), after_two, strict=True))
    assert largest_difference(weights(model), after_two) > 0


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("second", LAYOUTS, ids=str)
@pytest.mark.parametrize("first", LAYOUTS, ids=str)
def test_the_layout_in_memory_changes_nothing_even_in_the_middle_of_a_run(
    plain_network, trainer_of, batch_of, tmp_path, first, second, accumulation, name
):
    """The fused optimizers iterate over memory, not over indices: all tensors need the same layout."""
    batches = [batch_of(5, seed=number) for number in range(4 * accumulation)]

    def build(layout: torch.memory_format) -> Trainer:
        model = plain_network().to(memory_format=layout)
        optimizer = optimizer_of(model, name=name, lr=0.05, weight_decay=0.1)
        return trainer_of(model, optimizer=optimizer, accumulation=accumulation, clip_grad=1.0)

    straight = build(torch.contiguous_format)
    straight.train_epoch(batches)
    stopped, resumed = build(first), build(second)
    stopped.train_epoch(batches, lambda: stopped.progress.update == 2)
    checkpoint_folder(tmp_path, keep=1).save(stopped)
    resume(resumed, tmp_path / "latest.pth")
    resumed.train_epoch(batches[2 * accumulation :])
    assert resumed.network[0].weight.is_contiguous(memory_format=second)
    torch.testing.assert_close(weights(resumed.network), weights(straight.network), rtol=1e-12, atol=1e-14)
    for own, other in zip(resumed.optimizer.state.values(), straight.optimizer.state.values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)


def test_half_precision_scales_the_loss_and_trains(trainer_of, batch_of):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    before = deepcopy(model.state_dict())
    trainer = trainer_of(model, dtype=torch.float16, clip_grad=1.0)
    assert trainer.scaler.is_enabled()
    trainer.train_epoch([batch_of(8), batch_of(8, seed=1)])
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not torch.equal(before["1.weight"], model.state_dict()["1.weight"])


def records(folder: Path, kind: str) -> list[dict]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in every if record["kind"] == kind]


def test_the_log_and_the_metrics_have_a_record_each_few_updates_and_each_epoch(
    plain_network, trainer_of, batch_of, caplog: pytest.LogCaptureFixture, tmp_path: Path, metrics: MetricsWriter
):
    trainer = trainer_of(plain_network(), print_freq=2, metrics=metrics)
    with caplog.at_level(logging.INFO, logger="tests.engine"):
        trainer.train_epoch(batch_of(5, seed=number) for number in range(5))
    every = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["update"]) for record in every] == [("train", 2), ("train", 4), ("train_epoch", 5)]
    assert all(record["lr"] == 0.1 and record["loss"] > 0 and record["grad_norm"] > 0 for record in every[:2])
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("Train: [0/10][2/5]")
    assert re.fullmatch(rf"Epoch 0 train: loss {every[2]['loss']:.4f}  [\d.]+ img/s", lines[2])


def losses_of(model: nn.Module, batches: list[Batch]) -> list[float]:
    return [
        nn.functional.cross_entropy(model((batch.images.double() / 255 - 0.5) / 0.25), batch.labels).item()
        for batch in batches
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_recorded_losses_are_the_means_since_the_last_record_and_over_the_epoch(
    plain_network, trainer_of, batch_of, tmp_path: Path, metrics, accumulation
):
    model = plain_network()
    frozen = optimizer_of(model, name="sgd", lr=0.0, weight_decay=0.0)
    batches = [batch_of(5, seed=number) for number in range(6 * accumulation)]
    trainer = trainer_of(model, optimizer=frozen, print_freq=2, metrics=metrics, accumulation=accumulation)
    trainer.train_epoch(batches[: 3 * accumulation])
    trainer.train_epoch(batches[3 * accumulation :])
    losses, lap = losses_of(model, batches), 2 * accumulation
    means = [sum(losses[i : i + lap]) / lap for i in range(0, 3 * lap, lap)]
    assert [record["loss"] for record in records(tmp_path, "train")] == pytest.approx(means, rel=1e-12)
    halves = [sum(half) / len(half) for half in (losses[: 3 * accumulation], losses[3 * accumulation :])]
    epochs = records(tmp_path, "train_epoch")
    assert [record["loss"] for record in epochs] == pytest.approx(halves, rel=1e-12)
    assert [(record["epoch"], record["update"]) for record in epochs] == [(0, 3), (1, 6)]


def test_batches_of_different_sizes_count_by_their_images(plain_network, trainer_of, batch_of, tmp_path, metrics):
    model = plain_network()
    frozen = optimizer_of(model, name="sgd", lr=0.0, weight_decay=0.0)
    batches = [batch_of(2), batch_of(6, seed=1)]
    trainer_of(model, optimizer=frozen, print_freq=2, metrics=metrics).train_epoch(batches)
    first, second = losses_of(model, batches)
    for kind in ("train", "train_epoch"):
        assert records(tmp_path, kind)[0]["loss"] == pytest.approx((2 * first + 6 * second) / 8, rel=1e-12)


def test_a_record_has_the_learning_rate_of_the_update_before_it(plain_network, trainer_of, batch_of, tmp_path, metrics):
    model = plain_network()
    optimizer = optimizer_of(model, name="sgd", lr=1.0, weight_decay=0.0)
    schedule = schedule_of(optimizer, name="linear", total_updates=100, warmup_updates=4)
    trainer = trainer_of(model, optimizer=optimizer, schedule=schedule, print_freq=2, metrics=metrics)
    trainer.train_epoch(batch_of(5, seed=number) for number in range(4))
    assert [(r["update"], r["lr"]) for r in records(tmp_path, "train")] == [(2, 0.25), (4, 0.75)]


@pytest.mark.parametrize("clip", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_recorded_norm_is_that_of_the_gradient_before_clipping_and_without_scale(
    trainer_of, batch_of, tmp_path, metrics, clip, dtype, accumulation
):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    frozen, reference = optimizer_of(model, name="sgd", lr=0.0, weight_decay=0.0), deepcopy(model)
    settings = {"dtype": dtype, "clip_grad": clip, "accumulation": accumulation, "print_freq": 2, "metrics": metrics}
    batches, norms = [batch_of(5, seed=number) for number in range(2 * accumulation)], []
    trainer_of(model, optimizer=frozen, **settings).train_epoch(batches)
    for i in range(0, len(batches), accumulation):
        everything = joined(batches[i : i + accumulation])
        loss = nn.functional.cross_entropy(reference((everything.images / 255 - 0.5) / 0.25), everything.labels)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        norms.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
    (record,) = records(tmp_path, "train")
    assert record["grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-5 if dtype is None else 0.02)


def test_a_record_of_skipped_updates_has_no_loss(trainer_of, batch_of, tmp_path, metrics):
    class Broken(nn.CrossEntropyLoss):
        def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return super().forward(input, target) * torch.nan

    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    trainer_of(model, criterion=Broken(), print_freq=2, max_skipped=2, metrics=metrics).train_epoch(
        batch_of(5, seed=number) for number in range(2)
    )
    (train,), (epoch,) = records(tmp_path, "train"), records(tmp_path, "train_epoch")
    assert (train["loss"], train["grad_norm"], epoch["loss"]) == (None, None, None)


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def batches(self, batches: Iterable[Batch], seconds: float) -> Iterator[Batch]:
        """Takes so long for each of the batches, as a network does."""
        for batch in batches:
            self.now += seconds
            yield batch


def rates(lines: list[str]) -> list[tuple[str, float]]:
    """The eta (for an epoch its number) and the rate in each line of a log."""
    found = (re.search(r"(?:eta (\S+)|Epoch (\d+) train:) .*?([\d.]+|nan) img/s", line) for line in lines)
    return [(match[1] or match[2], float(match[3])) for match in found if match]


@pytest.fixture
def clocked(trainer_of, plain_network, monkeypatch, caplog):
    """Returns a function that trains epochs of batches of 4 images, and what was logged of the pace."""
    caplog.set_level(logging.INFO, logger="tests.engine")
    clock = Clock(monkeypatch)

    def train(
        epochs: list[list[Batch]],
        seconds: tuple[float, ...],
        after_update: Callable[[Trainer], object] = lambda trainer: None,
        **settings: object,
    ) -> list[tuple[str, float]]:
        caplog.clear()
        trainer = trainer_of(plain_network(), epochs=10, **settings)
        for batches, pause in zip(epochs, seconds, strict=True):
            trainer.train_epoch(clock.batches(batches, pause), lambda: bool(after_update(trainer)))
            clock.now += 500.0  # an evaluation
        return rates([record.getMessage() for record in caplog.records])

    train.clock = clock
    return train


def test_rates_count_images_and_seconds_of_the_same_updates(clocked, batch_of):
    """Five updates an epoch, a report each three: the second one lies in both epochs, of 0.5 and 2 seconds a batch."""
    epochs = [[batch_of(4)] * 5] * 2
    assert clocked(epochs, (0.5, 2.0), print_freq=3) == [
        ("0:00:23", 4 / 0.5),  # 47 updates left
        ("0", 4 / 0.5),
        ("0:00:44", 4 / 1.0),  # two of 0.5 seconds and one of 2: 1 second each, 44 left
        ("0:01:22", 4 / 2.0),  # 41 left
        ("1", 4 / 2.0),
    ]


def test_a_run_shorter_than_a_report_has_a_line_for_its_epochs(clocked, batch_of):
    assert clocked([[batch_of(4)] * 3] * 2, (0.5, 0.25), print_freq=10) == [("0", 8.0), ("1", 16.0)]


def test_an_accumulated_update_counts_all_of_its_images(clocked, batch_of):
    """Two updates of 12 images and 1.5 seconds; the eighth batch fills no third, but was waited for."""
    settings = {"accumulation": 3, "print_freq": 2, "updates_per_epoch": 2}
    first, epoch = clocked([[batch_of(4)] * 7], (0.5,), **settings)
    assert first == ("0:00:27", 8.0)  # 18 updates left
    assert epoch == ("0", pytest.approx(24 / 3.5, abs=0.1))


def test_saving_is_not_timed(clocked, batch_of):
    def save(trainer: Trainer) -> None:
        trainer.check_skipped()  # as a checkpoint does before it is written
        clocked.clock.now += 1000.0

    assert clocked([[batch_of(4)] * 5], (0.5,), save, print_freq=2) == [("0:00:24", 8.0), ("0:00:23", 8.0), ("0", 8.0)]


def test_rates_of_a_resumed_run_count_from_the_resume(clocked, trainer_of, plain_network, batch_of, tmp_path, caplog):
    batches, clock = [batch_of(4, seed=number) for number in range(10)], clocked.clock
    first, second = [trainer_of(plain_network(), print_freq=4, updates_per_epoch=10) for _ in range(2)]
    first.train_epoch(clock.batches(batches, 0.5), lambda: first.progress.update == 6)
    checkpoint_folder(tmp_path, keep=1).save(first)
    resume(second, tmp_path / "latest.pth")
    caplog.clear()
    second.train_epoch(clock.batches(batches[6:], 2.0))
    lines = [record.getMessage() for record in caplog.records]
    assert rates(lines) == [("0:03:04", 2.0), ("0", 2.0)]  # 92 updates left


def test_an_epoch_without_an_update_since_the_resume_has_a_mean_but_no_rate(
    clocked, trainer_of, plain_network, batch_of, tmp_path, caplog, metrics
):
    """It was stopped after its last update, before it had ended."""
    batches = [batch_of(4, seed=number) for number in range(3)]
    first = trainer_of(plain_network(), updates_per_epoch=3)
    first.train_epoch(batches, lambda: first.progress.update == 3)
    checkpoint_folder(tmp_path, keep=1).save(first)
    mean = first.meters["epoch_loss"].compute()
    second = trainer_of(plain_network(), updates_per_epoch=3, metrics=metrics)
    resume(second, tmp_path / "latest.pth")
    caplog.clear()
    assert second.train_epoch([])
    assert [record["loss"] for record in records(tmp_path, "train_epoch")] == [mean]
    assert [record.getMessage() for record in caplog.records] == [f"Epoch 0 train: loss {mean:.4f}  nan img/s"]


def test_the_curves_have_the_rates_and_the_records_have_not(clocked, batch_of, tmp_path, metrics):
    clocked([[batch_of(4)] * 5], (0.5,), print_freq=2, metrics=metrics)
    metrics.close()
    curves = EventAccumulator(str(tmp_path)).Reload()
    for kind, steps in (("train", [2, 4]), ("train_epoch", [5])):
        found = [(event.step, event.value) for event in curves.Scalars(f"{kind}/images_per_second")]
        assert found == [(step, 8.0) for step in steps]
        assert all("images_per_second" not in record for record in records(tmp_path, kind))


def test_the_peak_memory_is_in_mebibytes(clocked, batch_of, caplog):
    clocked([[batch_of(4)] * 2], (0.5,), print_freq=2)
    match = re.search(r"mem (\d+) MiB", caplog.text)
    assert match is not None
    assert int(match[1]) == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.2)


def test_unreadable_images_are_named_once_and_too_many_end_the_run(
    plain_network, trainer_of, batch_of, caplog: pytest.LogCaptureFixture
):
    trainer = trainer_of(plain_network(), max_unreadable=1)
    with caplog.at_level(logging.WARNING, logger="tests.engine"):
        trainer.train_epoch([batch_of(4, unreadable=("a.png: cut off",)), batch_of(4, unreadable=("a.png: cut off",))])
    assert [record.getMessage() for record in caplog.records] == ["unreadable image replaced: a.png: cut off"]
    with pytest.raises(ValueError, match=r"DATA\.MAX_UNREADABLE is 1; the last one is b\.png: cut off"):
        trainer.train_epoch([batch_of(4, unreadable=("b.png: cut off",))])


def test_no_image_may_be_unreadable_with_a_limit_of_zero(plain_network, trainer_of, batch_of):
    with pytest.raises(ValueError, match="1 training images can't be read"):
        trainer_of(plain_network()).train_epoch([batch_of(4, unreadable=("a.png: cut off",))])


def test_eta_and_rate_are_consistent(plain_network, trainer_of, batch_of, caplog: pytest.LogCaptureFixture):
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
    line, _ = (record.getMessage() for record in caplog.records)  # the other one is of the epoch
    hours, minutes, seconds = map(int, re.search(r"eta (\d+):(\d+):(\d+)", line).groups())
    rate = float(re.search(r"([\d.]+) img/s", line)[1])
    assert 20 / took < rate < 20 / (4 * 0.03)
    assert (3600 * hours + 60 * minutes + seconds) * rate / 5 == pytest.approx(5000 - 3004, rel=0.03)
