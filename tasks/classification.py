"""Classification: one class per image, cross-entropy with mixed and smoothed labels, top-1 accuracy."""

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

import data
from data.class_names import IMAGENET_CLASSES, first_difference, read_class_names
from data.real_labels import real_labels
from engine.classes import SAME_CLASSES, ClassMatch, Outputs, match_classes
from engine.distillation import HardDistillation, SelectedOutputs
from engine.metrics import ClassificationMetric
from engine.precision import autocast, dtype_of
from engine.task import Task
from models.checkpoints import Checkpoint, build_from, read_checkpoint, statistics_in
from models.reparam import is_reparameterizable, to_deploy
from utils.log import NAME

CLASS_WEIGHTS = ("none", "balanced")


class WeightedCrossEntropy(nn.Module):
    """The cross-entropy -sum_k weight_k target_k log p_k of an image, averaged over the images.

    It is divided by the number of images. torch divides the loss of class numbers by the sum of their weights, which
    differs between the batches of several processes and accumulated ones, so that the mean of their losses would not be
    that of the whole batch. The loss is linear in the target: that of a mixed, smoothed or distilled one is the mixture
    of the losses.

    Args:
        weight: of each class, (K,); saved with the run.
        label_smoothing: of class numbers.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss of logits (N, K) and class numbers (N,) or distributions (N, K)."""
        smoothing = 0.0 if targets.is_floating_point() else self.label_smoothing
        logits = logits.to(torch.promote_types(logits.dtype, self.weight.dtype))  # half precision would round them
        weight = self.weight.to(logits.dtype)
        losses = F.cross_entropy(logits, targets, weight, reduction="none", label_smoothing=smoothing)
        return losses.mean()


