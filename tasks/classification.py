"""Classification: one class per image, cross-entropy with mixed and smoothed labels, top-1 accuracy."""

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import data
from data.class_names import IMAGENET_CLASSES, first_difference, read_class_names
from data.real_labels import real_labels
from engine.classes import SAME_CLASSES, ClassMatch, Outputs, match_classes
from engine.distillation import HardDistillation, SelectedOutputs
from engine.metrics import ClassificationMetric
from engine.precision import autocast, dtype_of
from engine.task import Task
from models.checkpoints import Checkpoint, build_from, read_checkpoint
from models.reparam import is_reparameterizable, to_deploy
from utils.log import NAME


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
        self._check_normalization(path, checkpoint.meta.get("dataset", ""))
        network = build_from(checkpoint, self.cfg.DISTILL.ARCH or None)
        classes = self._match_teacher(checkpoint, network.num_classes)
        teacher = to_deploy(network.model) if is_reparameterizable(network.model) else network.model
        teacher = teacher.float().to(device).requires_grad_(False)
        try:
            with torch.inference_mode():
                teacher(torch.zeros(1, 3, *self.train_size, device=device))
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

    def _check_normalization(self, path: str, dataset: str) -> None:
        """Raises ValueError if a teacher's images are normalized in another way than those of the training."""
        own, other = data.DATASETS[self.dataset_name], data.DATASETS.get(dataset)
        if other and (own.mean, own.std) != (other.mean, other.std):
            raise ValueError(
                f"DISTILL.TEACHER {path} was trained on images normalized as those of {dataset}, not of "
                f"{self.dataset_name}"
            )

    def build_criterion(self, num_outputs: int) -> nn.Module:
        """Builds the mean cross-entropy of logits (N, K) and targets.

        With Mixup, CutMix or distillation the targets are distributions (N, K), otherwise class numbers (N,).
        """
        augmentation = self.batch_augmentation()
        if augmentation is not None and augmentation.soft_targets:
            return SoftTargetCrossEntropy()
        return nn.CrossEntropyLoss(label_smoothing=self.cfg.MODEL.LABEL_SMOOTHING)

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
