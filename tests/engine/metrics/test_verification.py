"""Verification against cases that can be counted by hand, and against every threshold and every pair of pairs."""

import math
from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data import Batch, Pairs
from engine.evaluate import evaluate, refuse_nonfinite
from engine.metrics import VerificationMetric
from engine.metrics.verification import assign_folds, best_threshold, k_fold_accuracies, roc_auc, verify

CPU = torch.device("cpu")
# Few values, so that many scores are equal; both kinds of pairs.
rows_of_pairs = st.lists(
    st.tuples(st.sampled_from((-0.5, 0.0, 0.25, 0.5, 1.0)), st.booleans()), min_size=2, max_size=12
).filter(lambda rows: len({same for _, same in rows}) == 2)


def tensors(rows: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    scores, same = zip(*rows, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(same)


def right(scores: Tensor, same: Tensor, threshold: float) -> int:
    return int(((scores >= threshold) == same).sum())


@pytest.mark.parametrize(
    ("scores", "same", "expected"),
    [
        ((0.9, 0.7, 0.4, 0.1), (True, True, False, False), 0.55),
        ((0.1, 0.9, 0.4, 0.7), (False, True, False, True), 0.55),
        ((0.9, 0.7, 0.4, 0.1), (True, False, True, False), 0.8),  # 0.25 is as good, but lower
        ((0.9, 0.5, 0.5, 0.1), (True, True, False, False), 0.7),
        ((0.2, 0.4), (True, True), -0.3),  # below all of them
        ((0.2, 0.4), (False, False), 0.9),  # above all of them
    ],
)
def test_best_threshold(scores: tuple, same: tuple, expected: float) -> None:
    assert best_threshold(torch.tensor(scores).double(), torch.tensor(same)) == pytest.approx(expected)


@settings(derandomize=True)
@given(rows=rows_of_pairs)
def test_no_threshold_is_better(rows: list) -> None:
    scores, same = tensors(rows)
    candidates = [-2.0, *(float(s) + step for s in scores for step in (-0.01, 0, 0.01)), 3.0]
    assert right(scores, same, best_threshold(scores, same)) == max(right(scores, same, c) for c in candidates)


@pytest.mark.parametrize(
    ("scores", "same", "expected"),
    [
        ((0.9, 0.7, 0.4, 0.1), (True, True, False, False), 1.0),
        ((0.9, 0.7, 0.4, 0.1), (False, False, True, True), 0.0),
        ((0.9, 0.7, 0.4, 0.1), (True, False, True, False), 0.75),
        ((0.5, 0.5, 0.5), (True, False, False), 0.5),
        ((0.5, 0.5, 0.1), (True, False, False), 0.75),
    ],
)
def test_roc_auc(scores: tuple, same: tuple, expected: float) -> None:
    assert roc_auc(torch.tensor(scores), torch.tensor(same)) == pytest.approx(expected, abs=1e-15)


@settings(derandomize=True)
@given(rows=rows_of_pairs)
def test_roc_auc_counts_pairs_of_pairs(rows: list) -> None:
    scores, same = tensors(rows)
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(scores[same], scores[~same])]
    assert roc_auc(scores, same) == pytest.approx(sum(wins) / len(wins), abs=1e-12)


def test_folds_are_assigned_within_each_kind() -> None:
    same = torch.tensor([True, True, True, True, False, False, True, False, False])
    folds = assign_folds(same, 2)
    assert folds[same].tolist() == [1, 0, 1, 0, 1]
    assert folds[~same].tolist() == [1, 0, 1, 0]


def test_each_fold_uses_the_threshold_of_the_others() -> None:
    # Fold 1 holds 0.9 and 0.6, fold 0 holds 0.5 and 0.2: the thresholds are 0.75 in one, 0.35 in the other.
    scores, same = torch.tensor([0.9, 0.6, 0.5, 0.2]).double(), torch.tensor([True, False, True, False])
    assert assign_folds(same, 2).tolist() == [1, 1, 0, 0]
    assert k_fold_accuracies(scores, same, 2).tolist() == [0.5, 0.5]
    assert k_fold_accuracies(torch.tensor([0.9, 0.4, 0.8, 0.2]).double(), same, 2).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("folds", [1, 3, 10])
def test_folds_that_the_pairs_do_not_fill_are_refused(folds: int) -> None:
    same = torch.tensor([True, True, False, False, False])
    with pytest.raises(ValueError, match=f"{folds} folds: .* pairs of either kind, not 2"):
        assign_folds(same, folds)


def test_scores_depend_on_angles_only() -> None:
    # Three directions, of any length; pairs along one of them are the same.
    embeddings = torch.tensor([[2.0, 0], [0.1, 0], [0, 3.0], [0, 0.5], [-1.0, 0], [-4.0, 0]]).double()
    first, second = torch.tensor([[0, 1], [2, 3], [4, 5], [0, 2], [1, 4], [3, 5]]).T
    result = verify(embeddings, first, second, torch.tensor([True, True, True, False, False, False]), folds=3)
    assert (result.accuracy, result.spread, result.auc, result.pairs) == (100, 0, 1, 6)
    assert result.threshold == pytest.approx(0.5)
    assert str(result) == "accuracy 100.000 +- 0.000 AUC 1.00000 threshold 0.5000 on 6 pairs"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_embeddings_have_no_figures(value: float) -> None:
    embeddings = torch.randn(6, 3).double()
    embeddings[1, 2] = embeddings[5, 0] = value
    same = torch.tensor([True, True, False, False])
    first, second = torch.tensor([[0, 1], [1, 2], [2, 3], [4, 0]]).T
    for count in (1, 2):
        result = verify(embeddings, first, second, same, folds=2)
        assert (result.nonfinite, result.images, result.pairs) == (count, 6, 4)
        assert all(math.isnan(figure) for figure in (result.accuracy, result.spread, result.auc, result.threshold))
        assert str(result).endswith(f"on 4 pairs, {count} images without a finite embedding")
        with pytest.raises(ValueError, match=f"outputs for {count} of 6 images are not finite"):
            refuse_nonfinite(result)
        second[3] = 5


def test_an_embedding_outside_all_pairs_is_ignored() -> None:
    embeddings = torch.tensor([[2.0, 0], [0.1, 0], [0, 3.0], [0, 0.5], [float("nan"), 0]]).double()
    first, second = torch.tensor([[0, 1], [2, 3], [0, 2], [1, 3]]).T
    assert verify(embeddings, first, second, torch.tensor([True, True, False, False]), folds=2).accuracy == 100


def batches_of(images: Tensor, *cuts: tuple[int, ...], unreadable: tuple[str, ...] = ()) -> list[Batch]:
    """Batches of the images at these positions."""
    return [Batch(images[[*cut]], torch.zeros(len(cut)).long(), torch.tensor(cut), list(unreadable)) for cut in cuts]


PAIRS = Pairs(np.array([0, 2, 0, 1]), np.array([1, 3, 2, 3]), np.array([True, True, False, False]))


def metric() -> VerificationMetric:
    return VerificationMetric(CPU, PAIRS, folds=2)


def test_pairs_are_indices_of_the_data_set() -> None:
    """Whatever the batches that bring them, as those of several processes do."""
    images = torch.tensor([[2.0, 0], [0.1, 0.01], [0, 3.0], [0.2, 0.5], [7.0, 7.0]])
    expected = verify(images.double(), *(torch.from_numpy(part) for part in PAIRS), folds=2)
    model = nn.Identity().train()
    for cuts in ([(0, 1, 2, 3, 4)], [(0, 2, 4), (1, 3)], [(4,), (3, 1), (2, 0)]):
        assert evaluate(model, batches_of(images, *cuts), metric(), nn.Identity(), CPU, nullcontext()) == expected
    assert model.training


def test_an_unreadable_image_or_none_at_all_is_refused() -> None:
    unreadable = batches_of(torch.ones(4, 2), (0, 1, 2, 3), unreadable=("a.png: broken",))
    with pytest.raises(ValueError, match=r"1 images can't be read.*a\.png"):
        evaluate(nn.Identity(), unreadable, metric(), nn.Identity(), CPU, nullcontext())
    with pytest.raises(ValueError, match="there are no images to evaluate"):
        evaluate(nn.Identity(), [], metric(), nn.Identity(), CPU, nullcontext())
