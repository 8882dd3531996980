"""The base class of the tasks: images, network, loss and metric."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from timm.layers import to_2tuple
from torch import nn
from yacs.config import CfgNode

import data
from data.class_names import first_difference
from models import canonical_name, create_model, default_image_size
from models.build import REGISTRY, check_changeable
from models.checkpoints import (
    Checkpoint,
    Network,
    adapt_input,
    build_from,
    describe,
    load_pretrained,
    output_names,
    read_checkpoint,
    statistics_in,
    storable_names,
)
from utils.distributed import RankInfo
from utils.seed import seed_everything

from .classes import SAME_CLASSES, ClassMatch
from .metrics import Metric

Size = tuple[int, int]  # height, width in pixels
# The keys of Mixup and CutMix, for the tasks that do not use them.
MIXING = tuple(
    f"AUG.{key}" for key in ("MIXUP", "CUTMIX", "CUTMIX_MINMAX", "MIXUP_PROB", "MIXUP_SWITCH_PROB", "MIXUP_MODE")
)
# The keys of evaluating a classifier, for the tasks that are none.
CLASSES = ("TEST.CLASSES", "TEST.MASK", "TEST.REAL_LABELS", "TEST.PER_CLASS")


def except_new(names: Sequence[str]) -> str:
    """Returns the end of a log line about loaded weights: which tensors were not loaded; empty for none."""
    return f" except for {len(names)} tensors, which are new ({names[0]} ... {names[-1]})" if names else ""


class Task(ABC):
    """What a network is trained for; each task is a subclass in tasks/, registered in `tasks.TASKS`.

    The defaults here are for networks of the registry and of timm, on images with one label each.
    """

    name: ClassVar[str]
    # The figure of a `Result` that selects the best checkpoint, higher is better, and its name in the log.
    metric: ClassVar[str]
    metric_label: ClassVar[str]
    agreement_label: ClassVar[str] = "top-1 agreement"  # of two networks
    # The kind of labels, as in `data.DatasetSpec`, and a data set that has them.
    labels: ClassVar[str] = "classes"
    default_dataset: ClassVar[str] = "imagenet"
    # The task's own section of the configuration, and the keys and sections of others that it does not use.
    section: ClassVar[str | None] = None
    unused: ClassVar[tuple[str, ...]] = ()
    # Whether test images keep their size unless DATA.TEST_SIZE is set.
    whole_images: ClassVar[bool] = False
    least_batch_size: ClassVar[int] = 1  # in training
    dataset_type: ClassVar[type[data.TransformedDataset]] = data.TransformedDataset  # applies the transforms

    def __init__(self, cfg: CfgNode, rank_info: RankInfo) -> None:
        self.cfg, self.rank_info = cfg, rank_info
        self._channels: int | None = None  # of the weights to evaluate, like what follows
        self._statistics: data.Statistics | None = None

    # Images
    @property
    def channels(self) -> int:
        """The channels of the images: those of the configuration, or of the weights to evaluate, or 3."""
        return self.cfg.DATA.CHANNELS or self._channels or 3

    @property
    def statistics(self) -> data.Statistics:
        """What the pixels are normalised by: DATA.MEAN and STD, or that of the weights to evaluate, or of the data set.

        Raises:
            ValueError: it is not known, or is for another number of channels.
        """
        mean, std = self.cfg.DATA.MEAN, self.cfg.DATA.STD
        known = self._statistics or data.spec_of(self.dataset_name).statistics(self.channels)
        if known is None:
            if mean is None or std is None:
                raise ValueError(
                    f"DATA.DATASET {self.dataset_name} has no statistics of {self.channels} channels: set DATA.MEAN "
                    "and DATA.STD"
                )
            known = data.Statistics(mean, std)
        found = data.Statistics(mean or known.mean, std or known.std)
        for key, values in zip(("DATA.MEAN", "DATA.STD"), found, strict=True):
            if len(values) != self.channels:
                raise ValueError(
                    f"{key} {', '.join(f'{value:g}' for value in values)}: images of {self.channels} channel(s) "
                    "(DATA.CHANNELS) need as many numbers"
                )
        return found

    def follow(self, checkpoint: Checkpoint, network: Network) -> list[str]:
        """Takes channels and statistics of the images from the weights to evaluate, unless the configuration sets them.

        Returns:
            A line for the log where the images are normalised in another way than the data set's, or the weights'.

        Raises:
            ValueError: the configuration sets channels that the network does not take.
        """
        if self.cfg.DATA.CHANNELS not in (None, network.in_chans):
            raise ValueError(
                f"{checkpoint.path} takes images of {network.in_chans} channel(s), DATA.CHANNELS is "
                f"{self.cfg.DATA.CHANNELS}: leave it out"
            )
        self._channels, trained = network.in_chans, statistics_in(checkpoint, network.in_chans)
        if trained is None:
            return []
        self._statistics = data.Statistics(*trained)
        if self.statistics != self._statistics:
            return [f"images are normalised by {self.statistics}; in the training of the weights by {self._statistics}"]
        if self._statistics != data.spec_of(self.dataset_name).statistics(self.channels):
            return [f"images are normalised by {self._statistics}, as in the training of the weights"]
        return []

    @cached_property
    def train_source(self) -> Any:
        """The images to train on."""
        return self.open_source("train")

    @cached_property
    def val_source(self) -> Any:
        """The images to evaluate on."""
        return self.open_source("val")

    def open_source(self, split: str) -> Any:
        """Opens the images of a split, `train` or `val`."""
        _ = self.dataset_name  # raises ValueError for labels of another kind
        rank, world_size = self.rank_info.rank, self.rank_info.world_size
        return data.open_source(self.cfg.DATA, split, channels=self.channels, rank=rank, world_size=world_size)

    @property
    def dataset_name(self) -> str:
        """The name of the data set, for `data.spec_of`.

        Raises:
            ValueError: its labels are of another kind.
        """
        name = data.resolve_name(self.cfg.DATA.DATASET, self.cfg.DATA.DATA_PATH)
        spec = data.spec_of(name)
        if spec.labels != self.labels:
            fitting = " or ".join(data.known_names(self.labels))
            raise ValueError(
                f"DATA.DATASET {name} has {spec.labels}, TASK {self.name} needs {self.labels}: set DATA.DATASET to "
                f"{fitting}, or TASK to the one that the data set is for"
            )
        return name

    @property
    def train_size(self) -> Size:
        """The size of a training image."""
        return to_2tuple(self.cfg.DATA.IMG_SIZE or default_image_size(self.arch))

    def test_size(self, image_size: Size) -> Size | None:
        """Returns the size of test images for a network of this image size; None keeps that of each image."""
        size = self.cfg.DATA.TEST_SIZE or (None if self.whole_images else image_size)
        return to_2tuple(size) if size else None

    def train_loader(self) -> data.BatchLoader:
        """Shards the training images over the processes."""
        return data.build_train_loader(
            self.train_source,
            self.train_transform(),
            self.cfg.DATA,
            seed=self.cfg.SEED,
            rank=self.rank_info.rank,
            world_size=self.rank_info.world_size,
            dataset=self.dataset_type,
        )

    def eval_loader(self, image_size: Size) -> data.BatchLoader:
        """Shards the test images over the processes, each image once; `image_size` is that of the network."""
        size = self.test_size(image_size)
        return data.build_eval_loader(
            self.val_source,
            self.eval_transform(size),
            self.cfg.DATA,
            # Images that keep their size may differ in it.
            batch_size=None if size else 1,
            rank=self.rank_info.rank,
            world_size=self.rank_info.world_size,
            dataset=self.dataset_type,
        )

    def train_transform(self) -> Any:
        """Returns the augmentation of a training image."""
        return data.train_transform(
            self.train_size,
            self.cfg.AUG,
            interpolation=self.cfg.DATA.INTERPOLATION,
            rand_augment=self.rand_augment() is None,
        )

    def rand_augment(self) -> data.BatchRandAugment | None:
        """Builds RandAugment of whole batches, on the device; None where `train_transform` has it, or none."""
        return data.build_rand_augment(
            self.cfg.AUG,
            self.rank_info.device,
            interpolation=self.cfg.DATA.INTERPOLATION,
            seed=self.cfg.SEED,
        )

    def rand_augment_place(self) -> str:
        """Returns where RandAugment is applied, for the log; empty for nowhere."""
        return data.describe_place(self.cfg.AUG, self.rand_augment(), self.rank_info.device)

    def eval_transform(self, size: Size | None) -> Any:
        """Returns the transform of a test image to this size."""
        assert size is not None
        return data.eval_transform(size, crop=self.cfg.TEST.CROP, interpolation=self.cfg.DATA.INTERPOLATION)

    def normalize(self, dtype: torch.dtype = torch.float32) -> data.Normalize:
        """Builds the module that maps uint8 images to the input of the network, on the device."""
        return data.Normalize(*self.statistics, dtype=dtype).to(self.rank_info.device)

    def batch_augmentation(self) -> data.BatchTransform | None:
        """Builds random erasing, Mixup and CutMix; None if the configuration has none of them."""
        return data.build_batch_augmentation(
            self.cfg.AUG,
            num_classes=self.num_outputs(),
            batch_size=self.cfg.DATA.BATCH_SIZE,
            label_smoothing=self.cfg.MODEL.LABEL_SMOOTHING,
            seed=self.cfg.SEED,
            rank=self.rank_info.rank,
        )

    # Network
    @property
    def arch(self) -> str:
        """The name of the architecture."""
        return canonical_name(self.cfg.MODEL.ARCH)

    @property
    def structure(self) -> dict[str, Any]:
        """The parts of the network's structure that the configuration sets."""
        model = self.cfg.MODEL
        parts = {
            "channels": model.CHANNELS,
            "blocks": model.BLOCKS,
            "branches": model.BRANCHES,
            "share_sets": model.SHARE_SETS,
            "groups": model.GROUPS,
            "reductions": model.REDUCTIONS,
            "gp_reduction": model.GP_REDUCTION,
            "global_perceptron": model.GLOBAL_PERCEPTRON,
            "mixer": model.MIXER,
            "insert_bn": model.INSERT_BN,
        }
        return {part: value for part, value in parts.items() if value is not None}

    @property
    def input_options(self) -> dict[str, Any]:
        """The option of a network that takes images of other channels than RGB; empty for RGB, the default of all."""
        return {} if self.channels == 3 else {"in_chans": self.channels}

    @abstractmethod
    def num_outputs(self) -> int:
        """Returns the number of outputs of the network per image, or pixel; may open the images to count classes."""

    def build_network(self, num_outputs: int, weights: Checkpoint | None = None) -> nn.Module:
        """Builds the network with fresh weights, the same on every process.

        Args:
            num_outputs: per image, or pixel.
            weights: that it is to take, whose form decides the structure; None for the training structure.

        Raises:
            ValueError: the architecture does not have a part of the structure that is set, or the weights do not.
        """
        check_changeable(self.arch, {f"MODEL.{part.upper()}": part for part in self.structure})
        options = self.structure | self.form_options(weights) | {"img_size": self.train_size} | self.input_options
        if self.cfg.MODEL.DROP_PATH:
            options["drop_path_rate"] = self.cfg.MODEL.DROP_PATH
        seed_everything(self.cfg.SEED)
        return create_model(self.arch, num_outputs, **options)

    def is_converted(self, weights: Checkpoint | None) -> bool:
        """Returns whether a network that is to take these weights has the deploy structure of the architecture."""
        converted = weights is not None and weights.form == "deploy" and self.arch in REGISTRY
        return converted and not self.cfg.MODEL.INSERT_BN

    def form_options(self, weights: Checkpoint | None) -> dict[str, Any]:
        """Returns the options of a network that is to take these weights: `deploy` for converted ones.

        Raises:
            ValueError: MODEL.BRANCHES asks for branches that converted weights do not have.
        """
        if weights is None or not self.is_converted(weights):
            return {}
        if self.cfg.MODEL.BRANCHES:
            raise ValueError(
                f"MODEL.BRANCHES {','.join(map(str, self.cfg.MODEL.BRANCHES))}: the weights in {weights.path} are "
                "converted and have no branches: set MODEL.BRANCHES to null, or give the training weights that they "
                "were converted from"
            )
        return {"deploy": True}

    def read_pretrained(self) -> Checkpoint | None:
        """Reads the weights MODEL.PRETRAINED that a new run starts from; None where it is not set.

        Those for RGB images are adapted to the channels of the images, see `adapt_input`.
        """
        if not self.cfg.MODEL.PRETRAINED:
            return None
        return adapt_input(self.arch, read_checkpoint(self.cfg.MODEL.PRETRAINED), self.channels)

    def load_pretrained(self, network: nn.Module, checkpoint: Checkpoint) -> str:
        """Loads the weights to start from; describes them, and the tensors that stay fresh, for the log."""
        if "network" in checkpoint.meta:
            trained_for = checkpoint.meta.get("task")
            raise ValueError(
                f"{checkpoint.path} is of TASK {trained_for}: TASK {self.name} can't start from its weights"
            )
        new = except_new(load_pretrained(self.arch, network, checkpoint))
        return "; ".join((f"{checkpoint}{new}", *self._differences(checkpoint)))

    def _differences(self, checkpoint: Checkpoint) -> Iterator[str]:
        """Yields how the images that weights were trained on differ from those of the training."""
        names, own = checkpoint.meta.get("class_names"), self.class_names()
        difference = first_difference(own, names) if names and own else ""
        if difference:
            yield f"the outputs were those of other classes: {difference}"
        mean, std = (tuple(checkpoint.meta.get(key, ())) for key in ("mean", "std"))
        before = data.Statistics(mean, std)
        if len(mean) == self.channels and before != self.statistics:
            yield f"their images were normalised by {before}, these are by {self.statistics}"

    @classmethod
    def metadata(
        cls, arch: str, network: nn.Module, image_size: Size, form: str | None, images: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the metadata of a checkpoint: all that `network_from` needs, and what is known of the images.

        `form` is train or deploy, or None for a network that is not re-parameterizable; `images` has keys of
        `models.checkpoints.IMAGES`.
        """
        return describe(arch, network, image_size, form, **images, task=cls.name)

    def class_names(self) -> list[str] | None:
        """Returns the names of the outputs, or of the first of them, that checkpoints hold; None for none."""
        return storable_names(self.train_source.classes)

    @classmethod
    def network_from(cls, checkpoint: Checkpoint, arch: str | None = None, **changes: Any) -> Network:
        """Builds the network of a checkpoint with its weights, in their form.

        Args:
            checkpoint: of this task.
            arch: the architecture; None for that of the checkpoint.
            **changes: `img_size` and parts of the structure that replace those of the checkpoint.

        Raises:
            ValueError: the weights do not fit.
        """
        return build_from(checkpoint, arch, **changes)

    def network_to_evaluate(self, checkpoint: Checkpoint, arch: str | None) -> Network:
        """Builds the network of a checkpoint; the configuration takes precedence over the metadata."""
        size = {"img_size": to_2tuple(self.cfg.DATA.IMG_SIZE)} if self.cfg.DATA.IMG_SIZE else {}
        return self.network_from(checkpoint, arch, **size, **self.structure)

    def settings_of(self, network: Network) -> dict[str, Any]:
        """Returns what the configuration would say of the network of a checkpoint, by key."""
        return {"MODEL.NUM_CLASSES": network.num_classes}

    def match_classes(self, checkpoint: Checkpoint, num_outputs: int) -> ClassMatch:
        """Finds the output of the network of a checkpoint for each class of the test images.

        Raises:
            ValueError: the test images have other classes, or in another order.
        """
        names, classes = output_names(checkpoint, num_outputs), self.val_source.classes
        if len(classes) != num_outputs:
            raise ValueError(
                f"{checkpoint.path} is for {num_outputs} classes, {self.cfg.DATA.DATA_PATH} has {len(classes)}"
            )
        difference = first_difference(classes, names) if names is not None else ""
        if difference:
            raise ValueError(f"{self.cfg.DATA.DATA_PATH} is not for {checkpoint.path}: its {difference}")
        return ClassMatch()

    @property
    def images_meta(self) -> dict[str, Any]:
        """What the metadata of a checkpoint say of the images that it is trained on."""
        mean, std = map(list, self.statistics)
        names = self.class_names()
        return {"dataset": self.dataset_name, "class_names": names, "in_chans": self.channels, "mean": mean, "std": std}

    # Loss and evaluation
    @abstractmethod
    def build_criterion(self, num_outputs: int) -> nn.Module:
        """Builds the mean loss of outputs (N, ...) and targets; it may have parameters."""

    @abstractmethod
    def build_metric(self, num_outputs: int, classes: ClassMatch = SAME_CLASSES) -> Metric:
        """Builds the metric of one evaluation.

        Args:
            num_outputs: of the network.
            classes: what `match_classes` found; in training they are the same.

        Raises:
            ValueError: the test images can't be evaluated.
        """
