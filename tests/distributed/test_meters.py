"""What several processes log: means and rates over all of them, the same after a restart."""

import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import in_ranks
from settings import settings
from torch import nn
from torch.nn import functional as F
from training_parts import checkpoint_folder, optimizer_of, resume, trainer_of

from data import Batch, Normalize
from engine.parallel import wrap
from engine.trainer import Trainer
from utils.distributed import RankInfo
from utils.log import MetricsWriter
from utils.meters import Mean

UPDATES, SIZE = 5, 4
NORMALIZE = Normalize((0.5,) * 3, (0.25,) * 3, dtype=torch.float64)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 4)).double()


def batches(process: RankInfo) -> list[Batch]:
    """This process's share of the images."""
    generator = torch.Generator().manual_seed(process.rank)
    images = torch.randint(0, 256, (UPDATES, SIZE, 3, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (UPDATES, SIZE), generator=generator)
    return [Batch(image, label, torch.arange(SIZE), []) for image, label in zip(images, labels, strict=True)]


def trainer(process: RankInfo, folder: Path | None = None, start: int = 0, print_freq: int = 3) -> Trainer:
    """Updates that leave the weights alone, so that every loss is that of the first ones."""
    model = network()
    criterion = nn.CrossEntropyLoss()
    return trainer_of(
        model,
        forward=wrap(model, criterion, settings("AMP off"), process),
        criterion=criterion,
        optimizer=optimizer_of(model, name="sgd", lr=0.0, weight_decay=0.0),
        normalize=NORMALIZE,
        rank_info=process,
        images=UPDATES * SIZE * process.world_size,
        epochs=2,
        updates_per_epoch=UPDATES,
        global_batch=SIZE * process.world_size,
        metrics=MetricsWriter(folder if process.is_main else None, start, 0),
        print_freq=print_freq,
    )


def straight_and_stopped(process: RankInfo, folder: Path) -> bool:
    """Trains an epoch without a stop, and the same with one after two updates; compares the records."""
    folders = [folder / name for name in ("straight", "stopped")]
    if process.is_main:
        for each in folders:
            each.mkdir()
    own = batches(process)
    straight = trainer(process, folders[0])
    straight.train_epoch(own)
    straight.metrics.close()
    first = trainer(process, folders[1])
    first.train_epoch(own, lambda: first.progress.update == 2)
    first.metrics.close()
    checkpoint_folder(folder, keep=1).save(first)
    dist.barrier()
    second = trainer(process, folders[1], 2)
    resume(second, folder / "latest.pth")
    second.train_epoch(own[2:])
    second.metrics.close()
    dist.barrier()
    texts = [(each / "metrics.jsonl").read_bytes() for each in folders]
    return texts[0] == texts[1] and texts[0].count(b"\n") == 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_means_after_a_restart_are_the_same_to_the_last_bit(tmp_path, world_size):
    assert all(in_ranks(straight_and_stopped, world_size, tmp_path))


def test_means_are_those_over_all_processes(tmp_path):
    in_ranks(straight_and_stopped, 3, tmp_path)
    every = [batches(RankInfo(rank, 3, rank, torch.device("cpu"))) for rank in range(3)]
    losses = [
        [F.cross_entropy(network()(NORMALIZE(b.images)), b.labels).item() for b in update]
        for update in zip(*every, strict=True)
    ]
    means = [sum(update) / 3 for update in losses]
    train, epoch = map(json.loads, (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines())
    assert train["loss"] == pytest.approx(sum(means[:3]) / 3, rel=1e-13)
    assert epoch["loss"] == pytest.approx(sum(means) / 5, rel=1e-13)


def numbers(process: RankInfo) -> list[list[float]]:
    """Adds numbers to a mean whose sum depends on the order, with other weights on each process."""
    mean = Mean(process.device)
    for number in range(5):
        mean.add(torch.tensor(0.1 * number + process.rank, dtype=torch.float64), process.rank + 1)
    return mean.state()


def mean_of(process: RankInfo, state: list) -> float:
    mean = Mean(process.device)
    mean.load_state(state)
    return mean.compute()


def test_sums_are_restored_by_another_number_of_processes():
    state = in_ranks(numbers, 3)[0]
    expected = pytest.approx(sum((0.2 + rank) * (rank + 1) for rank in range(3)) / 6, rel=1e-13)
    assert len(state) == 3
    for world_size in (1, 2, 3):
        assert in_ranks(mean_of, world_size, state) == [expected] * world_size


def test_reduced_sums_of_an_earlier_version_are_restored_once():
    assert in_ranks(mean_of, 2, [6.0, 4.0]) == [1.5, 1.5]


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def logged(process: RankInfo) -> list[str]:
    """Trains an epoch in which each update takes a second."""
    now, kept = 0.0, Lines()
    time.perf_counter = lambda: now  # this process ends with the test
    run = trainer(process, print_freq=2)
    run.logger.setLevel(logging.INFO)
    run.logger.addHandler(kept)

    def slowly():
        nonlocal now
        for batch in batches(process):
            now += 1.0
            yield batch

    run.train_epoch(slowly())
    return kept.lines


def test_rates_count_the_images_of_all_processes():
    for lines in in_ranks(logged, 3):
        assert [re.findall(r"eta (\S+)", line) for line in lines] == [["0:00:08"], ["0:00:06"], []]
        assert [re.findall(r"([\d.]+) img/s", line) for line in lines] == [["12.0"]] * 3
