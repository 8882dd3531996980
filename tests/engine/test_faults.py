"""What goes wrong in a long run: broken numbers, stops within an epoch, damaged files, two runs at once."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_parts import checkpoint_folder, optimizer_of, resume

from data import Batch
from engine.checkpoint import clear_leftovers, newest
from engine.optimizer import OPTIMIZERS
from utils.lock import folder_lock
from utils.log import MetricsWriter

ROOT = Path(__file__).parents[2]
LOGGER = logging.getLogger("tests.engine")


class Spoiling(nn.Module):
    """A cross-entropy that spoils some of its calls, counted from 0."""

    def __init__(self, *spoilt: int, value: float = float("nan")) -> None:
        super().__init__()
        self.spoilt, self.value, self.calls = spoilt, value, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, labels)
        self.calls += 1
        return loss * self.value if self.calls - 1 in self.spoilt else loss


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))


def learnt(model: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics, without the counters."""
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("spoilt", [(0,), (1,), (0, 2)])
def test_a_skipped_update_changes_nothing(trainer_of, batch_of, name, spoilt, value):
    batches = [batch_of(8, seed=number) for number in range(4)]
    broken, whole = network(), network()
    trainer = trainer_of(
        broken,
        optimizer=optimizer_of(broken, name=name, lr=0.01, weight_decay=0.1),
        criterion=Spoiling(*spoilt, value=value),
        max_skipped=5,
    )
    trainer.train_epoch(batches)
    optimizer = optimizer_of(whole, name=name, lr=0.01, weight_decay=0.1)
    trainer_of(whole, optimizer=optimizer).train_epoch(b for i, b in enumerate(batches) if i not in spoilt)
    assert same(learnt(broken), learnt(whole))
    assert trainer.progress.skipped == len(spoilt)
    assert trainer.progress.update == 4


def test_a_skipped_update_is_logged_with_its_images(trainer_of, batch_of, caplog: pytest.LogCaptureFixture):
    trainer = trainer_of(network(), criterion=Spoiling(1), max_skipped=5, locate=lambda index: f"image-{index}.png")
    with caplog.at_level(logging.WARNING, logger="tests.engine"):
        trainer.train_epoch(batch_of(8, seed=number) for number in range(3))
    (record,) = caplog.records
    assert record.getMessage().startswith("update 1 skipped at learning rate 0.1: non-finite loss")
    assert "image-0.png, image-1.png" in record.getMessage()


def test_too_many_skipped_updates_end_the_run(trainer_of, batch_of):
    trainer = trainer_of(network(), criterion=Spoiling(0, 1), max_skipped=1)
    with pytest.raises(ValueError, match=r"2 updates were skipped, TRAIN\.MAX_SKIPPED is 1") as error:
        trainer.train_epoch(batch_of(8, seed=number) for number in range(3))
    assert "TRAIN.BASE_LR" in str(error.value)


def test_skipped_updates_are_counted_over_epochs(trainer_of, batch_of):
    trainer = trainer_of(network(), criterion=Spoiling(0, 4, 5), max_skipped=2)
    trainer.train_epoch(batch_of(8, seed=number) for number in range(3))
    with pytest.raises(ValueError, match="3 updates were skipped"):
        trainer.train_epoch(batch_of(8, seed=number) for number in range(3))


class Learning(nn.CrossEntropyLoss):
    """A finite loss with a parameter of its own, whose gradient is not finite in some calls, counted from 0."""

    def __init__(self, *spoilt: int) -> None:
        super().__init__()
        self.own, self.spoilt, self.calls = nn.Parameter(torch.ones(3)), spoilt, 0

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        shift = torch.zeros(()) if self.calls - 1 in self.spoilt else torch.ones(())
        return super().forward(input, target) + (self.own * shift).abs().sqrt().sum()


