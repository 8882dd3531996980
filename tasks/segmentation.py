"""Semantic segmentation: one class per pixel, a decoder on the levels of a backbone, mean IoU."""

from collections.abc import Mapping
from typing import Any, cast

import timm
from timm.layers import to_2tuple
from torch import Tensor, nn

from data.cityscapes import CITYSCAPES
from data.segmentation import IGNORED, MaskedDataset, segmentation_eval_transform, segmentation_train_transform
from engine.classes import SAME_CLASSES, ClassMatch
from engine.metrics import SegmentationMetric
from engine.task import CLASSES, Size, Task, except_new
from models import RepMLPNet, default_image_size, list_models
from models.build import changeable, check_changeable, structure_changes, timm_name
from models.checkpoints import Checkpoint, Network, build_from
from models.dense import FULL_RANK
from models.segmentation import SegmentationNetwork, describe_segmentation, segmentation_from
from utils.seed import seed_everything


class AuxiliaryLoss(nn.Module):
    """The loss of the logits plus a multiple of that of an auxiliary head's logits."""

    def __init__(self, criterion: nn.Module, weight: float) -> None:
        super().__init__()
        self.criterion, self.weight = criterion, weight

    def forward(self, outputs: tuple[Tensor, Tensor], masks: Tensor) -> Tensor:
        """Takes a pair of logits (N, K, H, W), the auxiliary ones second, and masks (N, H, W)."""
        logits, auxiliary = outputs
        loss: Tensor = self.criterion(logits, masks) + self.weight * self.criterion(auxiliary, masks)
        return loss


