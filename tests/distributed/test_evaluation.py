"""Evaluation by any number of processes counts every image once and equals that of a single one."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_ranks import in_ranks
from settings import settings
from task_recipes import keys_of, recipe_of

import data
import models
from data import DigitsSource, Normalize
from engine.evaluate import evaluate
from engine.metrics import ClassificationMetric, ClassificationResult
from tasks import TASKS
from utils.distributed import RankInfo
from utils.seed import seed_everything

SIZES = (1, 2, 4, 7, 8, 9, 33)  # smaller than the number of processes, equal to it, a multiple and not
CPU = torch.device("cpu")
ALONE = RankInfo(0, 1, 0, CPU)


class Few(DigitsSource):
    """The first so many digits."""

    def __init__(self, count: int) -> None:
        super().__init__("val")
        self.labels = self.labels[:count]


def evaluations(process: RankInfo, batch_size: int) -> list[tuple[ClassificationResult, list[int]]]:
    """Evaluates random weights, in float64, on sets of all sizes; returns the images of this process, too."""
    seed_everything(0)
    model, results = models.create_model("RepMLPNet-Digits", 10).double(), []
    normalize = Normalize((0.3,) * 3, (0.4,) * 3, dtype=torch.float64)
    for size in SIZES:
        batches = data.build_eval_loader(
            Few(size),
            data.eval_transform((16, 16)),
            settings(f"DATA.BATCH_SIZE {batch_size} DATA.NUM_WORKERS 0").DATA,
            rank=process.rank,
            world_size=process.world_size,
        )
        mine = [int(index) for batch in batches for index in batch.indices]
        results.append((evaluate(model, batches, ClassificationMetric(CPU), normalize, CPU, nullcontext()), mine))
    return results


@pytest.fixture(scope="module")
def alone() -> list[ClassificationResult]:
    return [result for result, _ in evaluations(ALONE, 4)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_any_number_of_processes_gives_the_result_of_one(alone, world_size):
    ranks = in_ranks(evaluations, world_size, 3)
    for i, (size, expected) in enumerate(zip(SIZES, alone, strict=True)):
        results = [rank[i][0] for rank in ranks]
        assert all(result == results[0] for result in results), "the processes disagree"
        figures = (results[0].top1, results[0].top5, results[0].images)
        assert figures == (expected.top1, expected.top5, expected.images), size
        assert results[0].loss == pytest.approx(expected.loss, rel=1e-13), size
        assert sorted(index for rank in ranks for index in rank[i][1]) == list(range(size))


def in_every_way(process: RankInfo) -> list[dict[str, Any]]:
    """Evaluates with classes in another order, by some outputs alone, by ReaL labels, and class by class."""
    seed_everything(0)
    model, results = models.create_model("RepMLPNet-Digits", 20).double(), []
    normalize = Normalize((0.3,) * 3, (0.4,) * 3, dtype=torch.float64)
    for size in SIZES:
        batches = data.build_eval_loader(
            Few(size),
            data.eval_transform((16, 16)),
            settings("DATA.BATCH_SIZE 3 DATA.NUM_WORKERS 0").DATA,
            rank=process.rank,
            world_size=process.world_size,
        )
        real = torch.stack((torch.arange(1, size + 1) % 6 - 1, torch.arange(1, size + 1) % 11 - 1), 1)
        metric = ClassificationMetric(CPU, range(19, 0, -2), masked=True, real=real, per_class=10)
        results.append(evaluate(model, batches, metric, normalize, CPU, nullcontext()).as_dict())
    return results


def test_every_way_of_counting_is_exact_in_three_processes():
    alone = in_every_way(ALONE)
    assert 0 < alone[-1]["real"] < 100
    for found in in_ranks(in_every_way, 3):
        assert found == [{key: close_to(value) for key, value in expected.items()} for expected in alone]


def with_an_unreadable_one(process: RankInfo) -> str:
    class Broken(Few):
        def _image(self, index: int):
            if index == 5:
                raise OSError("the disk is gone")
            return super()._image(index)

    model = models.create_model("RepMLPNet-Digits", 10)
    place = {"rank": process.rank, "world_size": process.world_size}
    batches = data.build_eval_loader(
        Broken(9), data.eval_transform((16, 16)), settings("DATA.BATCH_SIZE 2 DATA.NUM_WORKERS 0").DATA, **place
    )
    try:
        evaluate(model, batches, ClassificationMetric(CPU), Normalize((0.3,) * 3, (0.4,) * 3), CPU, nullcontext())
    except ValueError as error:
        return str(error)
    return ""


def test_all_processes_refuse_where_one_has_an_unreadable_image():
    said = in_ranks(with_an_unreadable_one, 3)
    assert all("1 images can't be read, so the figures would be wrong: " in text for text in said)
    assert "the disk is gone" in said[5 % 3]


# Every task: pairs need four images at least, which leaves none to the last of five processes.
TASK_SIZES = (4, 5)


class Fewer:
    """The first so many images of a source."""

    def __init__(self, source: Any, count: int) -> None:
        self._source, self._count = source, count
        self.labels = getattr(source, "labels", np.empty(0))[:count]  # of pairs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return self._count


def figures_of_tasks(process: RankInfo, folder: Path) -> dict[tuple[str, int], tuple[dict[str, Any], int]]:
    """Evaluates random weights of each task, in float64, on sets of all sizes; with the images of this process."""
    results = {}
    for name in TASKS:
        changes = f"DATA.DATA_PATH {folder / name} DATA.TEST_BATCH_SIZE 2"
        cfg = settings(" ".join(" ".join(pair) for pair in keys_of(name, changes).items()))
        for size in TASK_SIZES:
            task = TASKS[name](cfg, process)
            task.val_source = Fewer(task.val_source, size)
            network = task.build_network(task.num_outputs()).double()
            batches = task.eval_loader(task.train_size)
            metric, normalize = task.build_metric(task.num_outputs()), task.normalize(torch.float64)
            result = evaluate(network, batches, metric, normalize, CPU, nullcontext())
            results[name, size] = (result.as_dict(), sum(len(batch.indices) for batch in batches))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of all tasks."""
    root = tmp_path_factory.mktemp("tasks")
    for name in TASKS:
        recipe_of(name).write(root / name)
    return root


@pytest.fixture(scope="module")
def figures_alone(folders: Path) -> dict[tuple[str, int], tuple[dict[str, Any], int]]:
    return figures_of_tasks(ALONE, folders)


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3, 5])
def test_every_task_counts_alike_in_any_number_of_processes(figures_alone, folders, world_size):
    ranks = in_ranks(figures_of_tasks, world_size, folders)
    for (name, size), (expected, images) in figures_alone.items():
        found = [rank[name, size] for rank in ranks]
        assert all(figures == found[0][0] for figures, _ in found), "the processes disagree"
        assert found[0][0][TASKS[name].metric] == expected[TASKS[name].metric], (name, size)
        assert found[0][0] == {key: close_to(value) for key, value in expected.items()}, (name, size)
        assert sum(count for _, count in found) == images == size
        assert (0 in [count for _, count in found]) == (size < world_size)


def close_to(value: Any) -> Any:
    """Counts are exact, means are rounded."""
    return pytest.approx(value, rel=1e-12) if isinstance(value, float) else value