def test_gradients_of_what_the_loss_learns_count(trainer_of, batch_of):
    """For the decision to skip an update, and for the norm that is clipped."""
    model, criterion = network(), Learning(1)
    optimizer = optimizer_of(model, name="sgd", lr=0.01, weight_decay=0.1, criterion=criterion)
    trainer = trainer_of(model, criterion=criterion, optimizer=optimizer, max_skipped=1, clip_grad=1e-3)
    trainer.train_epoch([batch_of(8), batch_of(8, seed=1)])
    assert trainer.progress.skipped == 1
    assert criterion.own.isfinite().all()
    # One step of Nesterov momentum goes 1.9 times the gradient, whose norm over everything is a thousandth.
    assert 0 < (criterion.own.detach() - 1).norm() < 1.9 * 0.01 * 1e-3 * (1 + 1e-3)


def test_one_non_finite_batch_skips_the_whole_accumulated_update(trainer_of, batch_of):
    model = network()
    before = learnt(model)
    trainer = trainer_of(model, criterion=Spoiling(1), accumulation=2, max_skipped=1)
    trainer.train_epoch([batch_of(8), batch_of(8, seed=1)])
    assert same(learnt(model), before)
    assert trainer.progress.skipped == 1


def epoch(batch_of, number: int) -> list[Batch]:
    return [batch_of(8, seed=10 * number + step) for step in range(5)]