class Segmentation(Task):
    """Trains on random crops, evaluates whole images unless DATA.TEST_SIZE is set."""

    name = "segmentation"
    metric, metric_label, agreement_label = "miou", "mIoU", "pixel agreement"
    labels, default_dataset = "masks", "cityscapes"
    section = "SEG"
    unused = ("AUG", "DISTILL", "TEST.CROP", "MODEL.NUM_CLASSES", "DATA.SAMPLING", "TRAIN.CLASS_WEIGHTS", *CLASSES)
    dataset_type, whole_images = MaskedDataset, True
    least_batch_size = 2  # decoders pool each image to a single value per channel and batch-normalise it

    def train_transform(self) -> Any:
        """Returns the joint augmentation of an image and its mask."""
        return segmentation_train_transform(self.train_size, self.cfg.SEG.SCALE, self.statistics.mean)

    def eval_transform(self, size: Size | None) -> Any:
        """Returns the joint transform of a test image and its mask."""
        return segmentation_eval_transform(size)

    def rand_augment(self) -> None:
        """Returns None: masks would have to follow the images."""

    def rand_augment_place(self) -> str:
        """Returns nothing."""
        return ""

    def batch_augmentation(self) -> None:
        """Returns None: images and masks are augmented together, one by one."""

    def num_outputs(self) -> int:
        """Returns the number of classes of the masks."""
        if self.cfg.THROUGHPUT_MODE or self.cfg.SUMMARY_MODE:  # which read no images
            return len(CITYSCAPES)
        return len(self.train_source.classes)

    def build_network(self, num_outputs: int, weights: Checkpoint | None = None) -> nn.Module:
        """Builds decoder and backbone with fresh weights, in the structure of MODEL.PRETRAINED if it is set.

        Args:
            num_outputs: classes of a pixel.
            weights: the classifier MODEL.PRETRAINED; otherwise those of the whole network, or None.

        Raises:
            ValueError: an option does not fit the architecture.
        """
        seg, own = self.cfg.SEG, changeable(self.arch)
        if own:
            check_changeable(self.arch, {f"MODEL.{part.upper()}": part for part in self.structure})
        elif seg.DOWNSAMPLE or seg.BACKBONE_SIZE or self.structure:
            raise ValueError(
                "SEG.DOWNSAMPLE, SEG.BACKBONE_SIZE and changes of the structure are for our own architectures, not for "
                f"{self.arch}"
            )
        _check_fixed_size(self.arch, self.train_size, self.test_size(self.train_size))
        options: dict[str, Any] = {}
        if own and self.cfg.MODEL.PRETRAINED and weights is not None:
            options = self._options_of(self._classifier(weights))
        options |= self.structure | self.form_options(weights) | self.input_options
        if self.cfg.MODEL.DROP_PATH:
            options["drop_path_rate"] = self.cfg.MODEL.DROP_PATH
        if seg.BACKBONE_SIZE:
            options["img_size"] = to_2tuple(seg.BACKBONE_SIZE)
        if seg.AUX_WEIGHT:
            options["auxiliary"] = True
        if seg.DOWNSAMPLE:
            options |= {"downsample": seg.DOWNSAMPLE, "rank": seg.RANK}
        if seg.OUTPUT_STRIDE:
            options["output_stride"] = seg.OUTPUT_STRIDE
        seed_everything(self.cfg.SEED)
        return SegmentationNetwork(self.arch, num_outputs, seg.DECODER, seg.WIDTH, **options)

    def _classifier(self, checkpoint: Checkpoint) -> Network:
        """Builds the pretrained classifier.

        Its own Global Perceptrons may be of another width: those of the backbone are then initialised anew.
        """
        structure = {part: value for part, value in self.structure.items() if part != "gp_reduction"}
        return build_from(checkpoint, self.arch, **structure)

    def _options_of(self, trained: Network) -> dict[str, Any]:
        """Returns the image size and structure of a pretrained classifier, which are those of the backbone.

        Raises:
            ValueError: SEG.BACKBONE_SIZE asks for partitions that the weights do not have.
        """
        if self.cfg.SEG.BACKBONE_SIZE and isinstance(trained.model, RepMLPNet):
            raise ValueError(
                f"SEG.BACKBONE_SIZE = {self.cfg.SEG.BACKBONE_SIZE}: the partitions of a RepMLPNet are those of its "
                "weights in MODEL.PRETRAINED; leave SEG.BACKBONE_SIZE out"
            )
        return {"img_size": trained.image_size} | structure_changes(self.arch, trained.model)

    def load_pretrained(self, network: nn.Module, checkpoint: Checkpoint) -> str:
        """Loads the backbone from a classifier."""
        assert isinstance(network, SegmentationNetwork)
        fresh = network.load_backbone(self._classifier(checkpoint).model)
        return f"the classifier in {checkpoint.path}{checkpoint.adapted}, for the backbone{except_new(fresh)}"

    @classmethod
    def metadata(
        cls, arch: str, network: nn.Module, image_size: Size, form: str | None, images: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the metadata of a checkpoint, which are the arguments of the network."""
        return describe_segmentation(network, form, **images)

    @classmethod
    def network_from(cls, checkpoint: Checkpoint, arch: str | None = None, **changes: Any) -> Network:
        """Builds the network of a checkpoint from its metadata."""
        network = segmentation_from(checkpoint)
        own = network.arguments["arch"]
        if arch not in (None, own):
            raise ValueError(f"{checkpoint.path} is of {own}, not of {arch}: leave the architecture out")
        size = to_2tuple(network.arguments.get("img_size") or default_image_size(own))
        return Network(own, network, network.num_classes, size, network.arguments["in_chans"])

    def settings_of(self, network: Network) -> dict[str, Any]:
        """Returns what the configuration would say of the network of a checkpoint, by key."""
        arguments = cast(SegmentationNetwork, network.model).arguments
        settings = {"SEG.DECODER": arguments["decoder"], "SEG.WIDTH": arguments["width"]}
        settings |= {"SEG.DOWNSAMPLE": arguments.get("downsample"), "SEG.RANK": arguments.get("rank", FULL_RANK)}
        settings |= {"SEG.OUTPUT_STRIDE": arguments.get("output_stride")}
        parts = {part: arguments[part] for part in self.structure if part in arguments}
        plain = {part: tuple(value) if isinstance(value, list) else value for part, value in parts.items()}
        return settings | {f"MODEL.{part.upper()}": value for part, value in plain.items()}

    def network_to_evaluate(self, checkpoint: Checkpoint, arch: str | None) -> Network:
        """Builds the network of a checkpoint; DATA.IMG_SIZE, the size of a crop, does not change it."""
        return self.network_from(checkpoint, arch)

    def build_criterion(self, num_outputs: int) -> nn.Module:
        """Builds the mean cross-entropy of logits (N, K, H, W) and masks (N, H, W) over the labelled pixels."""
        criterion = nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=self.cfg.MODEL.LABEL_SMOOTHING)
        weight = self.cfg.SEG.AUX_WEIGHT
        return AuxiliaryLoss(criterion, weight) if weight else criterion

    def build_metric(self, num_outputs: int, classes: ClassMatch = SAME_CLASSES) -> SegmentationMetric:
        """Builds the metric of logits (N, K, H, W)."""
        return SegmentationMetric(self.rank_info.device, num_outputs)


def _check_fixed_size(arch: str, *sizes: Size | None) -> None:
    """Raises ValueError if an architecture of timm takes images of one size, and others are to be segmented."""
    pretrained = timm.get_pretrained_cfg(timm_name(arch))
    height, width = default_image_size(arch)
    if arch not in list_models() and pretrained and pretrained.fixed_input_size and {*sizes} != {(height, width)}:
        raise ValueError(
            f"{arch} takes images of {height}x{width} only: set DATA.IMG_SIZE and DATA.TEST_SIZE to it, or choose "
            "another MODEL.ARCH"
        )
