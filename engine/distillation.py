"""Distillation: a trained network, the teacher, takes part in the targets.

Source: Touvron et al., "Training data-efficient image transformers & distillation through attention"
(arXiv:2012.12877), hard-label distillation. Networks here have no distillation token; their one head learns from both
labels.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import BatchTransform


class SelectedOutputs(nn.Module):
    """Some of a network's outputs, or all in another order: images (N, C, H, W) -> logits (N, len(outputs))."""

    outputs: Tensor

    def __init__(self, network: nn.Module, outputs: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("outputs", torch.tensor(outputs), persistent=False)
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the selected outputs, in their order."""
        selected: Tensor = self.network(images)[:, self.outputs]
        return selected


class HardDistillation:
    """Mixes the class that a teacher predicts for each image into its target.

    The cross-entropy is linear in its target, so its value is (1 - weight) * CE(labels) + weight * CE(prediction). The
    teacher sees the images as the student does, after `augmentation`. Where its logits are not finite the targets are
    NaN, so that the update is skipped like every other one with a loss that is not finite.

    Args:
        augmentation: of the images and labels; None for none.
        teacher: in evaluation mode, on the device: images (N, C, H, W) -> logits (N, num_classes).
        weight: of the prediction, 0 to 1; 0.5 as published.
        num_classes: of the labels.
        label_smoothing: of labels that `augmentation` does not smooth; predictions are not smoothed.
        precision: context of the teacher's forward pass.
    """

    soft_targets = True

    def __init__(
        self,
        augmentation: BatchTransform | None,
        teacher: nn.Module,
        weight: float,
        num_classes: int,
        label_smoothing: float,
        precision: AbstractContextManager,
    ) -> None:
        self._augmentation, self._teacher, self._weight = augmentation, teacher, weight
        self._num_classes, self._label_smoothing, self._precision = num_classes, label_smoothing, precision

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, *, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Returns the augmented images (N, C, H, W) and targets (N, num_classes); `labels` (N,) are class numbers."""
        if self._augmentation is not None:
            images, labels = self._augmentation(images, labels, epoch=epoch, step=step)
        with self._precision:
            logits = self._teacher(images)
        predicted = F.one_hot(logits.argmax(1), self._num_classes).to(images.dtype)
        predicted = predicted.where(logits.isfinite().all(1, keepdim=True), torch.nan)
        return images, torch.lerp(self._distributions(labels).to(images.dtype), predicted, self._weight)

    def _distributions(self, labels: Tensor) -> Tensor:
        if self._augmentation is not None and self._augmentation.soft_targets:
            return labels
        smoothing = self._label_smoothing
        return F.one_hot(labels, self._num_classes) * (1 - smoothing) + smoothing / self._num_classes