def saved(trainer, folder: Path) -> Path:
    checkpoint_folder(folder, keep=3).save(trainer)
    return folder / "latest.pth"


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_run_that_stops_within_an_epoch_resumes_there(trainer_of, batch_of, tmp_path, stop_after):
    def build(seed: int, folder: Path, start: int = 0, first: int = 0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
        optimizer = optimizer_of(model, name="adamw", lr=0.01, weight_decay=0.1)
        return trainer_of(model, optimizer=optimizer, metrics=MetricsWriter(folder, start, first), print_freq=2)

    folders = [tmp_path / name for name in ("straight", "stopped")]
    for folder in folders:
        folder.mkdir()
    straight = build(1, folders[0])
    for number in range(2):
        assert straight.train_epoch(epoch(batch_of, number))
    straight.metrics.close()

    stopped = build(1, folders[1])
    finished = stopped.train_epoch(epoch(batch_of, 0), lambda: stopped.progress.update == stop_after)
    stopped.metrics.close()
    assert not finished
    assert (stopped.progress.epoch, stopped.progress.consumed) == (0, 8 * stop_after)
    resumed = build(2, folders[1], start=stop_after)
    resume(resumed, saved(stopped, tmp_path))
    assert (resumed.progress.epoch, resumed.progress.consumed, resumed.progress.update) == (
        0,
        8 * stop_after,
        stop_after,
    )
    resumed.train_epoch(epoch(batch_of, 0)[stop_after:])
    resumed.train_epoch(epoch(batch_of, 1))
    resumed.metrics.close()
    assert same(resumed.network.state_dict(), straight.network.state_dict())
    assert resumed.progress == straight.progress
    first, second = ([json.loads(li) for li in (f / "metrics.jsonl").read_text().splitlines()] for f in folders)
    assert first == second
    assert [(record["kind"], record["update"]) for record in first] == [
        ("train", 2),
        ("train", 4),
        ("train_epoch", 5),
        ("train", 6),
        ("train", 8),
        ("train", 10),
        ("train_epoch", 10),
    ]


@pytest.mark.parametrize("change", [{"seed": 7}, {"images": 48}])
def test_the_order_of_images_may_not_change_within_an_epoch(trainer_of, batch_of, tmp_path, change):
    trainer = trainer_of(network())
    trainer.train_epoch(epoch(batch_of, 0), lambda: True)
    path = saved(trainer, tmp_path)
    with pytest.raises(ValueError, match=r"from the middle of an epoch.*resume with the old value"):
        resume(trainer_of(network(), **change), path)


@pytest.mark.parametrize("change", [{"seed": 7}, {"images": 48}])
def test_the_order_of_images_may_change_between_epochs(trainer_of, batch_of, tmp_path, change):
    trainer = trainer_of(network())
    trainer.train_epoch(epoch(batch_of, 0))
    other = trainer_of(network(), **change)
    resume(other, saved(trainer, tmp_path))
    assert (other.progress.epoch, other.progress.update) == (1, 5)


def test_another_global_batch_counts_its_own_updates(trainer_of, batch_of, tmp_path, caplog: pytest.LogCaptureFixture):
    trainer = trainer_of(network())
    trainer.train_epoch(epoch(batch_of, 0))
    trainer.train_epoch(epoch(batch_of, 1)[:2], lambda: trainer.progress.update == 7)
    other = trainer_of(network(), global_batch=16, updates_per_epoch=2)
    with caplog.at_level(logging.WARNING, logger="tests.engine"):
        resume(other, saved(trainer, tmp_path))
    assert (other.progress.epoch, other.progress.consumed, other.progress.update) == (1, 16, 3)
    assert "global_batch 8 -> 16" in caplog.text


def damaged(path: Path) -> Path:
    content = path.read_bytes()
    path.unlink()  # it may have other names, under which it stays whole
    path.write_bytes(content[:300])
    return path


def test_a_damaged_checkpoint_is_skipped(trainer_of, tmp_path, caplog: pytest.LogCaptureFixture):
    trainer, checkpoints = trainer_of(network()), checkpoint_folder(tmp_path, keep=3)
    for finished in (3, 4):
        trainer.progress.epoch, trainer.progress.update = finished + 1, 10 * finished
        checkpoints.save(trainer, periodic=True)
    damaged(tmp_path / "latest.pth")
    with caplog.at_level(logging.WARNING, logger="tests.engine"):
        assert newest(tmp_path, LOGGER).path == tmp_path / "ckpt_epoch_4.pth"
    assert f"{tmp_path / 'latest.pth'} is damaged" in caplog.text


def test_the_newest_is_the_one_with_the_most_updates(trainer_of, tmp_path):
    trainer, checkpoints = trainer_of(network()), checkpoint_folder(tmp_path, keep=3)
    trainer.progress.epoch, trainer.progress.update = 3, 30
    checkpoints.save(trainer)
    (tmp_path / "latest.pth").rename(tmp_path / "best_ckpt.pth")
    trainer.progress.epoch, trainer.progress.update = 2, 20
    checkpoints.save(trainer, periodic=True)
    assert newest(tmp_path, LOGGER).path == tmp_path / "best_ckpt.pth"


def test_a_run_with_only_damaged_checkpoints_does_not_start_from_scratch(trainer_of, tmp_path):
    checkpoints = checkpoint_folder(tmp_path, keep=3)
    checkpoints.save(trainer_of(network()))
    damaged(tmp_path / "latest.pth")
    with pytest.raises(ValueError, match=re.escape(f"none of the 1 checkpoints in {tmp_path} can be read")) as error:
        newest(tmp_path, LOGGER)
    assert "another TAG" in str(error.value)


def test_temporary_files_of_a_killed_run_are_deleted(tmp_path):
    (tmp_path / ".latest.pth.x1.tmp").touch()
    (tmp_path / "notes.tmp").touch()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]


def locking(folder: Path) -> subprocess.CompletedProcess:
    """Another process that wants the folder."""
    code = (
        f"from pathlib import Path\nfrom utils.lock import folder_lock\nwith folder_lock(Path({str(folder)!r})): pass"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    folder = tmp_path / "run"
    with folder_lock(folder):
        second = locking(folder)
        assert second.returncode != 0
        assert f"is writing to {folder}: wait for it, or give this one another TAG" in second.stderr
        assert locking(tmp_path / "other").returncode == 0
    assert locking(folder).returncode == 0
