"""The loss that belongs to the labels, against the definition of the cross-entropy."""

import pytest
import torch
from engine.loss import build_loss

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)


def log_probabilities() -> torch.Tensor:
    return LOGITS - LOGITS.exp().sum(1, keepdim=True).log()


def test_class_numbers():
    expected = -(log_probabilities()[0, 1] + log_probabilities()[1, 2]) / 2
    torch.testing.assert_close(build_loss(False)(LOGITS, torch.tensor([1, 2])), expected)


@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_smoothed_class_numbers(smoothing):
    targets = torch.full((2, 3), smoothing / 3, dtype=torch.float64)
    targets[0, 1] += 1 - smoothing
    targets[1, 2] += 1 - smoothing
    expected = -(targets * log_probabilities()).sum(1).mean()
    torch.testing.assert_close(build_loss(False, smoothing)(LOGITS, torch.tensor([1, 2])), expected)


def test_distributions_are_not_smoothed_again():
    targets = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], dtype=torch.float64)
    expected = -(targets * log_probabilities()).sum(1).mean()
    torch.testing.assert_close(build_loss(True, 0.1)(LOGITS, targets), expected)
