"""Verification: do two images show the same person? Accuracy at the best threshold, as LFW counts it, and ROC AUC."""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Batch

from .evaluate import outputs, refuse_unreadable


class NotFinite(ValueError):
    """A network has no finite answers, so that nothing can be said of how good it is."""


@dataclass(frozen=True)
class Verification:
    """How well scores tell pairs of one class from pairs of two.

    `accuracy` is the mean over the folds, in percent, and `spread` their standard deviation; `auc` the area under the
    ROC curve, from 0 to 1; `threshold` the best one over all pairs.
    """

    accuracy: float
    spread: float
    auc: float
    threshold: float
    pairs: int

    def as_dict(self) -> dict[str, float]:
        """Returns the figures by name."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.3f} +- {self.spread:.3f} AUC {self.auc:.5f} threshold {self.threshold:.4f} "
            f"on {self.pairs} pairs"
        )


@torch.inference_mode()
def embed(model: nn.Module, batches: Iterable[Batch], normalize: nn.Module, device: torch.device) -> Tensor:
    """Returns the embeddings (N, E) of images in the order of the batches, in float64 on the CPU.

    Args:
        model: gives embeddings (N, E); left in the mode that it was in.
        batches: of uint8 images.
        normalize: turns them, on the device, into the network's input.
        device: where the network is.

    Raises:
        ValueError: an image could not be read, or there are none.
    """
    embeddings, unreadable = list[Tensor](), list[str]()
    for output, batch in outputs(model, batches, normalize, device, nullcontext()):
        unreadable += batch.unreadable
        embeddings.append(output.double().cpu())
    refuse_unreadable(len(unreadable), unreadable, "accuracy")
    if not embeddings:
        raise ValueError("there are no images to evaluate")
    return torch.cat(embeddings)


def verify(embeddings: Tensor, first: Tensor, second: Tensor, same: Tensor, folds: int = 10) -> Verification:
    """Scores pairs by the cosine of the angle between their embeddings.

    Args:
        embeddings: (N, E).
        first: int64 (P,), rows of `embeddings`.
        second: int64 (P,), the rows that they are paired with.
        same: bool (P,), whether both are of one class.
        folds: as `deal_folds` takes it.

    Raises:
        NotFinite: an embedding of a pair is not.
        ValueError: as `deal_folds`.
    """
    broken = ~embeddings.isfinite().all(1)
    if count := int(broken[torch.cat((first, second)).unique()].sum()):
        raise NotFinite(
            f"the embeddings of {count} images are not finite numbers, so the accuracy would be wrong: the weights are "
            "broken"
        )
    scores = F.cosine_similarity(embeddings[first], embeddings[second])
    accuracies = k_fold_accuracies(scores, same, folds)
    return Verification(
        100 * accuracies.mean().item(),
        100 * accuracies.std(correction=0).item(),
        roc_auc(scores, same),
        best_threshold(scores, same),
        len(scores),
    )


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """Returns the threshold from which on to say "same" with the fewest mistakes; of several the highest.

    It lies halfway between two scores, or 1 beyond all of them. Takes scores (P,) and truth (P,) bool.
    """
    scores, order = scores.sort(descending=True)
    # At position k the first k pairs are called the same: right are the same among them and the different behind.
    signs = 2 * same[order].long() - 1
    right = F.pad(signs.cumsum(0), (1, 0))
    edges = torch.cat((scores[:1] + 1, scores, scores[-1:] - 1))
    upper, lower = edges[:-1], edges[1:]
    right[upper == lower] = -len(scores) - 1  # no threshold parts equal scores
    best = int(right.argmax())
    return float((upper[best] + lower[best]) / 2)


def deal_folds(same: Tensor, folds: int) -> Tensor:
    """Returns the fold (P,) of each pair: either kind, same (P,) or not, is spread over all folds in turn.

    Raises:
        ValueError: fewer than 2 folds, or fewer pairs of either kind than folds.
    """
    fewest = int(torch.minimum(same.sum(), (~same).sum()))
    if folds < 2 or fewest < folds:
        raise ValueError(f"{folds} folds: there must be 2 at least, and as many pairs of either kind, not {fewest}")
    return torch.where(same, same.cumsum(0), (~same).cumsum(0)) % folds


def k_fold_accuracies(scores: Tensor, same: Tensor, folds: int) -> Tensor:
    """Returns for each fold the share (folds,) of its pairs that the best threshold of all other folds gets right.

    Args:
        scores: (P,).
        same: bool (P,).
        folds: as `deal_folds` takes it.

    Raises:
        ValueError: as `deal_folds`.
    """
    fold, accuracies = deal_folds(same, folds), []
    for k in range(folds):
        held_out = fold == k
        threshold = best_threshold(scores[~held_out], same[~held_out])
        accuracies.append(((scores[held_out] >= threshold) == same[held_out]).double().mean())
    return torch.stack(accuracies)


def roc_auc(scores: Tensor, same: Tensor) -> float:
    """Returns how often a pair of one class scores higher than a pair of two; equal scores count half.

    Takes scores (P,) and truth (P,) bool, with at least one of each kind.
    """
    _, position, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[position].double()
    positives, negatives = int(same.sum()), int((~same).sum())
    return float((ranks[same].sum() - positives * (positives + 1) / 2) / (positives * negatives))
