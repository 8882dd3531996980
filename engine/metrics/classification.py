"""Classification: top-1, top-5 and the mean cross-entropy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch
from utils import distributed
from utils.transfer import send

from .base import Metric, Result, on_images
from .counts import count_each


@dataclass(frozen=True, kw_only=True)
class ClassificationResult(Result):
    """Accuracies in percent and the mean cross-entropy.

    An image with a non-finite logit counts as wrong, and makes the loss nan.

    `masked` says, where the network has outputs for other classes than those of the images, whether their logits were
    left out. `real` is the share of the images with ReaL labels whose prediction is among them, and `real_images` their
    number. `per_class` is the top-1 accuracy of each class, None for one without images. Each of these is None where it
    was not asked for.
    """

    top1: float
    top5: float
    loss: float
    masked: bool | None = None
    real: float | None = None
    real_images: int | None = None
    per_class: list[float | None] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        asked = {name: getattr(self, name) for name in ("masked", "real", "real_images", "per_class")}
        figures = {"top1": self.top1, "top5": self.top5, "loss": self.loss, "images": self.images}
        return figures | {name: value for name, value in asked.items() if value is not None}

    def details(self, classes: Sequence[str]) -> list[str]:
        """Returns the accuracy of each class, if it was asked for."""
        if self.per_class is None:
            return []
        width = max(map(len, classes))
        figures = ("no images" if accuracy is None else f"{accuracy:.2f}" for accuracy in self.per_class)
        return [f"{name:<{width}} {figure}" for name, figure in zip(classes, figures, strict=True)]

    def __str__(self) -> str:
        figures = f"Acc@1 {self.top1:.3f} Acc@5 {self.top5:.3f} loss {self.loss:.4f}"
        if self.real is not None:
            figures += f" ReaL {self.real:.3f} (on {self.real_images})"
        compared = {None: "", True: ", among the classes of the images", False: ", among all classes of the network"}
        return f"{figures} {on_images(self.images, self.nonfinite)}{compared[self.masked]}"


def correct_within(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Returns whether a label of each image is among the k highest logits: (N, K), (N,) or (N, L) -> (N,) bool."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    each = labels[:, None] if labels.ndim == 1 else labels
    return (best[:, None] == each[:, :, None]).flatten(1).any(1)


class ClassificationMetric(Metric):
    """Takes logits (N, K) and labels (N,).

    Args:
        device: of the network.
        outputs: the output of each class, by label; None: that of label k is output k.
        masked: of a network that has outputs for other classes, whether their logits are left out; None of any other.
        real: the ReaL labels of each image by its index, int64 (images, L), where those below 0 are none; None: not to
            be counted by.
        per_class: the number of classes, to count each on its own; None: not to be counted.
    """

    def __init__(
        self,
        device: torch.device,
        outputs: Sequence[int] | None = None,
        *,
        masked: bool | None = None,
        real: Tensor | None = None,
        per_class: int | None = None,
    ) -> None:
        self._outputs = None if outputs is None else send(torch.tensor(outputs), device)
        self._masked, self._real = masked, real
        self._correct1, self._correct5, self._loss, self._nonfinite, self._correct_real, self._with_real = torch.zeros(
            6, dtype=torch.float64, device=device
        )
        self._per_class = None if per_class is None else torch.zeros(2, per_class, dtype=torch.int64, device=device)
        self._images = 0

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Accumulates logits (N, K)."""
        labels = batch.labels.to(outputs.device, non_blocking=True)
        finite, logits, targets = outputs.isfinite().all(1), self._compared(outputs), self._outputs_of(labels)
        correct = correct_within(logits, targets, 1) & finite
        self._correct1 += correct.sum()
        self._correct5 += (correct_within(logits, targets, 5) & finite).sum()
        self._nonfinite += (~finite).sum()
        self._loss += F.cross_entropy(logits.double(), targets, reduction="sum")
        self._images += len(labels)
        if self._real is not None:
            real = send(self._real[batch.indices], outputs.device)
            self._correct_real += (correct_within(logits, self._outputs_of(real), 1) & finite).sum()
            self._with_real += (real >= 0).any(1).sum()
        if self._per_class is not None:
            counted = (correct, torch.ones_like(correct))
            self._per_class += torch.stack([count_each(labels, mask, self._per_class.shape[1]) for mask in counted])

    def predictions(self, outputs: Tensor) -> Tensor:
        """Returns the outputs (N,) that are predicted."""
        return self._compared(outputs).argmax(1)

    def _compared(self, outputs: Tensor) -> Tensor:
        """Returns the logits (N, K), those that are left out as -inf."""
        if not self._masked or self._outputs is None:
            return outputs
        return torch.full_like(outputs, -torch.inf).index_copy(1, self._outputs, outputs[:, self._outputs])

    def _outputs_of(self, labels: Tensor) -> Tensor:
        """Returns the output of each label, of any shape; what is below 0 stays."""
        return labels if self._outputs is None else self._outputs[labels.clamp(0)].where(labels >= 0, labels)

    def compute(self) -> ClassificationResult:
        """Reduces the sums over all processes and divides once."""
        sums = (self._correct1, self._correct5, self._loss, self._nonfinite, self._correct_real, self._with_real)
        total = distributed.all_reduce_sum(torch.stack((*sums, self._loss.new_tensor(self._images)))).tolist()
        correct1, correct5, loss, nonfinite, correct_real, with_real, images = total
        if not images:
            raise ValueError("there are no images to evaluate")
        if self._real is not None and not with_real:
            raise ValueError("none of the images has a ReaL label: leave TEST.REAL_LABELS out")
        return ClassificationResult(
            top1=100 * correct1 / images,
            top5=100 * correct5 / images,
            loss=math.nan if nonfinite else loss / images,
            images=int(images),
            nonfinite=int(nonfinite),
            masked=self._masked,
            real=None if self._real is None else 100 * correct_real / with_real,
            real_images=None if self._real is None else int(with_real),
            per_class=None if self._per_class is None else _shares(distributed.all_reduce_sum(self._per_class)),
        )


def _shares(counts: Tensor) -> list[float | None]:
    """Returns the share in percent of the right ones: (right, all) by class (2, C); None for a class without images."""
    return [100 * right / images if images else None for right, images in counts.T.tolist()]
