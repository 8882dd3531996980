"""Verification: do two images show the same person? Accuracy at the best threshold, as LFW counts it, and ROC AUC."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Batch, Pairs
from utils import distributed

from .base import Metric, Result


@dataclass(frozen=True, kw_only=True)
class VerificationResult(Result):
    """How well scores separate pairs of one class from pairs of two.

    `accuracy` is the mean over the folds, in percent, and `spread` their standard deviation; `auc` the area under the
    ROC curve, from 0 to 1; `threshold` the best one over all pairs. All are nan if an embedding is not finite.
    """

    accuracy: float
    spread: float
    auc: float
    threshold: float
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name."""
        return {name: getattr(self, name) for name in ("accuracy", "spread", "auc", "threshold", "pairs")}

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.3f} +- {self.spread:.3f} AUC {self.auc:.5f} threshold {self.threshold:.4f} "
            f"on {self.pairs} pairs" + (f", {self.nonfinite} images without a finite embedding" * bool(self.nonfinite))
        )


class VerificationMetric(Metric):
    """Takes embeddings (N, E) and scores pairs of images by their cosine similarity.

    Args:
        device: of the network.
        pairs: indices of the images in the data set.
        folds: as `assign_folds` takes it.

    Raises:
        ValueError: as `assign_folds`.
    """

    def __init__(self, device: torch.device, pairs: Pairs, folds: int) -> None:
        self._device, self._folds = device, folds
        self._first, self._second, self._same = (torch.from_numpy(part) for part in pairs)
        assign_folds(self._same, folds)  # raises before the evaluation
        self._indices, self._embeddings = list[Tensor](), list[Tensor]()

    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Accumulates embeddings (N, E)."""
        self._indices.append(batch.indices)
        self._embeddings.append(outputs.double())

    def predictions(self, outputs: Tensor) -> None:
        """Returns None: embeddings are not logits."""

    def compute(self) -> VerificationResult:
        """Gathers the embeddings of all processes and scores the pairs on each."""
        own = torch.cat(self._embeddings) if self._embeddings else torch.empty(0, 0, dtype=torch.float64)
        indices = torch.cat(self._indices) if self._indices else torch.empty(0, dtype=torch.int64)
        embeddings = torch.cat(distributed.gather_rows(own, self._device))
        order = torch.cat(distributed.gather_rows(indices, self._device))
        if not len(embeddings):
            raise ValueError("there are no images to evaluate")
        return verify(embeddings[order.argsort()], self._first, self._second, self._same, self._folds)


def verify(embeddings: Tensor, first: Tensor, second: Tensor, same: Tensor, folds: int = 10) -> VerificationResult:
    """Scores pairs by the cosine similarity of their embeddings.

    Args:
        embeddings: (N, E).
        first: int64 (P,), rows of `embeddings`.
        second: int64 (P,), likewise.
        same: bool (P,), whether both are of one class.
        folds: as `assign_folds` takes it.

    Raises:
        ValueError: as `assign_folds`.
    """
    broken = ~embeddings.isfinite().all(1)
    nonfinite = int(broken[torch.cat((first, second)).unique()].sum())
    scores = F.cosine_similarity(embeddings[first], embeddings[second])
    accuracies = 100 * k_fold_accuracies(scores, same, folds)
    return VerificationResult(
        accuracy=math.nan if nonfinite else accuracies.mean().item(),
        spread=math.nan if nonfinite else accuracies.std(correction=0).item(),
        auc=math.nan if nonfinite else roc_auc(scores, same),
        threshold=math.nan if nonfinite else best_threshold(scores, same),
        pairs=len(same),
        images=len(embeddings),
        nonfinite=nonfinite,
    )


def best_threshold(scores: Tensor, same: Tensor) -> float:
    """Returns the threshold at or above which "same" makes the fewest mistakes; of several, the highest.

    It lies halfway between two scores, or beyond all of them. Takes scores (P,) and truth (P,) bool.
    """
    scores, order = scores.sort(descending=True)
    # At position k the first k pairs are called the same; right[k] counts the correct ones, up to a constant.
    signs = 2 * same[order].long() - 1
    right = F.pad(signs.cumsum(0), (1, 0))
    edges = torch.cat((scores[:1] + 1, scores, scores[-1:] - 1))
    upper, lower = edges[:-1], edges[1:]
    right[upper == lower] = -len(scores) - 1  # no threshold separates equal scores
    best = int(right.argmax())
    return float((upper[best] + lower[best]) / 2)


def assign_folds(same: Tensor, folds: int) -> Tensor:
    """Returns the fold (P,) of each pair; the pairs of either kind, same (P,) or not, alternate over all folds.

    Raises:
        ValueError: fewer than 2 folds, or fewer pairs of either kind than folds.
    """
    fewest = int(torch.minimum(same.sum(), (~same).sum()))
    if folds < 2 or fewest < folds:
        raise ValueError(
            f"{folds} folds: 2 at least are needed, and as many pairs of either kind, not {fewest}: set FACE.FOLDS "
            "lower, or FACE.NUM_PAIRS higher"
        )
    return torch.where(same, same.cumsum(0), (~same).cumsum(0)) % folds


def k_fold_accuracies(scores: Tensor, same: Tensor, folds: int) -> Tensor:
    """Returns the accuracy (folds,) of each fold at the best threshold of all other folds.

    Args:
        scores: (P,).
        same: bool (P,).
        folds: as `assign_folds` takes it.

    Raises:
        ValueError: as `assign_folds`.
    """
    fold, accuracies = assign_folds(same, folds), []
    for k in range(folds):
        held_out = fold == k
        threshold = best_threshold(scores[~held_out], same[~held_out])
        accuracies.append(((scores[held_out] >= threshold) == same[held_out]).double().mean())
    return torch.stack(accuracies)


def roc_auc(scores: Tensor, same: Tensor) -> float:
    """Returns the area under the ROC curve; equal scores count half.

    Takes scores (P,) and truth (P,) bool, with at least one of each kind.
    """
    _, position, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[position].double()
    positives, negatives = int(same.sum()), int((~same).sum())
    return float((ranks[same].sum() - positives * (positives + 1) / 2) / (positives * negatives))
