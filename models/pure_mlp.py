"""The pure MLP for CIFAR-10: RepMLPs and fully-connected layers in turn, and its convolutional counterpart.

Source: Ding et al., "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition"
(arXiv:2105.01883), Sec. 4.1, Fig. 3 and Table 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .foldable import FoldableConvNorm
from .repmlp_resnet import RepMLP, named, size_of_global_perceptrons
from .stages import StagedNetwork
from .variants import CIFAR10, build_variant, variant_cfg

# By name, the kernel size of the convolution in place of FC3 (None: FC3 itself), and whether it is all that is left of
# RepMLP: no partitions, no groups, no Global and no Local Perceptron.
MIXERS: dict[str, tuple[int | None, bool]] = {
    "repmlp": (None, False),
    "fc3_as_conv9": (9, False),
    "conv9": (9, True),
    "conv3": (3, True),
}


@dataclass(frozen=True)
class PureMLPSpec:
    """The shape of one network; stage i works on maps of image_size / 2 ** i.

    A block is a mixer of positions and an FC, which is a 1x1 convolution; the FC after the last mixer of a stage leads
    to the channels of the next one. The mixers of the paper's Table 1:

    - `repmlp`: RepMLP.
    - `fc3_as_conv9`: RepMLP with a 9x9 convolution over each partition, and its BatchNorm, in place of FC3.
    - `conv9`, `conv3`: a convolution over the whole map and its BatchNorm in place of RepMLP; `conv3`, with twice the
      channels, is the Wide ConvNet.

    The paper gives two mixers a stage, channels, partitions and groups, and leaves the rest open. The network begins
    with an FC from the image to the first channels, every stage ends with an FC, the last one to its own channels,
    after which the maps are averaged, and the Global Perceptron is not reduced: this gives both networks the published
    multiply-adds (52.8 and 65.1 million). The Wide ConvNet has 0.44 million parameters then, against 0.50 published.
    FCs are followed by ReLU too, as is every convolution of the counterpart. The Local Perceptron has all the odd
    kernels that Fig. 1 shows for partitions larger than 7. A convolution in place of FC3 has FC3's groups, since the
    local ones merge into it; one in place of RepMLP has none.

    Raises:
        ValueError: an unknown mixer, one that has no Local or Global Perceptron with either of them, or channels and
            blocks not of the same number of stages.
    """

    image_size: int | tuple[int, int]
    mixer: str = "repmlp"
    channels: tuple[int, ...] = (16, 32, 64)
    blocks: tuple[int, ...] = (2, 2, 2)
    partition: int = 8  # h = w
    groups: int = 2  # g of FC3 and of the local convolutions
    branches: tuple[int, ...] = (1, 3, 5, 7)  # kernel sizes of the local convolutions
    global_perceptron: bool = True
    insert_bn: bool = False  # the training structure is the deploy structure with a BatchNorm after every FC3

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"unknown mixer {self.mixer!r}: choose {', '.join(MIXERS)}")
        if self.is_convolution and (self.branches or self.global_perceptron):
            raise ValueError(
                f"a mixer {self.mixer} has no local branches and no Global Perceptron: set branches to [] and "
                "global_perceptron to False"
            )
        if len(self.channels) != len(self.blocks) or min((*self.channels, *self.blocks), default=0) < 1:
            raise ValueError(
                f"every stage needs at least one channel and block, not channels {self.channels}, blocks {self.blocks}"
            )

    @property
    def is_convolution(self) -> bool:
        """Whether nothing but a convolution is left of RepMLP."""
        return MIXERS[self.mixer][1]

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.blocks)

    @property
    def steps(self) -> list[int]:
        """Of what the height and width of an image are multiples for each stage, so that partitions divide its maps."""
        side = 1 if self.is_convolution else self.partition
        return [side * 2**stage for stage in range(len(self.blocks))]


class PureMLP(StagedNetwork):
    """The network: an FC, stages of mixers and FCs with max pooling between, linear head.

    Args:
        spec: a row of `SPECS`.
        num_classes: outputs of the head; 0 leaves the pooled features.
        in_chans: channels of the input image.
        img_size: height and width that the network is made for; the spec's own where None.
        drop_path_rate: must be 0, since there are no residual branches to drop.
        deploy: build the structure that `locality_injection` leaves.
        drop_rate: of the dropout before the head.
        global_pool: "avg", or "" for a head that classifies every position of the last map.

    Raises:
        ValueError: a `drop_path_rate`, partitions that do not divide the maps of an image of `img_size`, groups that do
            not divide the channels, or an unknown `global_pool`.
    """

    def __init__(
        self,
        spec: PureMLPSpec,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(drop_rate, global_pool)
        if drop_path_rate:
            raise ValueError(
                f"a PureMLP has no residual branches to drop: drop_path_rate must be 0, not {drop_path_rate}"
            )
        self.spec = spec
        self.img_size = height, width = to_2tuple(spec.image_size if img_size is None else img_size)
        step = spec.steps[-1]
        if height % step or width % step or min(height, width) <= 0:
            raise ValueError(f"img_size {height}x{width} must be a positive multiple of {step}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = spec.channels[-1]
        injected = deploy or spec.insert_bn
        self.stem = FoldableConvNorm(in_chans, spec.channels[0], 1, act=nn.ReLU(), deploy=injected)
        self.pool = nn.MaxPool2d(2)
        after = (*spec.channels[1:], spec.channels[-1])
        for stage, (channels, blocks) in enumerate(zip(spec.channels, spec.blocks, strict=True)):
            widths = [channels] * (blocks - 1) + [after[stage]]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*(self._block(stage, out, injected) for out in widths)))
        self.feature_info = [
            {"num_chs": channels, "reduction": 2**stage, "module": f"stage{stage + 1}"}
            for stage, channels in enumerate(after)
        ]
        self.head_norm = nn.Identity()
        self.head = self._make_head(num_classes) if num_classes > 0 else nn.Identity()
        if spec.insert_bn and not deploy:
            self.insert_bn()

    def _block(self, stage: int, out_channels: int, deploy: bool) -> nn.Sequential:
        channels = self.spec.channels[stage]
        fc = FoldableConvNorm(channels, out_channels, 1, act=nn.ReLU(), deploy=deploy)
        return named(mixer=self._mixer(stage, deploy), act=nn.ReLU(), fc=fc)

    def _mixer(self, stage: int, deploy: bool) -> RepMLP:
        spec = self.spec
        channels, size = spec.channels[stage], (self.img_size[0] // 2**stage, self.img_size[1] // 2**stage)
        kernel_size, _ = MIXERS[spec.mixer]
        if spec.is_convolution:  # of the whole map
            return RepMLP(channels, size, *size, 1, (), None, deploy, kernel_size)
        gp_reduction = 1 if spec.global_perceptron else None
        h = w = spec.partition
        return RepMLP(channels, size, h, w, spec.groups, spec.branches, gp_reduction, deploy, kernel_size)

    @staticmethod
    def built_for(weights: Mapping[str, Tensor], spec: PureMLPSpec, img_size: tuple[int, int]) -> dict[str, Any]:
        """Returns the `in_chans` and `img_size` that weights were made with, see `Family`."""
        stem = weights.get("stem.conv.weight", torch.empty(0, 3))
        img_size = size_of_global_perceptrons(weights, spec.channels, spec.steps, img_size)
        return {"in_chans": stem.shape[1:2].numel(), "img_size": img_size}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that sort parameters by depth."""
        return {"stem": r"^stem", "blocks": r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"}

    def _make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage, the first with the stem before it, to what the stage before gave, or to the image."""
        x = self.pool(x) if stage else self.stem(x)
        return self._run(self.get_submodule(f"stage{stage + 1}").children(), x)


# fmt: off
SPECS: dict[str, PureMLPSpec] = {
    "PureMLP-C10":     PureMLPSpec(32),
    "WideConvNet-C10": PureMLPSpec(32, "conv3", (32, 64, 128), branches=(), global_perceptron=False),
}
# fmt: on


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return variant_cfg(
        SPECS[name],
        first_conv="stem.conv",
        classifier="head",
        origin_url="https://github.com/DingXiaoH/RepMLP",
        paper_name="RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition",
        paper_ids="arXiv:2105.01883",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "puremlp_c10": _cfg("PureMLP-C10", **CIFAR10),
        "wideconvnet_c10": _cfg("WideConvNet-C10", **CIFAR10),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> PureMLP:
    return cast(PureMLP, build_variant(PureMLP, name, SPECS[name], pretrained, **kwargs))


@register_model
def puremlp_c10(pretrained: bool = False, **kwargs: Any) -> PureMLP:
    """The pure MLP for CIFAR-10, of the RepMLP paper."""
    return _create("PureMLP-C10", pretrained, **kwargs)


@register_model
def wideconvnet_c10(pretrained: bool = False, **kwargs: Any) -> PureMLP:
    """Wide ConvNet, the convolutional counterpart of the pure MLP, of the RepMLP paper."""
    return _create("WideConvNet-C10", pretrained, **kwargs)
