"""Accuracies and losses against a count in NumPy, and two networks side by side."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from settings import settings
from torch import nn

import data
import models
from data import Batch, Normalize
from engine.evaluate import Comparison, compare, evaluate, refuse_nonfinite
from engine.metrics import ClassificationMetric, ClassificationResult
from engine.metrics.classification import correct_within
from engine.precision import autocast
from models.reparam import randomize_statistics, to_deploy

CPU = torch.device("cpu")
NORMALIZE = Normalize((0.5,) * 3, (0.25,) * 3)


def evaluated(
    model: nn.Module, batches: Iterable[Batch], precision: AbstractContextManager | None = None
) -> ClassificationResult:
    result = evaluate(model, batches, ClassificationMetric(CPU), NORMALIZE, CPU, precision or nullcontext())
    assert isinstance(result, ClassificationResult)
    return result


def compared(first: nn.Module, second: nn.Module, batches: Iterable[Batch]) -> Comparison:
    metrics = ClassificationMetric(CPU), ClassificationMetric(CPU)
    return compare(first, second, batches, metrics, NORMALIZE, CPU, nullcontext())


def network(classes: int) -> nn.Module:
    """A network whose answers in training mode are other ones."""
    torch.manual_seed(classes)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(128, classes)
    )
    randomize_statistics(model)
    return model


def batches(count: int, size: int, classes: int) -> list[Batch]:
    """All images in batches of `size`, the last one smaller."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    cuts = range(0, count, size)
    return [Batch(images[i : i + size], labels[i : i + size], torch.arange(count)[i : i + size], []) for i in cuts]


def counted(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """Top-1 and top-5 in percent, and the mean cross-entropy, image by image."""
    best1 = best5 = 0
    losses = []
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        order = sorted(range(len(row)), key=lambda k: -row[k])
        best1 += order[0] == label
        best5 += label in order[:5]
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
    return 100 * best1 / len(labels), 100 * best5 / len(labels), float(np.mean(losses))


@pytest.mark.parametrize("classes", [2, 3, 5, 7, 10])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (23, 7), (23, 1), (24, 8), (23, 100)])
def test_figures_equal_a_plain_count(classes, count, size):
    model = network(classes).eval()
    everything = batches(count, count, classes)[0]
    with torch.no_grad():
        logits = model(NORMALIZE(everything.images)).numpy()
    top1, top5, loss = counted(logits, everything.labels.numpy())
    result = evaluated(model, batches(count, size, classes))
    assert result.images == count
    assert (result.top1, result.top5) == pytest.approx((top1, top5), abs=1e-9)
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_with_up_to_five_classes_every_answer_is_among_the_best_five():
    assert evaluated(network(5), batches(23, 7, 5)).top5 == 100


@pytest.mark.parametrize("training", [True, False])
def test_the_network_keeps_its_mode(training):
    model = network(7).train(training)
    before = deepcopy(model.state_dict())
    first = evaluated(model, batches(23, 7, 7))
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert evaluated(model, batches(23, 5, 7)).top1 == first.top1


def test_the_precision_of_the_forward_pass_is_the_one_asked_for():
    model = network(7)
    exact = evaluated(model, batches(200, 50, 7), autocast(CPU, None))
    rounded = evaluated(model, batches(200, 50, 7), autocast(CPU, torch.bfloat16))
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


def test_correct_within():
    logits = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]])
    labels = torch.tensor([2, 0])
    assert correct_within(logits, labels, 1).tolist() == [False, True]
    assert correct_within(logits, labels, 2).tolist() == [True, True]
    assert correct_within(logits, labels, 9).tolist() == [True, True]


def test_result_as_text_and_as_dict():
    evaluation = ClassificationResult(top1=12.34567, top5=50.0, loss=1.23456, images=359)
    assert str(evaluation) == "Acc@1 12.346 Acc@5 50.000 loss 1.2346 on 359 images"
    assert evaluation.as_dict() == {"top1": 12.34567, "top5": 50.0, "loss": 1.23456, "images": 359}


NAN, INF = float("nan"), float("inf")


def table_of(*rows: list[float]) -> "tuple[Table, Batch]":
    """A network with these answers, and a batch whose labels are all 0."""
    count = len(rows)
    images, labels = torch.zeros(count, 3, 2, 2, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64)
    return Table(list(rows)), Batch(images, labels, torch.arange(count), [])


