"""Accuracy by the distance to the borders of partitions, in cases that were worked out by hand."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from data import Batch
from data.segmentation import IGNORED
from engine.evaluate import compare, evaluate
from engine.metrics import SegmentationMetric
from engine.metrics.borders import NO_BORDER, BorderAccuracy, border_distances
from models.segmentation import SegmentationNetwork

CPU = torch.device("cpu")
FAR = NO_BORDER


def test_distances_along_one_dimension() -> None:
    """Partitions of three columns, one row of them: borders between columns 2 and 3, and 5 and 6."""
    assert border_distances((1, 8), (1, 3)).tolist() == [[2, 1, 0, 0, 1, 0, 0, 1]]
    assert border_distances((8, 1), (3, 1)).flatten().tolist() == [2, 1, 0, 0, 1, 0, 0, 1]


def test_the_nearer_of_two_borders_counts() -> None:
    distances = border_distances((4, 6), (2, 3))
    assert distances.tolist() == [[1, 1, 0, 0, 1, 1], [0] * 6, [0] * 6, [1, 1, 0, 0, 1, 1]]


@pytest.mark.parametrize("size", [(3, 2), (4, 4)])
def test_the_edge_of_an_image_is_no_border(size: tuple[int, int]) -> None:
    assert border_distances(size, (4, 4)).unique().tolist() == [FAR]


def test_errors_at_the_borders_alone() -> None:
    """32 x 64 pixels of partitions of 32 x 32: one border in the middle, of 32 pixels on either side."""
    borders = BorderAccuracy((32, 32), CPU)
    right = torch.ones(2, 32, 64, dtype=torch.bool)
    right[0, :, 31:33] = False
    right[1, :8, 24] = False
    borders.update(right, torch.ones_like(right))
    found = borders.compute()
    # Two images, two sides of the border: 4 columns of 32 pixels in the first range, ..., 16 in the last.
    assert found == {
        "0-3": pytest.approx(100 * (1 - 64 / 512)),
        "4-7": pytest.approx(100 * (1 - 8 / 512)),
        "8-15": 100.0,
        "16-31": 100.0,
    }


def test_pixels_that_are_not_counted() -> None:
    borders = BorderAccuracy((8, 8), CPU)
    right = torch.zeros(1, 8, 16, dtype=torch.bool)
    right[..., 6:10] = True
    counted = right.clone()
    counted[..., 4] = True
    borders.update(right, counted)
    assert borders.compute() == {"0-3": pytest.approx(100 * 4 / 5), "4-7": None}


def test_images_of_several_sizes_add_up() -> None:
    borders = BorderAccuracy((4, 4), CPU)
    for width, right in ((8, True), (4, False), (12, False)):  # the second has no border
        borders.update(torch.full((1, 4, width), right), torch.ones(1, 4, width, dtype=torch.bool))
    assert borders.compute() == {"0-3": pytest.approx(100 * 8 / 20)}


def test_without_a_border_there_is_no_figure() -> None:
    borders = BorderAccuracy((32, 32), CPU)
    borders.update(torch.ones(1, 32, 32, dtype=torch.bool), torch.ones(1, 32, 32, dtype=torch.bool))
    assert borders.compute() is None


class Striped(SegmentationNetwork):
    """Answers with class 1 in the columns 7 and 8, and with class 0 elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 2, *x.shape[-2:])
        logits[:, 0], logits[..., 7:9] = 1, torch.tensor([0.0, 1.0])[:, None, None]
        return logits


def striped(img_size: int) -> SegmentationNetwork:
    with torch.device("meta"):
        return Striped("RepMLPNet-Digits", 2, "pspnet", 8, img_size=img_size)


def test_an_evaluation_finds_the_partitions_of_the_network() -> None:
    labels = torch.zeros(2, 8, 16, dtype=torch.int64)
    labels[:, 0] = IGNORED
    batches = [Batch(torch.zeros(2, 3, 8, 16, dtype=torch.uint8), labels, torch.arange(2), [])]
    result = evaluate(striped(8), batches, SegmentationMetric(CPU, 2), nn.Identity(), CPU, nullcontext())
    assert result.as_dict()["border_accuracy"] == {"0-3": 75.0, "4-7": 100.0}
    assert result.details(["road", "car"])[2:] == [
        "pixel accuracy by distance to the nearest border of two partitions, in pixels:",
        "0-3           75.00",
        "4-7           100.00",
    ]
    metrics = SegmentationMetric(CPU, 2), SegmentationMetric(CPU, 2)
    both = compare(striped(8), striped(16), batches, metrics, nn.Identity(), CPU, nullcontext())
    assert both.first == result
    assert "border_accuracy" not in both.second.as_dict()  # one partition is the whole image
