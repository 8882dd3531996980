"""Evaluation: exact sums over every image of every process, reduced once."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch
from utils import distributed


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent, the mean cross-entropy, and how many images they were counted over."""

    top1: float
    top5: float
    loss: float
    images: int

    def as_dict(self) -> dict[str, float]:
        """Returns the figures by name."""
        return asdict(self)

    def __str__(self) -> str:
        return f"Acc@1 {self.top1:.3f} Acc@5 {self.top5:.3f} loss {self.loss:.4f} on {self.images} images"


def correct_within(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Returns for each image whether its label is among the k highest logits: (N, K), (N,) -> (N,) bool."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    device: torch.device,
    autocast: AbstractContextManager,
) -> Evaluation:
    """Counts over this process's batches, adds up over all processes once, and divides once.

    Args:
        model: gives logits (N, K); left in the mode that it was in.
        batches: every image of the set once, over all processes together; they may differ in number between them.
        normalize: turns uint8 images (N, C, H, W) on the device into the network's input.
        device: where the network is.
        autocast: precision of the forward pass.

    Raises:
        ValueError: an image could not be read (its count would be wrong), or there are none.
    """
    was_training = model.training
    model.eval()
    correct1, correct5, loss = torch.zeros(3, dtype=torch.float64, device=device)
    images, unreadable = 0, []
    for batch in batches:
        unreadable += batch.unreadable
        images += len(batch.labels)
        labels = batch.labels.to(device, non_blocking=True)
        with autocast:
            logits = model(normalize(batch.images.to(device, non_blocking=True)))
        correct1 += correct_within(logits, labels, 1).sum()
        correct5 += correct_within(logits, labels, 5).sum()
        loss += F.cross_entropy(logits.double(), labels, reduction="sum")
    model.train(was_training)
    counts = torch.tensor([images, len(unreadable)], dtype=torch.float64, device=device)
    sums = distributed.all_reduce_sum(torch.cat((torch.stack((correct1, correct5, loss)), counts)))
    top1, top5, total_loss, images, failures = sums.tolist()
    if failures:
        example = unreadable[0] if unreadable else "seen by another process"
        raise ValueError(f"{failures:.0f} images can't be read, so the accuracy would be wrong: {example}")
    if not images:
        raise ValueError("there are no images to evaluate")
    return Evaluation(100 * top1 / images, 100 * top5 / images, total_loss / images, int(images))
