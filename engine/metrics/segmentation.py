"""Segmentation: mean intersection over union."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data import Batch
from data.segmentation import IGNORED
from utils import distributed

from .base import Metric, Result, on_images


@dataclass(frozen=True, kw_only=True)
class SegmentationResult(Result):
    """In percent: the mean over classes of the intersection over union, that of each class, and the pixel accuracy.

    A class that neither masks nor predictions contain is left out of the mean; its own figure is None. A pixel with a
    non-finite logit counts as wrong.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float | None]

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "iou": self.iou, "images": self.images}

    def details(self, classes: Sequence[str]) -> list[str]:
        """Returns the intersection over union of each class."""
        figures = zip(classes, self.iou, strict=True)
        return [f"{name:<14}" + ("absent" if iou is None else f"{iou:.2f}") for name, iou in figures]

    def __str__(self) -> str:
        figures = f"mIoU {self.miou:.3f} pixel accuracy {self.pixel_accuracy:.3f}"
        return f"{figures} {on_images(self.images, self.nonfinite)}"


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts pixels, except `IGNORED` ones: (K, K + 1) int64, rows are labels, columns are predictions.

    Args:
        labels: int64, any shape, each 0 to K - 1 or `IGNORED`.
        predictions: int64, the same shape, each 0 to K - 1, or K for no class.
        classes: K.
    """
    counted = labels != IGNORED
    cells = labels[counted] * (classes + 1) + predictions[counted]
    return cells.bincount(minlength=classes * (classes + 1)).view(classes, classes + 1)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Returns the intersection over union of each class: (K, K + 1) -> (K,), nan for an absent class."""
    right = confusion.diagonal().double()
    return right / (confusion.sum(0)[:-1] + confusion.sum(1) - right)


def summarise(confusion: Tensor, images: int, nonfinite: int = 0) -> SegmentationResult:
    """Returns the figures of a confusion matrix (K, K + 1); `nonfinite` of the images had non-finite logits.

    Raises:
        ValueError: it is zero everywhere.
    """
    pixels = int(confusion.sum())
    if not pixels:
        raise ValueError("there are no labelled pixels to evaluate")
    iou = 100 * intersection_over_union(confusion)
    return SegmentationResult(
        miou=float(iou.nanmean()),
        pixel_accuracy=100 * float(confusion.diagonal().sum()) / pixels,
        iou=[None if value.isnan() else float(value) for value in iou],
        images=images,
        nonfinite=nonfinite,
    )


class SegmentationMetric(Metric):
    """Takes logits (N, K, H, W) and masks (N, H, W); one confusion matrix over every pixel of every process."""

    def __init__(self, device: torch.device, classes: int) -> None:
        self._classes = classes
        self._confusion = torch.zeros(classes, classes + 1, dtype=torch.int64, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._images = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Accumulates logits (N, K, H, W)."""
        labels = batch.labels.to(outputs.device, non_blocking=True)
        finite = outputs.isfinite().all(1)
        predictions = outputs.argmax(1).where(finite, self._classes)
        self._confusion += confusion_matrix(labels, predictions, self._classes)
        self._nonfinite += (~finite).flatten(1).any(1).sum()
        self._images += len(labels)

    def compute(self) -> SegmentationResult:
        """Reduces the counts over all processes; raises ValueError if there are no labelled pixels."""
        counts = torch.stack((self._nonfinite, self._nonfinite.new_tensor(self._images)))
        nonfinite, images = distributed.all_reduce_sum(counts).tolist()
        return summarise(distributed.all_reduce_sum(self._confusion), images, nonfinite)
