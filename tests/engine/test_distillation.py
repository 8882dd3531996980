"""Hard-label distillation: the targets by its definition, and the teacher's part in them."""

from contextlib import nullcontext

import pytest
import torch
from settings import settings
from torch import Tensor, nn

from data import BatchAugmentation, build_batch_augmentation
from engine.distillation import HardDistillation
from engine.precision import autocast

CLASSES, LABELS = 3, torch.tensor([0, 2])
IMAGES = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)


class Teacher(nn.Module):
    """Predicts class 1 for values below 3 and class 0 for the others."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten()
        return torch.stack([x - 3, 3 - x, -10 - 0 * x], 1)


def distillation(
    augmentation: BatchAugmentation | None = None,
    weight: float = 0.5,
    label_smoothing: float = 0.0,
    teacher: nn.Module | None = None,
) -> HardDistillation:
    return HardDistillation(augmentation, teacher or Teacher(), weight, CLASSES, label_smoothing, nullcontext())


@pytest.mark.parametrize(
    ("weight", "smoothing", "expected"),
    [
        (0.5, 0.0, [[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]),
        (0.25, 0.0, [[0.75, 0.25, 0.0], [0.25, 0.0, 0.75]]),
        (0.0, 0.3, [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]]),
        (1.0, 0.3, [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),  # predictions are not smoothed
        (0.5, 0.3, [[0.4, 0.55, 0.05], [0.55, 0.05, 0.4]]),
    ],
)
def test_the_targets(weight, smoothing, expected):
    images, targets = distillation(weight=weight, label_smoothing=smoothing)(IMAGES, LABELS, epoch=0, step=0)
    assert torch.equal(images, IMAGES)
    torch.testing.assert_close(targets, torch.tensor(expected))


def test_the_loss_is_the_weighted_sum_of_two():
    logits = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(0))
    _, targets = distillation(weight=0.3)(IMAGES, LABELS, epoch=0, step=0)
    loss = nn.functional.cross_entropy
    expected = 0.7 * loss(logits, LABELS) + 0.3 * loss(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(loss(logits, targets), expected)


def test_the_teacher_sees_the_augmented_images():
    cfg = settings("AUG.MIXUP 1 AUG.PRESET none").AUG
    augmentation = build_batch_augmentation(cfg, num_classes=CLASSES, batch_size=2, label_smoothing=0.1, seed=0)
    originals = torch.tensor([1.0, 3.5]).view(2, 1, 1, 1)
    assert Teacher()(originals).argmax(1).tolist() == [1, 0]
    mixed, soft = augmentation(originals.clone(), LABELS, epoch=3, step=7)
    images, targets = distillation(augmentation, weight=0.4, label_smoothing=0.1)(
        originals.clone(), LABELS, epoch=3, step=7
    )
    assert torch.equal(images, mixed)
    ones = torch.eye(CLASSES)[[1, 1]]
    torch.testing.assert_close(targets, 0.6 * soft + 0.4 * ones)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_answer_that_is_not_finite_makes_its_target_so(value):
    images = torch.tensor([value, 5.0]).view(2, 1, 1, 1)
    _, targets = distillation()(images, LABELS, epoch=0, step=0)
    assert targets.isfinite().all(1).tolist() == [False, True]


def test_the_teacher_learns_nothing_and_runs_in_the_precision_of_the_training():
    seen = []
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(1, CLASSES))
    teacher[1].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    distill = HardDistillation(None, teacher, 0.5, CLASSES, 0.0, autocast(torch.device("cpu"), torch.bfloat16))
    _, targets = distill(IMAGES, LABELS, epoch=0, step=0)
    assert seen == [torch.bfloat16]
    assert targets.dtype == torch.float32
    assert not targets.requires_grad
