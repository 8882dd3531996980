"""Evaluation by any number of processes counts every image once and equals that of a single one."""

from contextlib import nullcontext

import pytest
import torch
from distributed_ranks import in_ranks
from settings import settings

import data
import models
from data import DigitsSource, Normalize
from engine.evaluate import evaluate
from engine.metrics import ClassificationMetric, ClassificationResult
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
