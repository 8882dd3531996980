"""Segmentation: mean intersection over union, and accuracy by the distance to the borders of partitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from data.segmentation import IGNORED
from models.segmentation import SegmentationNetwork
from utils import distributed

from .base import Metric, Result, on_images
from .borders import BorderAccuracy
from .counts import count_each


@dataclass(frozen=True, kw_only=True)
class SegmentationResult(Result):
    """In percent: the mean over classes of the intersection over union, that of each class, and the pixel accuracy.

    A class that neither masks nor predictions contain is left out of the mean; its own figure is None. A pixel with a
    non-finite logit counts as wrong.

    `border_accuracy` is the pixel accuracy by the distance to the nearest border of two partitions, in ranges of pixels
    of the test image, `0-3` and so on; None for a network without partitions, or with one for every image.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float | None]
    border_accuracy: dict[str, float | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        figures = {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "iou": self.iou, "images": self.images}
        return figures if self.border_accuracy is None else figures | {"border_accuracy": self.border_accuracy}

    def details(self, classes: Sequence[str]) -> list[str]:
        """Returns the intersection over union of each class, then the accuracy near borders of partitions."""
        lines = [_line(name, iou) for name, iou in zip(classes, self.iou, strict=True)]
        if self.border_accuracy is not None:
            lines.append("pixel accuracy by distance to the nearest border of two partitions, in pixels:")
            lines += [_line(distances, figure) for distances, figure in self.border_accuracy.items()]
        return lines

    def __str__(self) -> str:
        figures = f"mIoU {self.miou:.3f} pixel accuracy {self.pixel_accuracy:.3f}"
        return f"{figures} {on_images(self.images, self.nonfinite)}"


def _line(name: str, figure: float | None) -> str:
    return f"{name:<14}" + ("absent" if figure is None else f"{figure:.2f}")


def confusion_matrix(labels: Tensor, predictions: Tensor, classes: int) -> Tensor:
    """Counts pixels, except `IGNORED` ones: (K, K + 1) int64, rows are labels, columns are predictions.

    Args:
        labels: int64, any shape, each 0 to K - 1 or `IGNORED`.
        predictions: int64, the same shape, each 0 to K - 1, or K for no class.
        classes: K.
    """
    cells = labels * (classes + 1) + predictions
    return count_each(cells, labels != IGNORED, classes * (classes + 1)).view(classes, classes + 1)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Returns the intersection over union of each class: (K, K + 1) -> (K,), nan for an absent class."""
    right = confusion.diagonal().double()
    return right / (confusion.sum(0)[:-1] + confusion.sum(1) - right)


def summarise(
    confusion: Tensor, images: int, nonfinite: int = 0, border_accuracy: dict[str, float | None] | None = None
) -> SegmentationResult:
    """Returns the figures of a confusion matrix (K, K + 1); `nonfinite` of the images had non-finite logits.

    Raises:
        ValueError: it is zero everywhere.
    """
    confusion = confusion.cpu()
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
        border_accuracy=border_accuracy,
    )


class SegmentationMetric(Metric):
    """Takes logits (N, K, H, W) and masks (N, H, W); one confusion matrix over every pixel of every process."""

    def __init__(self, device: torch.device, classes: int) -> None:
        self._device, self._classes = device, classes
        self._confusion = torch.zeros(classes, classes + 1, dtype=torch.int64, device=device)
        self._nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._images = 0
        self._borders: BorderAccuracy | None = None

    def begin(self, network: nn.Module) -> None:
        """Takes the size of the network's partitions."""
        partition = network.partition if isinstance(network, SegmentationNetwork) else None
        self._borders = None if partition is None else BorderAccuracy(partition, self._device)

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Accumulates logits (N, K, H, W)."""
        labels = batch.labels.to(outputs.device, non_blocking=True)
        finite = outputs.isfinite().all(1)
        predictions = outputs.argmax(1).where(finite, self._classes)
        self._confusion += confusion_matrix(labels, predictions, self._classes)
        self._nonfinite += (~finite).flatten(1).any(1).sum()
        self._images += len(labels)
        if self._borders is not None:
            self._borders.update(predictions == labels, labels != IGNORED)

    def compute(self) -> SegmentationResult:
        """Reduces the counts over all processes; raises ValueError if there are no labelled pixels."""
        counts = torch.stack((self._nonfinite, self._nonfinite.new_tensor(self._images)))
        nonfinite, images = distributed.all_reduce_sum(counts).tolist()
        borders = None if self._borders is None else self._borders.compute()
        return summarise(distributed.all_reduce_sum(self._confusion), images, nonfinite, borders)
