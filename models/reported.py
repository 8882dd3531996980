"""The sizes and accuracies that the papers report, as printed there, to stand beside our own counts.

P1 is "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition" (arXiv:2105.01883), P2
"RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality" (arXiv:2112.11081).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, cast

import torch
from torch import nn

from .build import create_model, default_image_size
from .counts import Counts, count
from .reparam import is_reparameterizable, to_deploy
from .segmentation import SegmentationNetwork

PAPERS = "P1: arXiv:2105.01883, P2: arXiv:2112.11081"
README, MMPRETRAIN, CIFAR, TABLE2 = "P2, its README", "P2, MMPretrain", "P2, CIFAR-100", "P2, Table 2"
TABLE4, TABLE5, CITYSCAPES = "P2, Table 4", "P2, Table 5", "P2, Cityscapes"
P1 = "P1"
NO_FIGURES = "a baseline of the paper; its figures are not recorded here"


@dataclass(frozen=True)
class Reported:
    """A row of a table. Figures are text, as printed; empty where there is none.

    The papers count parameters in the training and multiply-adds in the deploy structure.

    Attributes:
        arch: the architecture, ours or timm's.
        source: paper and table.
        parameters: in millions.
        multiply_adds: in billions, for one image.
        top1: in percent; mean IoU for Cityscapes.
        images_per_second: on an RTX 2080 Ti with batches of 128, BatchNorms folded.
        added: what the local branches add to the parameters, in ones; `counts_statistics`: with running statistics.
        changes: to the architecture: parts of its structure, `img_size`, options of a segmentation network.
        num_classes: outputs of the network.
        note: why our count differs, or what was left open.
    """

    arch: str
    source: str
    parameters: str = ""
    multiply_adds: str = ""
    top1: str = ""
    images_per_second: str = ""
    added: str = ""
    counts_statistics: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    note: str = ""

    @property
    def name(self) -> str:
        """The architecture and its changes, which make a row unique within a source."""
        return ", ".join([self.arch, *(f"{part}={value}" for part, value in self.changes.items())])

    @property
    def image_size(self) -> tuple[int, int]:
        """The (height, width) of the images."""
        if self.source == CITYSCAPES:
            return 1024, 2048
        side = self.changes.get("img_size")
        return (side, side) if side else default_image_size(self.arch)

    def build(self, **changes: Any) -> nn.Module:
        """Builds the network in its training structure, with fresh weights, in evaluation mode.

        Raises:
            ValueError: a segmentation network without segmentation-models-pytorch.
        """
        network = SegmentationNetwork if self.source == CITYSCAPES else create_model
        return network(self.arch, self.num_classes, **{**self.changes, **changes}).eval()


@dataclass(frozen=True)
class Counted:
    """What we count for a row: in the training structure, in the deploy structure, and what the branches add."""

    training: Counts
    deploy: Counts
    added: int | None


def count_reported(row: Reported) -> Counted:
    """Counts the network of a row, on the meta device; errors as of `Reported.build`."""
    shape = (1, 3, *row.image_size)
    with torch.device("meta"):
        network = row.build()
        training = count(network, shape)
        deploy = count(to_deploy(network), shape) if is_reparameterizable(network) else training
        plain = count(row.build(branches=[]), shape) if row.added else None
    added = None
    if plain is not None:
        added = training.parameters - plain.parameters
        added += (training.statistics - plain.statistics) if row.counts_statistics else 0
    return Counted(training, deploy, added)


def agrees(ours: float, printed: str) -> bool:
    """Returns whether a number rounds to the digits that are printed, halves up; true where nothing is."""
    if not printed:
        return True
    expected = Decimal(printed)
    digits = cast(int, expected.as_tuple().exponent)
    return abs(Decimal(ours) - expected) <= Decimal(5).scaleb(digits - 1)


FOLDED = "{} M in the deploy structure with convolutions' BatchNorms folded, cut off; this gives all six sizes"
ELEMENTWISE = "fits a count of the training structure with BatchNorm and all other element-wise operations"
MORE_SETS = {"share_sets": [2, 8, 32, 256]}
RULE = "the paper's own rule for CIFAR-100, kernels and BatchNorms of the branches, gives ours"
CONV3 = {"downsample": "conv3", "rank": 1}
DECODER = "MMSegmentation also counts biases, ReLU and poolings, as python -m benchmarks.segmentation does"

# fmt: off
REPORTED: tuple[Reported, ...] = (
    Reported("RepMLPNet-T224", README, "38.3", "2.8", "76.62"),
    Reported("RepMLPNet-B224", README, "68.2", "6.7", "80.32"),
    Reported("RepMLPNet-T256", README, "58.7", "4.2", "77.44"),
    Reported("RepMLPNet-B256", README, "96.5", "9.6", "81.03",
             note=FOLDED.format("96.53")),
    Reported("RepMLPNet-D256", README, "86.9", "8.6", "80.83"),
    Reported("RepMLPNet-L256", README, "117.7", "11.5", "81.68",
             note=f"{FOLDED.format('117.77')}; 11.58 G cut off, too"),
    Reported("RepMLPNet-B224", MMPRETRAIN, "68.24", "6.71", "80.41", note=ELEMENTWISE),
    Reported("RepMLPNet-B256", MMPRETRAIN, "96.45", "9.69", "81.11", note=ELEMENTWISE),
    Reported("ResMLP-S12-224", TABLE2, "15.4", "3.0", "70.4", "1895", changes={"branches": []}),
    Reported("ResMLP-B24-P16-224", TABLE2, "115.7", "23.0", changes={"branches": []}),
    Reported("resnet101", TABLE2, "44.4", "8.1", "79.4", "606",
             note="44.50 M with BatchNorms folded, cut off; 8.1 G is not explained, a deep stem (resnet101c) has 8.04"),
    Reported("resnext101_32x4d", TABLE2, "44.1", "8.0", "80.2", "450", note="44.11 M with BatchNorms folded"),
    Reported("regnetx_064", TABLE2, "26.2", "6.4", "79.6", "589", note="6.46 G cut off, not rounded"),
    Reported("efficientnet_b1", TABLE2, note=NO_FIGURES),
    Reported("efficientnet_b2", TABLE2, note=NO_FIGURES),
    Reported("mixer_b16_224", TABLE2, changes={"img_size": 256}, note=NO_FIGURES),
    Reported("gmlp_b16_224", TABLE2, note=NO_FIGURES),
    Reported("RepMLPNet-T224", TABLE4, "37.8", "", "75.78", changes={"global_perceptron": False}),
    Reported("RepMLPNet-T224", TABLE4, "38.3", "", "76.48"),
    Reported("RepMLPNet-T224", TABLE4, "66.7", "", "75.94", changes=MORE_SETS | {"global_perceptron": False},
             note="the share-sets are ours; they give the published counts"),
    Reported("RepMLPNet-T224", TABLE4, "67.2", "", "77.19", changes=MORE_SETS,
             note="the share-sets are ours; they give the published counts"),
    Reported("RepMLPNet-T224", TABLE5, "", "", "74.33", changes={"branches": []}),
    Reported("RepMLPNet-T224", TABLE5, "", "", "76.48", added="20000", note=RULE),
    Reported("RepMLPNet-D256", TABLE5, "", "", "78.58", changes={"branches": []}),
    Reported("RepMLPNet-D256", TABLE5, "", "", "80.88", added="60000", note=RULE),
    *(
        Reported("ResMLP-C100", CIFAR, parameters, operations, top1, added=added, counts_statistics=True,
                 changes={"branches": branches}, num_classes=100, note=note)
        for branches, parameters, operations, top1, added, note in (
            ([], "7.1", "1.812", "55.58", "", "1812.8 M multiply-adds cut off, not rounded"),
            ([1], "", "", "57.96", "60", "running statistics counted"),
            ([3], "", "", "63.76", "156", "running statistics counted"),
            ([1, 3], "", "", "65.09", "216", "running statistics counted"),
        )
    ),
    *(
        Reported("RepMLPNet-C100", CIFAR, parameters, operations, top1, added=added,
                 changes={"branches": branches}, num_classes=100)
        for branches, parameters, operations, top1, added in (
            ([], "8.3", "0.468", "59.07", ""),
            ([1], "", "", "60.73", "720"),
            ([3], "", "", "65.36", "2640"),
            ([1, 3], "", "", "67.43", "3360"),
        )
    ),
    Reported("RepMLP-Res50-light-224", P1, "87.0", "", "77.14"),
    Reported("RepMLP-Res50-bottleneck-224", P1, "41.07"),
    Reported("PureMLP-C10", P1, "", "0.0528", "91.11", num_classes=10),
    Reported("WideConvNet-C10", P1, "0.50", "0.0651", "91.99", num_classes=10,
             note="where its convolutions stand is not published; this arrangement gives both networks' multiply-adds"),
    Reported("resnet101c", CITYSCAPES, "", "2049.82", "79.03", num_classes=19, note=DECODER),
    Reported("RepMLPNet-D256", CITYSCAPES, "", "1960.01", "76.27", changes=CONV3, num_classes=19, note=DECODER),
    Reported("RepMLPNet-D256", CITYSCAPES, "", "1960.16", "77.12", changes=CONV3 | {"downsample": "conv5"},
             num_classes=19, note=DECODER),
)
# fmt: on
