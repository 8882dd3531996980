"""Accuracies by other orders of classes, by some classes alone and by ReaL labels, against a count in NumPy."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from data import Batch
from engine.evaluate import compare
from engine.metrics import ClassificationMetric, ClassificationResult

CPU = torch.device("cpu")
IMAGES, OUTPUTS = 40, 12
SHUFFLED = (3, 11, 0, 7, 5, 9, 1, 2, 4, 6, 8, 10)
SOME = (7, 2, 9)  # fewer than the five of top-5
SEVEN = (11, 0, 3, 8, 5, 1, 6)


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    return torch.randn(IMAGES, OUTPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def labels_of(classes: int) -> torch.Tensor:
    return torch.arange(IMAGES) * 5 % classes


def measured(logits: torch.Tensor, labels: torch.Tensor, **how) -> ClassificationResult:
    """In batches of seven."""
    metric = ClassificationMetric(CPU, **how)
    for at in range(0, len(logits), 7):
        part = slice(at, at + 7)
        metric.update(logits[part], Batch(torch.empty(0), labels[part], torch.arange(len(logits))[part], []))
    return metric.compute()


def counted(logits: np.ndarray, targets: np.ndarray, compared: list[int]) -> tuple[float, float, float]:
    """Top-1 and top-5 in percent and the mean cross-entropy, image by image, among these outputs."""
    best1 = best5 = 0
    losses = []
    for row, target in zip(logits, targets, strict=True):
        order = sorted(compared, key=lambda k: -row[k])
        best1 += order[0] == target
        best5 += target in order[:5]
        losses.append(np.log(sum(np.exp(row[k]) for k in compared)) - row[target])
    return 100 * best1 / len(logits), 100 * best5 / len(logits), float(np.mean(losses))


@pytest.mark.parametrize("masked", [True, False, None])
@pytest.mark.parametrize("outputs", [SHUFFLED, SEVEN, SOME])
def test_classes_that_are_other_outputs(logits, outputs, masked):
    labels = labels_of(len(outputs))
    compared = list(outputs) if masked else list(range(OUTPUTS))
    expected = counted(logits.numpy(), np.array(outputs)[labels.numpy()], compared)
    found = measured(logits, labels, outputs=outputs, masked=masked)
    assert (found.top1, found.top5, found.loss) == tuple(map(pytest.approx, expected))
    said = {None: "", True: ", among the classes of the images", False: ", among all classes of the network"}
    assert str(found).endswith(f"on 40 images{said[masked]}")
    assert found.as_dict().get("masked") == masked
    if masked and outputs == SOME:
        assert found.top5 == 100


def test_a_mask_changes_the_figures(logits):
    labels = labels_of(len(SEVEN))
    masked, whole = (measured(logits, labels, outputs=SEVEN, masked=value) for value in (True, False))
    assert masked.top1 > whole.top1
    assert masked.loss < whole.loss


def test_a_logit_that_is_left_out_must_be_finite_too(logits):
    broken = logits.clone()
    broken[4, 10] = torch.nan
    found = measured(broken, labels_of(3), outputs=SOME, masked=True)
    assert found.nonfinite == 1
    assert found.top5 == pytest.approx(100 * 39 / 40)
    assert np.isnan(found.loss)


@pytest.mark.parametrize("outputs", [None, SHUFFLED])
def test_real_labels(logits, outputs):
    """An image without one does not count; one with several is right by any of them, and padding by none."""
    rng = np.random.default_rng(0)
    sets = [set(rng.choice(OUTPUTS, size=count, replace=False).tolist()) for count in rng.integers(0, 4, IMAGES)]
    assert {len(labels) for labels in sets} == {0, 1, 2, 3}
    padded = torch.tensor([[*labels, -1, -1, -1][:3] for labels in sets])
    order = outputs or range(OUTPUTS)
    best = logits.numpy().argmax(1)
    right = [best[i] in {order[label] for label in labels} for i, labels in enumerate(sets) if labels]
    found = measured(logits, labels_of(OUTPUTS), outputs=outputs, real=padded)
    assert (found.real, found.real_images) == (pytest.approx(100 * sum(right) / len(right)), len(right))
    assert 0 < found.real < 100
    assert f" ReaL {found.real:.3f} (on {len(right)}) on 40 images" in str(found)
    plain = measured(logits, labels_of(OUTPUTS), outputs=outputs)
    assert (plain.top1, plain.top5, plain.loss) == (found.top1, found.top5, found.loss)
    assert plain.as_dict().keys() == {"top1", "top5", "loss", "images"}
    shifted = measured(logits.roll(1, 0), labels_of(OUTPUTS), outputs=outputs, real=padded.roll(1, 0))
    assert shifted.real == found.real, "labels belong to the index of an image"


@pytest.mark.parametrize("padding", [0, 2])
def test_images_without_any_real_label(logits, padding):
    nothing = torch.full((IMAGES, padding), -1)
    with pytest.raises(ValueError, match="none of the images has a ReaL label: leave TEST.REAL_LABELS out"):
        measured(logits, labels_of(OUTPUTS), real=nothing)


def test_each_class(logits):
    labels = labels_of(4)
    found = measured(logits, labels, outputs=SEVEN, masked=False, per_class=len(SEVEN))
    best = logits.numpy().argmax(1)
    expected = [100 * (best[labels.numpy() == k] == SEVEN[k]).mean() for k in range(4)]
    assert found.per_class == [*map(pytest.approx, expected), None, None, None]
    assert sum(figure * 10 for figure in expected) / IMAGES == pytest.approx(found.top1)
    assert json.loads(json.dumps(found.as_dict()))["per_class"] == found.per_class
    lines = found.details(["a", "bee", *"cdefg"])
    assert lines[1:5] == [f"bee {expected[1]:.2f}", f"c   {expected[2]:.2f}", f"d   {expected[3]:.2f}", "e   no images"]
    assert measured(logits, labels).details(["a"]) == []


class Canned(nn.Module):
    """Answers with the same logits to every batch."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_two_networks_agree_on_the_classes_that_are_compared():
    first = torch.tensor([[5.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    second = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 2.0]])
    batch = Batch(torch.zeros(2, 3, 1, 1), torch.tensor([0, 0]), torch.arange(2), [])
    for masked, agreement in ((True, 50), (False, 0)):
        metrics = tuple(ClassificationMetric(CPU, (1, 2), masked=masked) for _ in range(2))
        found = compare(Canned(first), Canned(second), [batch], metrics, nn.Identity(), CPU, nullcontext())
        assert found.agreement == agreement
        assert found.difference == 1, "all outputs are compared with each other"
