"""Evaluation of segmentation: one confusion matrix over every pixel of every process, divided once."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data import Batch
from data.segmentation import IGNORED
from utils import distributed

from .evaluate import on_images, outputs, refuse_unreadable


@dataclass(frozen=True)
class SegmentationEvaluation:
    """In percent: the mean over classes of intersection over union, that of each class, and the share of right pixels.

    A class that neither the masks nor the answers have counts for nothing; its own figure is None. A pixel with a logit
    that is not finite counts as wrong.
    """

    miou: float
    pixel_accuracy: float
    iou: list[float | None]
    images: int
    nonfinite: int = 0  # images with such a logit

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "iou": self.iou, "images": self.images}

    def __str__(self) -> str:
        figures = f"mIoU {self.miou:.3f} pixel accuracy {self.pixel_accuracy:.3f}"
        return f"{figures} {on_images(self.images, self.nonfinite)}"


def confusion_matrix(labels: Tensor, answers: Tensor, classes: int) -> Tensor:
    """Counts pixels: (K, K + 1) int64, rows are labels, columns are answers; labels that are `IGNORED` do not count.

    Args:
        labels: int64, any shape, each 0 to K - 1 or `IGNORED`.
        answers: int64, the same shape, each 0 to K - 1, or K for none of them.
        classes: K.
    """
    counted = labels != IGNORED
    cells = labels[counted] * (classes + 1) + answers[counted]
    return cells.bincount(minlength=classes * (classes + 1)).view(classes, classes + 1)


def intersection_over_union(confusion: Tensor) -> Tensor:
    """Returns, for each class, right pixels / (pixels of it or so answered): (K, K + 1) -> (K,), nan for 0 / 0."""
    right = confusion.diagonal().double()
    return right / (confusion.sum(0)[:-1] + confusion.sum(1) - right)


def summarise(confusion: Tensor, images: int, nonfinite: int = 0) -> SegmentationEvaluation:
    """Returns the figures of a confusion matrix (K, K + 1) over images, some of which had logits that are not finite.

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
        nonfinite=nonfinite,
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
    confusion = torch.zeros(classes, classes + 1, dtype=torch.int64, device=device)
    nonfinite = torch.zeros((), dtype=torch.int64, device=device)
    images, unreadable = 0, list[str]()
    for logits, batch in outputs(model, batches, normalize, device, autocast):
        labels = batch.labels.to(device, non_blocking=True)
        finite = logits.isfinite().all(1)
        confusion += confusion_matrix(labels, logits.argmax(1).where(finite, classes), classes)
        nonfinite += (~finite).flatten(1).any(1).sum()
        images, unreadable = images + len(labels), unreadable + batch.unreadable
    counts = torch.stack((nonfinite, *nonfinite.new_tensor([images, len(unreadable)])))
    broken, total, failures = distributed.all_reduce_sum(counts).tolist()
    refuse_unreadable(failures, unreadable, "figures")
    return summarise(distributed.all_reduce_sum(confusion), total, broken)
