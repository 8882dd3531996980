"""A small trainer on made-up images, and the pieces that it is put together from."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import training_parts
from torch import nn

from data import Batch
from engine.trainer import Trainer
from utils.log import MetricsWriter
from utils.seed import seed_everything


@pytest.fixture(autouse=True)
def _same_draws_in_each_test() -> None:
    seed_everything(0)


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    """Returns a function that makes a batch of random images of 6 x 6 pixels."""

    def make(count: int, *, classes: int = 4, seed: int = 0, unreadable: tuple[str, ...] = ()) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, classes, (count,), generator=generator)
        return Batch(images, labels, torch.arange(count), list(unreadable))

    return make


@pytest.fixture
def plain_network() -> Callable[..., nn.Module]:
    """Returns a function that builds a network without BatchNorm, in float64."""

    def make(seed: int = 0, classes: int = 4) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 5, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(20, classes), nn.Identity()
        ).double()

    return make


@pytest.fixture
def metrics(tmp_path: Path) -> Iterator[MetricsWriter]:
    """Writes `metrics.jsonl` to the test's folder."""
    writer = MetricsWriter(tmp_path)
    yield writer
    writer.close()


@pytest.fixture
def trainer_of() -> Callable[..., Trainer]:
    """Returns a function that puts a trainer together: constant learning rate, on the CPU, alone."""
    return training_parts.trainer_of