def balanced_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Returns weights that are inversely proportional to the sizes of the classes, and whose mean over the images is 1.

    They are those of scikit-learn's `balanced`: N / (K * n_k) with N images and n_k of class k, where K counts the
    classes that have images. Others have the weight 0: no label is one of them.

    Args:
        labels: class numbers of the training images, int64 (N,).
        num_classes: length of the result, float32.
    """
    sizes = np.bincount(labels, minlength=num_classes)
    filled = np.count_nonzero(sizes)
    weights = np.divide(len(labels), filled * sizes, out=np.zeros(len(sizes)), where=sizes > 0)
    return torch.from_numpy(weights).float()


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
        difference = first_difference(self.val_source.classes, self.train_source.classes[:val])
        if difference:
            raise ValueError(f"in val {difference} as in train: they need the same labels")
        return wanted

    def batch_augmentation(self) -> data.BatchTransform | None:
        """Builds random erasing, Mixup and CutMix, and distillation where DISTILL.TEACHER is set; None for nothing."""
        augmentation = super().batch_augmentation()
        if not self.cfg.DISTILL.TEACHER:
            return augmentation
        device = self.rank_info.device
        return HardDistillation(
            augmentation,
            self.teacher,
            self.cfg.DISTILL.WEIGHT,
            self.num_outputs(),
            self.cfg.MODEL.LABEL_SMOOTHING,
            autocast(device, dtype_of(self.cfg.AMP, device)),
        )

    @cached_property
    def teacher(self) -> nn.Module:
        """The network in DISTILL.TEACHER, converted if it can be, on the device.

        Raises:
            ValueError: it is of another task, has other classes, or does not take images of this size or normalization.
        """
        path, device = self.cfg.DISTILL.TEACHER, self.rank_info.device
        checkpoint = read_checkpoint(path)
        task = checkpoint.meta.get("task", self.name)
        if task != self.name:
            raise ValueError(f"DISTILL.TEACHER {path} is of TASK {task}: a teacher is a classifier")
        network = build_from(checkpoint, self.cfg.DISTILL.ARCH or None)
        self._check_normalization(checkpoint, network.in_chans)
        classes = self._match_teacher(checkpoint, network.num_classes)
        teacher = to_deploy(network.model) if is_reparameterizable(network.model) else network.model
        teacher = teacher.float().to(device).requires_grad_(False)
        try:
            with torch.inference_mode():
                teacher(torch.zeros(1, self.channels, *self.train_size, device=device))
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"DISTILL.TEACHER {path} can't see the training images: {error}") from error
        return teacher if classes.outputs is None else SelectedOutputs(teacher, classes.outputs).to(device)

    def _match_teacher(self, checkpoint: Checkpoint, num_outputs: int) -> ClassMatch:
        """Finds the output of the teacher for each class of the training images; raises ValueError as `teacher`."""
        own = self.num_outputs()
        outputs = Outputs.of(checkpoint, num_outputs)
        classes = match_classes(outputs, self.train_source, self.cfg.DATA.DATA_PATH, fewer=num_outputs == own)
        if classes.outputs is None and num_outputs != own:
            raise ValueError(f"DISTILL.TEACHER {checkpoint.path} is for {num_outputs} classes, the training for {own}")
        if classes.note:
            logging.getLogger(NAME).info(f"DISTILL.TEACHER {checkpoint.path}: {classes.note}")
        return classes

    def _check_normalization(self, checkpoint: Checkpoint, channels: int) -> None:
        """Raises ValueError if a teacher's images are normalized in another way than those of the training."""
        stored, trained_on = statistics_in(checkpoint, channels), checkpoint.meta.get("dataset", "")
        spec = data.spec_of(trained_on) if data.is_known(trained_on) else None
        other = data.Statistics(*stored) if stored else spec.statistics(channels) if spec else None
        if other and other != self.statistics:
            raise ValueError(
                f"DISTILL.TEACHER {checkpoint.path} was trained on images normalized by {other}, these are by "
                f"{self.statistics}: set DATA.MEAN and DATA.STD to those of the teacher"
            )

    def build_criterion(self, num_outputs: int) -> nn.Module:
        """Builds the mean cross-entropy of logits (N, K) and targets.

        With Mixup, CutMix or distillation the targets are distributions (N, K), otherwise class numbers (N,).
        """
        smoothing = self.cfg.MODEL.LABEL_SMOOTHING
        if self.cfg.TRAIN.CLASS_WEIGHTS == "balanced":
            return WeightedCrossEntropy(balanced_weights(self.train_source.labels, num_outputs), smoothing)
        augmentation = self.batch_augmentation()
        if augmentation is not None and augmentation.soft_targets:
            return SoftTargetCrossEntropy()
        return nn.CrossEntropyLoss(label_smoothing=smoothing)

    def match_classes(self, checkpoint: Checkpoint, num_outputs: int) -> ClassMatch:
        """Finds the output of the network for each class of the test images, by name or by position.

        Raises:
            ValueError: there is none, or it is not certain.
        """
        outputs = Outputs.of(checkpoint, num_outputs)
        if self.cfg.TEST.CLASSES:
            names = read_class_names(Path(self.cfg.TEST.CLASSES), num_outputs)
            outputs = replace(outputs, names=names)
        fewer = num_outputs == self.cfg.MODEL.NUM_CLASSES
        return match_classes(outputs, self.val_source, self.cfg.DATA.DATA_PATH, fewer=fewer)

    def build_metric(self, num_outputs: int, classes: ClassMatch = SAME_CLASSES) -> ClassificationMetric:
        """Builds the metric of logits (N, K), of which TEST says what it counts.

        Raises:
            ValueError: the test images have no ReaL labels, and these are asked for.
        """
        test = self.cfg.TEST
        return ClassificationMetric(
            self.rank_info.device,
            classes.outputs,
            masked=test.MASK if classes.subset else None,
            real=real_labels(self.val_source) if test.REAL_LABELS else None,
            per_class=len(self.val_source.classes) if test.PER_CLASS else None,
        )
