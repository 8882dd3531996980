"""What is special about classification: the loss that belongs to the labels, by the definition of cross-entropy."""

import pytest
import torch
from settings import settings
from training_parts import ALONE

from tasks.classification import Classification

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)


def log_probabilities() -> torch.Tensor:
    return LOGITS - LOGITS.exp().sum(1, keepdim=True).log()


def loss(opts: str, targets: torch.Tensor) -> torch.Tensor:
    """Of the task with these settings; digits have 10 classes, which a loss does not need to know."""
    task = Classification(settings(f"DATA.DATA_PATH digits DATA.BATCH_SIZE 2 {opts}"), ALONE)
    return task.build_criterion(task.num_outputs())(LOGITS, targets)


@pytest.mark.parametrize("erasing", [0, 0.25])
def test_class_numbers(erasing):
    expected = -(log_probabilities()[0, 1] + log_probabilities()[1, 2]) / 2
    found = loss(f"MODEL.LABEL_SMOOTHING 0 AUG.REPROB {erasing}", torch.tensor([1, 2]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_smoothed_class_numbers(smoothing):
    targets = torch.full((2, 3), smoothing / 3, dtype=torch.float64)
    targets[0, 1] += 1 - smoothing
    targets[1, 2] += 1 - smoothing
    expected = -(targets * log_probabilities()).sum(1).mean()
    torch.testing.assert_close(loss(f"MODEL.LABEL_SMOOTHING {smoothing}", torch.tensor([1, 2])), expected)


@pytest.mark.parametrize("mixing", ["AUG.MIXUP 0.4", "AUG.CUTMIX 1.0", "AUG.CUTMIX_MINMAX 0.2,0.4"])
def test_distributions_are_not_smoothed_again(mixing):
    targets = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], dtype=torch.float64)
    expected = -(targets * log_probabilities()).sum(1).mean()
    torch.testing.assert_close(loss(f"MODEL.LABEL_SMOOTHING 0.1 {mixing}", targets), expected)
