"""Verification: embeddings of faces, trained with a margin softmax, evaluated on pairs of unseen people.

A margin softmax has a learned direction for each person of the training set. Checkpoints save it apart from the weights
of the network.
"""

from functools import cached_property
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

import data
from engine.classes import SAME_CLASSES, ClassMatch
from engine.metrics import VerificationMetric
from engine.task import CLASSES, MIXING, Task
from models.checkpoints import Checkpoint, Network


class MarginSoftmax(NamedTuple):
    """A loss of pytorch-metric-learning, and the margin and scale of its paper."""

    loss: str
    margin: float
    scale: float


LOSSES = {
    "arcface": MarginSoftmax("ArcFaceLoss", 28.6, 64.0),  # the margin in degrees
    "cosface": MarginSoftmax("CosFaceLoss", 0.35, 64.0),  # a cosine
    # AM-Softmax (arXiv:1801.05599, Eq. 6) is the formula of CosFace (arXiv:1801.09414, Eq. 4), with another scale.
    "amsoftmax": MarginSoftmax("CosFaceLoss", 0.35, 30.0),
}


class TargetsByIndex:
    """Mixed into a loss of pytorch-metric-learning: the same values, without its boolean masks.

    The host would wait in each update for the number of elements that such a mask selects.
    """

    def forward(self: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss of embeddings (N, E) and labels (N,)."""
        cosine, targets = self.get_cosine(embeddings), labels[:, None]
        own = cosine.gather(1, targets)
        shifted = cosine.scatter_add(1, targets, self.modify_cosine_of_target_classes(own) - own)
        return F.cross_entropy(self.scale_logits(shifted, embeddings), labels, reduction="none").mean()


class Verification(Task):
    """The network's outputs are embeddings of FACE.EMBEDDING numbers."""

    name = "verification"
    metric, metric_label = "accuracy", "accuracy"
    labels, default_dataset = "identities", "faces"
    section = "FACE"
    unused = ("DISTILL", "MODEL.NUM_CLASSES", "MODEL.LABEL_SMOOTHING", "TRAIN.CLASS_WEIGHTS", *MIXING, *CLASSES)

    def num_outputs(self) -> int:
        """Returns the size of an embedding."""
        return self.cfg.FACE.EMBEDDING

    def build_criterion(self, num_outputs: int) -> nn.Module:
        """Builds the margin softmax of embeddings (N, E) and labels (N,).

        Raises:
            ValueError: pytorch-metric-learning is not installed.
        """
        try:
            from pytorch_metric_learning import losses
        except ImportError as error:
            raise ValueError("a margin softmax needs the extra `face`: pip install pytorch-metric-learning") from error
        face, kind = self.cfg.FACE, LOSSES[self.cfg.FACE.LOSS]
        margin = kind.margin if face.MARGIN is None else face.MARGIN
        scale = kind.scale if face.SCALE is None else face.SCALE
        people = len(self.train_source.classes)
        loss = type(kind.loss, (TargetsByIndex, getattr(losses, kind.loss)), {})
        return loss(num_classes=people, embedding_size=num_outputs, margin=margin, scale=scale)

    @cached_property
    def pairs(self) -> data.Pairs:
        """The pairs of test images: listed in FACE.PAIRS, or drawn, the same in every run."""
        face = self.cfg.FACE
        if face.PAIRS:
            return data.read_pairs(face.PAIRS, self.val_source)
        return data.draw_pairs(self.val_source.labels, face.NUM_PAIRS)

    def settings_of(self, network: Network) -> dict[str, Any]:
        """Returns what the configuration would say of the network of a checkpoint, by key."""
        return {"FACE.EMBEDDING": network.num_classes}

    def class_names(self) -> None:
        """Returns None: the outputs are not classes, and the names of people are not to be passed on with weights."""

    def match_classes(self, checkpoint: Checkpoint, num_outputs: int) -> ClassMatch:
        """Accepts any classes: embeddings are not tied to the people of a data set."""
        return SAME_CLASSES

    def build_metric(self, num_outputs: int, classes: ClassMatch = SAME_CLASSES) -> VerificationMetric:
        """Builds the metric of embeddings (N, E)."""
        return VerificationMetric(self.rank_info.device, self.pairs, self.cfg.FACE.FOLDS)
