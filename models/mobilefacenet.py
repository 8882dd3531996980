"""MobileFaceNet: a small network for faces, the baseline of RepMLP-FaceRes.

Sources: Chen et al., "MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices"
(arXiv:1804.07573), table 1; Ding et al., arXiv:2105.01883, which compares RepMLP-FaceRes with it at 96 x 96 pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .foldable import EmbeddingHead, FoldableConvNorm
from .stages import StagedNetwork
from .variants import build_variant, variant_cfg

REDUCTION = 16  # of an image, by the stem and the first block of three stages


@dataclass(frozen=True)
class MobileFaceNetSpec:
    """The shape of one network: a stem, three stages that each begin with a bottleneck of stride 2, and the head.

    Raises:
        ValueError: not three stages, or one without channels or blocks.
    """

    image_size: int | tuple[int, int]
    stem: int = 64  # channels
    channels: tuple[int, ...] = (64, 128, 128)
    blocks: tuple[int, ...] = (5, 7, 3)  # bottlenecks, that of stride 2 among them
    first_expansion: tuple[int, ...] = (2, 4, 4)  # inner channels of that bottleneck over the channels before it
    expansion: int = 2  # of the others
    features: int = 512  # channels of the last map

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.blocks) == len(self.first_expansion) == 3:
            raise ValueError("a MobileFaceNet has three stages: give channels, blocks and first expansion of each")
        if min(*self.channels, *self.blocks, *self.first_expansion) < 1:
            raise ValueError(f"a stage has at least one channel and block: {self.channels}, {self.blocks}")

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.blocks)


class Bottleneck(nn.Module):
    """1x1, depth-wise 3x3 and linear 1x1 convolution, beside a shortcut where neither size nor channels change."""

    def __init__(
        self, in_channels: int, channels: int, inner: int, stride: int, drop_path: float, deploy: bool
    ) -> None:
        super().__init__()
        self.conv1 = FoldableConvNorm(in_channels, inner, 1, act=nn.PReLU(inner), deploy=deploy)
        self.conv2 = FoldableConvNorm(inner, inner, 3, stride, nn.PReLU(inner), deploy, groups=inner)
        self.conv3 = FoldableConvNorm(inner, channels, 1, deploy=deploy)
        self.has_shortcut = stride == 1 and in_channels == channels
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        out: Tensor = self.conv3(self.conv2(self.conv1(x)))
        return x + self.drop_path(out) if self.has_shortcut else out


SPECS: dict[str, MobileFaceNetSpec] = {"MobileFaceNet": MobileFaceNetSpec(image_size=96)}


class MobileFaceNet(StagedNetwork):
    """The network: stem, three stages of bottlenecks, a depth-wise convolution as large as the last map, an embedding.

    Conversion folds every BatchNorm into the convolution or the linear layer before it; there are no branches.

    Args:
        spec: a row of `SPECS`.
        num_classes: dimension of the embedding; 0 leaves the pooled features.
        in_chans: channels of the input image.
        img_size: height and width of the images; the spec's own where None.
        drop_path_rate: of the last block; grows linearly from 0 with the depth.
        deploy: build the structure that `locality_injection` leaves.
        drop_rate: of the dropout before the head.
        global_pool: "avg" or "" for features of one position, which pooling does not change.

    Raises:
        ValueError: `img_size` is no multiple of 16, or an unknown `global_pool`.
    """

    classifier = "linear"

    def __init__(
        self,
        spec: MobileFaceNetSpec,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__(drop_rate, global_pool)
        self.spec = spec
        self.img_size = height, width = to_2tuple(spec.image_size if img_size is None else img_size)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = spec.features
        if height % REDUCTION or width % REDUCTION or min(height, width) <= 0:
            raise ValueError(f"img_size {height}x{width} must be a positive multiple of {REDUCTION}")
        self.stage0 = nn.Sequential(
            FoldableConvNorm(in_chans, spec.stem, 3, 2, nn.PReLU(spec.stem), deploy),
            FoldableConvNorm(spec.stem, spec.stem, 3, 1, nn.PReLU(spec.stem), deploy, groups=spec.stem),
        )
        drop_path = torch.linspace(0, drop_path_rate, spec.depth, device="cpu").split(spec.blocks)
        for stage, rates in enumerate(drop_path):
            blocks = [self._block(stage, depth, float(rate), deploy) for depth, rate in enumerate(rates)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*blocks))
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**stage, "module": f"stage{stage + 1}"}
            for stage, channels in enumerate(spec.channels)
        ]
        features, last_map = spec.features, (height // REDUCTION, width // REDUCTION)
        self.head_norm = nn.Sequential(
            FoldableConvNorm(spec.channels[-1], features, 1, act=nn.PReLU(features), deploy=deploy),
            FoldableConvNorm(features, features, last_map, deploy=deploy, groups=features, padding=0),
        )
        self.num_classes = num_classes
        self.linear = self._make_head(num_classes, deploy) if num_classes > 0 else nn.Identity()

    def _block(self, stage: int, depth: int, drop_path: float, deploy: bool) -> Bottleneck:
        spec = self.spec
        channels = spec.channels[stage]
        if depth:
            return Bottleneck(channels, channels, channels * spec.expansion, 1, drop_path, deploy)
        before = spec.channels[stage - 1] if stage else spec.stem
        return Bottleneck(before, channels, before * spec.first_expansion[stage], 2, drop_path, deploy)

    @staticmethod
    def built_for(weights: Mapping[str, Tensor], spec: MobileFaceNetSpec, img_size: tuple[int, int]) -> dict[str, Any]:
        """Returns the `in_chans` and `img_size` that weights were made with, see `Family`."""
        stem = weights.get("stage0.0.conv.weight", torch.empty(0, 3))
        kernel = weights.get("head_norm.1.conv.weight", torch.empty(0)).shape[2:]
        size = (kernel[0] * REDUCTION, kernel[1] * REDUCTION) if len(kernel) == 2 else img_size
        return {"in_chans": stem.shape[1:2].numel(), "img_size": size}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that sort parameters by depth."""
        stages = r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"
        return {"stem": r"^stage0", "blocks": [(stages, None), (r"^head_norm", (99999,))]}

    def _make_head(self, num_classes: int, deploy: bool = False) -> nn.Module:
        return EmbeddingHead(self.num_features, num_classes, deploy)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage, the first with the stem before it, to what the stage before gave, or to the image."""
        return self._run(self.get_submodule(f"stage{stage + 1}").children(), x if stage else self.stage0(x))


default_cfgs = generate_default_cfgs(
    {
        "mobilefacenet": variant_cfg(
            SPECS["MobileFaceNet"],
            first_conv="stage0.0.conv",
            classifier="linear",
            mean=IMAGENET_INCEPTION_MEAN,
            std=IMAGENET_INCEPTION_STD,
            origin_url="https://github.com/deepinsight/insightface",
            paper_name="MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices",
            paper_ids="arXiv:1804.07573",
        )
    }
)


@register_model
def mobilefacenet(pretrained: bool = False, **kwargs: Any) -> MobileFaceNet:
    """MobileFaceNet, for aligned faces of 96 x 96 pixels."""
    return cast(
        MobileFaceNet, build_variant(MobileFaceNet, "MobileFaceNet", SPECS["MobileFaceNet"], pretrained, **kwargs)
    )
