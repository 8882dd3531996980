"""Evaluation of segmentation: one confusion matrix over every pixel of every process, divided once."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from data.segmentation import IGNORED
from utils import distributed

from .evaluate import outputs, refuse_unreadable


@dataclass(frozen=True)
class SegmentationEvaluation:
    """In percent: the mean over classes of intersection over union, that of each class, and the share of right pixels.

    A class that neither the masks nor the answers have counts for nothing; its own figure is None.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float | None]
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"mIoU {self.miou:.3f} pixel accuracy {self.pixel_accuracy:.3f} on {self.images} images"


def confusion_matrix(labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    """Counts pixels: (K, K) int64, rows are labels, columns are answers; labels that are `IGNORED` do not count.

    Args:
        labels: int64, any shape, each 0 to K - 1 or `IGNORED`.
        answers: int64, the same shape, each 0 to K - 1.
        classes: K.
    """
    counted = labels != IGNORED
    cells = labels[counted] * classes + answers[counted]
    return cells.bincount(minlength=classes**2).view(classes, classes)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Returns, for each class, right pixels / (pixels of the class or so answered): (K, K) -> (K,), nan for 0 / 0."""
    right = confusion.diagonal().double()
    return right / (confusion.sum(0) + confusion.sum(1) - right)


def summarise(confusion: Tensor, images: int) -> SegmentationEvaluation:
    """Returns the figures of a confusion matrix (K, K).

    Raises:
        ValueError: it counts no pixel.
    """
    pixels = int(confusion.sum())
    if not pixels:
        raise ValueError("there are no labelled pixels to evaluate")
    iou = 100 * intersection_over_union(confusion)
    return SegmentationEvaluation(
        miou=float(iou.nanmean()),
        pixel_accuracy=100 * float(confusion.diagonal().sum()) / pixels,
        iou=[None if value.isnan() else float(value) for value in iou],
        images=images,
    )


@torch.inference_mode()
def evaluate_segmentation(
    model: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    device: torch.device,
    autocast: AbstractContextManager,
    classes: int,
) -> SegmentationEvaluation:
    """Evaluates a network on every pixel of every image of every process.

    Args:
        model: gives logits (N, K, H, W); left in the mode that it was in.
        batches: every image of the set once, over all processes together.
        normalize: turns uint8 images (N, C, H, W) on the device into the network's input.
        device: where the network is.
        autocast: precision of the forward pass.
        classes: K.

    Raises:
        ValueError: an image could not be read, or there are no labelled pixels.
    """
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    images, unreadable = 0, list[str]()
    for logits, batch in outputs(model, batches, normalize, device, autocast):
        labels = batch.labels.to(device, non_blocking=True)
        confusion += confusion_matrix(labels, logits.argmax(1), classes)
        images, unreadable = images + len(labels), unreadable + batch.unreadable
    counts = distributed.all_reduce_sum(torch.tensor([images, len(unreadable)], device=device)).tolist()
    refuse_unreadable(counts[1], unreadable, "figures")
    return summarise(distributed.all_reduce_sum(confusion), counts[0])
