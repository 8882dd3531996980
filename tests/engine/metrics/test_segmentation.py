"""Intersection over union, against cases that were worked out by hand."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from data import Batch
from data.segmentation import IGNORED
from engine.evaluate import compare, evaluate
from engine.metrics import SegmentationMetric, SegmentationResult
from engine.metrics.segmentation import confusion_matrix, intersection_over_union, summarise

CPU = torch.device("cpu")
X = IGNORED
LABELS = torch.tensor([[0, 0, 1, 1], [0, 2, 2, X]])
ANSWERS = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 2]])
CONFUSION = torch.tensor([[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0]])


class Answers(nn.Module):
    """Answers each pixel with the class that its first channel names."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x[:, 0].long(), 3).permute(0, 3, 1, 2).float()


def batch(labels: Tensor, answers: Tensor, unreadable: tuple[str, ...] = ()) -> Batch:
    images = answers.to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    return Batch(images, labels, torch.arange(len(labels)), list(unreadable))


def evaluated(*batches: Batch, network: type[nn.Module] = Answers) -> SegmentationResult:
    model = network().train()
    result = evaluate(model, batches, SegmentationMetric(CPU, 3), nn.Identity(), CPU, nullcontext())
    assert model.training
    assert isinstance(result, SegmentationResult)
    return result


def test_confusion_matrix() -> None:
    assert torch.equal(confusion_matrix(LABELS, ANSWERS, 3), CONFUSION)


def test_ignored_pixels_alone_count_for_nothing() -> None:
    assert confusion_matrix(torch.full((2, 2), X), torch.ones(2, 2, dtype=torch.int64), 3).sum() == 0


def test_intersection_over_union() -> None:
    # Class 0: 2 right, 1 missed, 1 wrongly answered; class 1: 2, 0, 1; class 2: 1, 1, 0.
    assert intersection_over_union(CONFUSION).tolist() == pytest.approx([2 / 4, 2 / 3, 1 / 2])


def test_an_absent_class_is_left_out_of_the_mean() -> None:
    result = summarise(torch.tensor([[3, 0, 1, 0], [0, 0, 0, 0], [0, 0, 4, 0]]), 7)
    assert result.iou == pytest.approx([75.0, None, 80.0])
    assert result.miou == pytest.approx(77.5)
    assert result.pixel_accuracy == pytest.approx(87.5)
    assert result.images == 7


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    assert summarise(torch.tensor([[3, 1, 0], [0, 0, 0]]), 1).iou == pytest.approx([75.0, 0.0])


def test_no_pixel_is_an_error() -> None:
    with pytest.raises(ValueError, match="no labelled pixels"):
        summarise(torch.zeros(3, 4, dtype=torch.int64), 1)


def test_sums_over_all_pixels_are_divided_once() -> None:
    """Images of different sizes in batches of different lengths: not the mean of the batches' figures."""
    first = batch(LABELS[None].repeat(2, 1, 1), ANSWERS[None].repeat(2, 1, 1))
    second = batch(torch.tensor([[[1, 1, 1]]]), torch.tensor([[[1, 0, 1]]]))
    result = evaluated(first, second)
    expected = 2 * CONFUSION + torch.tensor([[0, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0]])
    assert result == summarise(expected, 3)
    assert result.miou == pytest.approx(100 * (4 / 9 + 6 / 9 + 2 / 4) / 3)


BROKEN = 9  # as an answer: the network breaks down there


class Breaking(Answers):
    """Has no finite logit of class 0 where the image says so."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x.where(x != BROKEN, 0))
        logits[:, 0][x[:, 0] == BROKEN] = float("nan")
        return logits


def test_a_pixel_with_logits_that_are_not_finite_counts_as_wrong() -> None:
    labels = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 1, 1]], [[0, 0, 1, X]]])
    answers = torch.tensor([[[0, BROKEN, 1, 1]], [[0, 0, 1, 1]], [[0, 0, BROKEN, BROKEN]]])
    result = evaluated(batch(labels, answers), network=Breaking)
    # Missed, and answered with no other class: 5 of 6 pixels of class 0, 4 of 5 of class 1.
    assert result.iou == pytest.approx([100 * 5 / 6, 100 * 4 / 5, None])
    assert result.pixel_accuracy == pytest.approx(100 * 9 / 11)
    assert (result.images, result.nonfinite) == (3, 2)
    assert str(result).endswith("on 3 images, 2 of them with non-finite outputs")
    assert "nonfinite" not in result.as_dict()


def test_a_network_without_finite_logits_has_the_lowest_figures() -> None:
    result = evaluated(batch(LABELS[None], torch.full((1, 2, 4), BROKEN)), network=Breaking)
    assert (result.miou, result.pixel_accuracy, result.nonfinite) == (0.0, 0.0, 1)


def test_an_unreadable_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 images can't be read, so the figures would be wrong: a.png"):
        evaluated(batch(LABELS[None], ANSWERS[None], ("a.png: gone",)))


def test_two_networks_agree_pixel_by_pixel() -> None:
    class Otherwise(Answers):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            logits[:, :, 0] = logits[:, :, 0].flip(1)  # the first of two rows
            return logits

    metrics = SegmentationMetric(CPU, 3), SegmentationMetric(CPU, 3)
    answers = batch(LABELS[None], ANSWERS[None])
    result = compare(Answers().eval(), Otherwise().eval(), [answers], metrics, nn.Identity(), CPU, nullcontext())
    # Row one answers 0, 1, 1, 1, of which flipping the classes leaves the ones alone.
    assert result.agreement == 100 * 7 / 8
    assert result.difference == 1.0
    assert result.first == evaluated(answers)


def test_the_figures_of_each_class_by_name() -> None:
    result = summarise(torch.tensor([[3, 0, 1, 0], [0, 0, 0, 0], [0, 0, 4, 0]]), 7)
    assert result.details(["road", "pole", "sky"]) == [
        "road          75.00",
        "pole          absent",
        "sky           80.00",
    ]
