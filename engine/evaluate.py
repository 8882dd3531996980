"""Evaluation: exact sums over every image of every process, reduced once."""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch
from models.reparam import relative
from utils import distributed


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent, the mean cross-entropy, and how many images they were counted over.

    An image with a logit that is not finite counts as wrong, and leaves no mean loss but nan.
    """

    top1: float
    top5: float
    loss: float
    images: int
    nonfinite: int = 0  # images with such a logit

    def as_dict(self) -> dict[str, float]:
        """Returns the figures by name."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss, "images": self.images}

    def __str__(self) -> str:
        figures = f"Acc@1 {self.top1:.3f} Acc@5 {self.top5:.3f} loss {self.loss:.4f}"
        return f"{figures} {on_images(self.images, self.nonfinite)}"


def on_images(images: int, nonfinite: int) -> str:
    """Returns in words what was counted over, and how many of the images had answers that are not finite."""
    return f"on {images} images" + (f", {nonfinite} of them with answers that are not finite" if nonfinite else "")


def refuse_nonfinite(nonfinite: int, images: int) -> None:
    """Raises ValueError where a network had no finite answers to some images, so that its figures mean nothing."""
    if nonfinite:
        raise ValueError(
            f"the network's answers to {nonfinite} of {images} images are not finite numbers: its weights are broken, "
            "or too large for half precision (--amp off shows which)"
        )


def correct_within(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Returns for each image whether its label is among the k highest logits: (N, K), (N,) -> (N,) bool."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1)


def outputs(
    model: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    device: torch.device,
    autocast: AbstractContextManager,
) -> Iterator[tuple[Tensor, Batch]]:
    """Yields what a network in evaluation mode makes of each batch, with the batch; arguments as of `evaluate`.

    The network is left in the mode that it was in.
    """
    was_training = model.training
    model.eval()
    for batch in batches:
        with autocast:
            output = model(normalize(batch.images.to(device, non_blocking=True)))
        yield output, batch
    model.train(was_training)


def refuse_unreadable(count: int, known: list[str], figure: str) -> None:
    """Raises ValueError where images, some of them `known` by name in this process, would be missing in a figure."""
    if count:
        example = known[0] if known else "another process has their names"
        raise ValueError(f"{count} images can't be read, so the {figure} would be wrong: {example}")


class Counter:
    """Sums over the images of this process, kept on the device until `compute` reduces them over all processes."""

    def __init__(self, device: torch.device) -> None:
        self._correct1, self._correct5, self._loss, self._nonfinite = torch.zeros(4, dtype=torch.float64, device=device)
        self._images, self._unreadable = 0, list[str]()

    def add(self, logits: Tensor, labels: Tensor, unreadable: list[str]) -> None:
        """Takes in logits (N, K), labels (N,), and the images among them that could not be read."""
        finite = logits.isfinite().all(1)
        self._correct1 += (correct_within(logits, labels, 1) & finite).sum()
        self._correct5 += (correct_within(logits, labels, 5) & finite).sum()
        self._nonfinite += (~finite).sum()
        self._loss += F.cross_entropy(logits.double(), labels, reduction="sum")
        self._images += len(labels)
        self._unreadable += unreadable

    def compute(self) -> Evaluation:
        """Adds up over all processes once and divides once.

        Raises:
            ValueError: an image could not be read (its count would be wrong), or there are none.
        """
        sums = torch.stack((self._correct1, self._correct5, self._loss, self._nonfinite))
        counts = sums.new_tensor([self._images, len(self._unreadable)])
        total = distributed.all_reduce_sum(torch.cat((sums, counts))).tolist()
        correct1, correct5, loss, nonfinite, images, failures = total
        refuse_unreadable(int(failures), self._unreadable, "accuracy")
        if not images:
            raise ValueError("there are no images to evaluate")
        mean = math.nan if nonfinite else loss / images
        return Evaluation(100 * correct1 / images, 100 * correct5 / images, mean, int(images), int(nonfinite))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    device: torch.device,
    autocast: AbstractContextManager,
) -> Evaluation:
    """Evaluates a network on every image of every process.

    Args:
        model: gives logits (N, K); left in the mode that it was in.
        batches: every image of the set once, over all processes together; they may differ in number between them.
        normalize: turns uint8 images (N, C, H, W) on the device into the network's input.
        device: where the network is.
        autocast: precision of the forward pass.

    Raises:
        ValueError: an image could not be read, or there are none.
    """
    counter = Counter(device)
    for logits, batch in outputs(model, batches, normalize, device, autocast):
        counter.add(logits, batch.labels.to(device, non_blocking=True), batch.unreadable)
    return counter.compute()


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same images: their evaluations, the share of equal answers, the largest logit difference."""

    first: Evaluation
    second: Evaluation
    agreement: float  # percent of the images to which both give the same class, in finite logits
    difference: float  # max |second - first| / max |first| over all logits, infinite where one of them is not finite


@torch.inference_mode()
def compare(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Batch],
    normalize: nn.Module,
    device: torch.device,
    autocast: AbstractContextManager,
) -> Comparison:
    """Evaluates two networks, both in evaluation mode, side by side in one process; otherwise as `evaluate`.

    Raises:
        ValueError: an image could not be read, or there are none.
    """
    counters = Counter(device), Counter(device)
    same, largest, scale = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in batches:
        labels = batch.labels.to(device, non_blocking=True)
        images = normalize(batch.images.to(device, non_blocking=True))
        with autocast:
            expected, actual = first(images), second(images)
        for counter, logits in zip(counters, (expected, actual), strict=True):
            counter.add(logits, labels, batch.unreadable)
        finite = expected.isfinite().all(1) & actual.isfinite().all(1)
        same += ((expected.argmax(1) == actual.argmax(1)) & finite).sum()
        largest = largest.maximum((actual.double() - expected.double()).abs().max())
        scale = scale.maximum(expected.double().abs().max())
    evaluation1, evaluation2 = (counter.compute() for counter in counters)
    agreement = 100 * float(same) / evaluation1.images
    return Comparison(evaluation1, evaluation2, agreement, relative(largest, scale))
