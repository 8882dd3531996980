"""Metrics, one for each task, exact over every image of every process."""

from .base import Metric, Result, on_images
from .classification import ClassificationMetric, ClassificationResult
from .segmentation import SegmentationMetric, SegmentationResult
from .verification import VerificationMetric, VerificationResult

__all__ = [
    "ClassificationMetric",
    "ClassificationResult",
    "Metric",
    "Result",
    "SegmentationMetric",
    "SegmentationResult",
    "VerificationMetric",
    "VerificationResult",
    "on_images",
]
