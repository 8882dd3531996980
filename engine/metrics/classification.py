"""Classification: top-1, top-5 and the mean cross-entropy."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from utils import distributed

from .base import Metric, Result, on_images


@dataclass(frozen=True, kw_only=True)
class ClassificationResult(Result):
    """Accuracies in percent and the mean cross-entropy.

    An image with a non-finite logit counts as wrong, and makes the loss nan.
    """

    top1: float
    top5: float
    loss: float

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "images": self.images}

    def __str__(self) -> str:
        figures = f"Acc@1 {self.top1:.3f} Acc@5 {self.top5:.3f} loss {self.loss:.4f}"
        return f"{figures} {on_images(self.images, self.nonfinite)}"


def correct_within(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Returns whether each label is among the k highest logits: (N, K), (N,) -> (N,) bool."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1)


class ClassificationMetric(Metric):
    """Takes logits (N, K) and labels (N,)."""

    def __init__(self, device: torch.device) -> None:
        self._correct1, self._correct5, self._loss, self._nonfinite = torch.zeros(4, dtype=torch.float64, device=device)
        self._images = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Accumulates logits (N, K)."""
        labels = batch.labels.to(outputs.device, non_blocking=True)
        finite = outputs.isfinite().all(1)
        self._correct1 += (correct_within(outputs, labels, 1) & finite).sum()
        self._correct5 += (correct_within(outputs, labels, 5) & finite).sum()
        self._nonfinite += (~finite).sum()
        self._loss += F.cross_entropy(outputs.double(), labels, reduction="sum")
        self._images += len(labels)

    def compute(self) -> ClassificationResult:
        """Reduces the sums over all processes and divides once."""
        sums = torch.stack((self._correct1, self._correct5, self._loss, self._nonfinite))
        total = distributed.all_reduce_sum(torch.cat((sums, sums.new_tensor([self._images])))).tolist()
        correct1, correct5, loss, nonfinite, images = total
        if not images:
            raise ValueError("there are no images to evaluate")
        return ClassificationResult(
            top1=100 * correct1 / images,
            top5=100 * correct5 / images,
            loss=math.nan if nonfinite else loss / images,
            images=int(images),
            nonfinite=int(nonfinite),
        )