@pytest.mark.parametrize("broken", [[NAN, NAN], [NAN, 0.0], [0.0, NAN], [INF, 0.0], [0.0, -INF], [INF, INF]])
def test_an_image_with_answers_that_are_not_finite_counts_as_wrong(broken):
    model, batch = table_of([1.0, 0.0], broken, [0.0, 1.0], [2.0, 0.0])
    result = evaluated(model, [batch])
    assert (result.top1, result.top5, result.images, result.nonfinite) == (50.0, 75.0, 4, 1)
    assert math.isnan(result.loss)
    assert str(result) == ("Acc@1 50.000 Acc@5 75.000 loss nan on 4 images, 1 of them with non-finite outputs")
    with pytest.raises(ValueError, match="outputs for 1 of 4 images are not finite: its weights are broken"):
        refuse_nonfinite(result)


def test_finite_answers_are_not_refused():
    model, batch = table_of([3e38, 0.0], [0.0, -3e38])
    result = evaluated(model, [batch])
    assert (result.top1, result.nonfinite) == (100.0, 0)
    refuse_nonfinite(result)


def test_an_overflow_of_half_precision_is_detected():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    nn.init.constant_(model[1].weight, 1e4)
    whole = evaluated(model, batches(6, 6, 3))
    half = evaluated(model, batches(6, 6, 3), autocast(CPU, torch.float16))
    assert whole.nonfinite == 0
    assert half.nonfinite > 0


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match="there are no images to evaluate"):
        evaluated(network(3), [])


def test_an_unreadable_image_is_an_error(tmp_path: Path):
    for name in ("ant", "bee"):
        for number in range(3):
            path = tmp_path / "val" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 6, 3), 40 * number, dtype=np.uint8)).save(path)
    broken = tmp_path / "val" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    cfg = settings(f"DATA.DATA_PATH {tmp_path} DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0").DATA
    loader = data.build_eval_loader(data.open_source(cfg, "val"), data.eval_transform((6, 6)), cfg)
    with pytest.raises(ValueError, match="1 images can't be read, so the figures would be wrong") as error:
        evaluated(network(2), loader)
    assert str(broken) in str(error.value)


def test_a_network_compared_to_itself_differs_by_nothing():
    model = network(7).eval()
    result = compared(model, deepcopy(model), batches(23, 7, 7))
    assert (result.agreement, result.difference) == (100.0, 0.0)
    assert result.first == result.second == evaluated(model, batches(23, 7, 7))


class Table(nn.Module):
    """Answers the i-th image it sees with the i-th row."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows, self.seen = torch.tensor(rows), 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        start, self.seen = self.seen, self.seen + len(images)
        return self.rows[start : self.seen]


def test_agreement_and_difference_by_hand():
    first = Table([[4.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, -8.0]])
    second = Table([[4.0, 0.5], [0.0, 1.0], [1.0, 2.0], [0.0, -8.0]])
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 1])
    cut = [Batch(images[i : i + 3], labels[i : i + 3], torch.arange(4)[i : i + 3], []) for i in (0, 3)]
    result = compared(first, second, cut)
    assert result.agreement == 75.0
    assert result.difference == pytest.approx(1.0 / 8.0)  # 2.0 against 1.0, where the largest logit has size 8
    assert (result.first.top1, result.second.top1) == (50.0, 25.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_non_finite_outputs_never_agree(value, which):
    rows = [[4.0, 0.0], [value, 0.0]]
    first, second = (Table([rows[which in (name, "both")], [1.0, 0.0]]) for name in ("first", "second"))
    batch = Batch(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0]), torch.arange(2), [])
    # In batches of one, too: what comes after does not make it good.
    for cut in ([batch], [Batch(*(part[i : i + 1] for part in batch[:3]), []) for i in range(2)]):
        first.seen = second.seen = 0
        result = compared(first, second, cut)
        assert result.difference == float("inf")
        assert result.agreement == 50.0
        assert (result.first.nonfinite, result.second.nonfinite) == (which != "second", which != "first")


def test_a_conversion_that_ignores_the_statistics_is_detected():
    torch.manual_seed(0)
    model = models.create_model("RepMLPNet-Digits", 10)
    wrong = to_deploy(model).eval()
    randomize_statistics(model)
    right = to_deploy(model).eval()
    cfg = settings("DATA.DATASET digits DATA.DATA_PATH digits DATA.BATCH_SIZE 200 DATA.NUM_WORKERS 0").DATA
    loader = data.build_eval_loader(data.open_source(cfg, "val"), data.eval_transform((16, 16)), cfg)
    good = compared(model.eval(), right, loader)
    bad = compared(model, wrong, loader)
    assert (good.agreement, good.first.images) == (100.0, 359)
    assert good.difference < 1e-5
    assert bad.difference > 0.01
