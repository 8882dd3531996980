"""The loss that fits the labels."""

from timm.loss import SoftTargetCrossEntropy
from torch import nn


def build_loss(soft_targets: bool, label_smoothing: float = 0.0) -> nn.Module:
    """Returns a mean cross-entropy of logits (N, K).

    Args:
        soft_targets: the labels are distributions (N, K), as mixup and CutMix make them, already smoothed;
            otherwise they are class numbers (N,).
        label_smoothing: share of the probability that is spread over all classes.
    """
    return SoftTargetCrossEntropy() if soft_targets else nn.CrossEntropyLoss(label_smoothing=label_smoothing)
