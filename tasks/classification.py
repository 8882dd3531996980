"""Classification: one class per image, cross-entropy with mixed and smoothed labels, top-1 accuracy."""

from timm.loss import SoftTargetCrossEntropy
from torch import nn

from engine.metrics import ClassificationMetric
from engine.task import Task

IMAGENET_CLASSES = 1000


class Classification(Task):
    """The default task; the network's outputs are logits."""

    name = "classification"
    metric, metric_label = "top1", "Acc@1"

    def num_outputs(self) -> int:
        """Returns MODEL.NUM_CLASSES, or the number of classes of the training images.

        Raises:
            ValueError: `train` or `val` has more classes.
        """
        if self.cfg.THROUGHPUT_MODE or self.cfg.SUMMARY_MODE:  # which read no images
            return self.cfg.MODEL.NUM_CLASSES or IMAGENET_CLASSES
        found, val = len(self.train_source.classes), len(self.val_source.classes)
        wanted = self.cfg.MODEL.NUM_CLASSES or found
        if found > wanted:
            raise ValueError(f"the data set has {found} classes, but MODEL.NUM_CLASSES is {wanted}")
        if val > wanted:
            raise ValueError(f"val has {val} classes, train {found}: they need the same labels")
        return wanted

    def build_criterion(self, num_outputs: int) -> nn.Module:
        """Builds the mean cross-entropy of logits (N, K) and targets.

        With Mixup or CutMix the targets are smoothed distributions (N, K), otherwise class numbers (N,).
        """
        augmentation = self.batch_augmentation()
        if augmentation is not None and augmentation.soft_targets:
            return SoftTargetCrossEntropy()
        return nn.CrossEntropyLoss(label_smoothing=self.cfg.MODEL.LABEL_SMOOTHING)

    def build_metric(self, num_outputs: int) -> ClassificationMetric:
        """Builds the metric of logits (N, K)."""
        return ClassificationMetric(self.rank_info.device)
