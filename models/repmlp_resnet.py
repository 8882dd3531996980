"""RepMLP-ResNet-50: the first RepMLP, in place of 3x3 convolutions of a ResNet.

Source: Ding et al., "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition"
(arXiv:2105.01883). State-dict names and shapes are those of the published code, before and after conversion.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .foldable import EmbeddingHead, FoldableConvNorm
from .layers import (
    GroupedFC,
    PartitionBlock,
    PartitionConv,
    check_kernel_sizes,
    describe_module,
    is_batch_norm,
    local_branches,
)
from .reparam import absorb_batch_norm
from .stages import StagedNetwork
from .variants import build_variant, variant_cfg

OUTPUT_STRIDES = (8, 16, 32)  # those of timm's ResNets


@dataclass(frozen=True)
class RepMLPResNetSpec:
    """The shape of one network; stage i works on maps of image_size / (4 * 2 ** i), the paper's c2, c3, c4 and c5.

    The first block of a stage, and every block of a stage whose reduction r is 0, is ResNet's own bottleneck: 1x1, 3x3
    and 1x1 convolutions, with C / `bottleneck` inner channels and the stride in the 3x3. The others hold a RepMLP:

    - `light`: 1x1, RepMLP, 1x1; the RepMLP has C / r channels.
    - `bottleneck`: 1x1, 3x3, RepMLP, 3x3, 1x1; the first 3x3 leads from C / `bottleneck` to that / r channels, the last
      one back.

    Where `output_stride` is less than the stride of a stage, the stage keeps the size of its maps, and the 3x3
    convolutions of its plain bottlenecks are dilated to see as far as before, the first one's too, as in PSPNet. Those
    of a stage with RepMLP are not (Sec. 4.4).

    The paper leaves open where the activations stand, and whether the bottleneck's Global Perceptron is reduced. ReLU
    stands after every layer but the last, RepMLP among them, which gives the published logits of the light network;
    kernels of 1, 3 and 5 and a Global Perceptron that is not reduced give both networks the published parameter counts
    (87.0 and 41.07 million).

    Raises:
        ValueError: an unknown style or output stride, or not one number for each stage.
    """

    style: str
    reductions: tuple[int, ...]  # r of each stage; 0: no RepMLP
    groups: tuple[int, ...]  # g of FC3 and of the local convolutions, of each stage
    partition: int  # h = w
    image_size: int | tuple[int, int]
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    branches: tuple[int, ...] = (1, 3, 5)  # kernel sizes of the local convolutions
    global_perceptron: bool = True
    gp_reduction: tuple[int, ...] = (1, 1, 1, 1)  # of the Global Perceptron's hidden width, of each stage
    embedding: bool = False  # the head's outputs are an embedding, normalised by a BatchNorm, not logits
    bottleneck: int = 4  # how many times the first 1x1 convolution of a bottleneck reduces the channels
    stem_reduction: int = 4  # channels of the first stage / those of the stem
    output_stride: int = 32  # of the last stage at most
    insert_bn: bool = False  # the training structure is the deploy structure with a BatchNorm after every FC3

    def __post_init__(self) -> None:
        if self.style not in REPMLP_LAYERS:
            raise ValueError(f"unknown style {self.style!r}: choose {' or '.join(REPMLP_LAYERS)}")
        if self.output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"an output_stride is {', '.join(map(str, OUTPUT_STRIDES))}, not {self.output_stride}")
        names = ("channels", "blocks", "groups", "gp_reduction", "reductions")
        stages = {name: getattr(self, name) for name in names}
        if len({len(values) for values in stages.values()}) > 1:
            raise ValueError(f"a network needs one number for each stage, not {stages}")
        if min((n for name in names[:-1] for n in stages[name]), default=0) < 1:
            raise ValueError(f"only a reduction may be 0: {stages}")

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.blocks)

    @property
    def size_step(self) -> int:
        """Of what the height and width of an image are multiples, so that partitions divide the maps."""
        return max((self.partition * s for s, r in zip(self.strides, self.reductions, strict=True) if r), default=1)

    @property
    def strides(self) -> tuple[int, ...]:
        """The pixels of an image between two positions of a map, of each stage."""
        return tuple(min(4 * 2**stage, self.output_stride) for stage in range(len(self.channels)))

    def dilation(self, stage: int) -> int:
        """Returns the distance between the taps of a stage's 3x3 convolutions."""
        return 1 if self.reductions[stage] else 4 * 2**stage // self.strides[stage]

    @property
    def repmlp_channels(self) -> list[int]:
        """The channels of the RepMLPs of each stage; 0 where it has none."""
        outer = 1 if self.style == "light" else self.bottleneck
        return [c // outer // r if r else 0 for c, r in zip(self.channels, self.reductions, strict=True)]


def named(**layers: nn.Module) -> nn.Sequential:
    """Returns layers one after the other, under their names."""
    return nn.Sequential(OrderedDict(layers))


class RepMLP(PartitionBlock):
    """Global, Partition and Local Perceptron over maps of one size (Fig. 1).

    Args:
        channels: C, in and out; a multiple of `groups`.
        size: (H, W) of the maps, multiples of h and w.
        h: height of a partition.
        w: width of a partition.
        groups: g of FC3 and of the local convolutions.
        branches: kernel sizes of the Local Perceptron's convolutions; may be empty.
        gp_reduction: the Global Perceptron's hidden width is its C * H/h * W/w values / gp_reduction; None leaves it
            out. Where one partition is the whole map there is none.
        deploy: build the structure that `local_inject` leaves.
        fc3_as_conv: kernel size of a convolution that takes the place of FC3; None leaves FC3. No branch is larger.

    Raises:
        ValueError: partitions that do not divide the maps, groups that do not divide the channels, a reduction that
            leaves nothing, an even kernel, or a branch that is larger than the convolution that it would merge into.
    """

    fc1_fc2: nn.Sequential | None

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        h: int,
        w: int,
        groups: int = 1,
        branches: Sequence[int] = (1, 3, 5),
        gp_reduction: int | None = 1,
        deploy: bool = False,
        fc3_as_conv: int | None = None,
    ) -> None:
        super().__init__(h, w, branches, deploy)
        self.channels = channels
        if channels % groups:
            raise ValueError(f"{channels} channels can't be divided into {groups} groups")
        if size[0] % h or size[1] % w:
            raise ValueError(f"a {size[0]}x{size[1]} map can't be divided into {h}x{w} partitions")
        self.fc1_fc2 = None
        if gp_reduction and size != (h, w):
            values = channels * (size[0] // h) * (size[1] // w)
            hidden = values // gp_reduction
            if not hidden:
                raise ValueError(f"the {values} values of a Global Perceptron can't be reduced {gp_reduction} times")
            self.fc1_fc2 = named(fc1=nn.Linear(values, hidden), act=nn.ReLU(), fc2=nn.Linear(hidden, values))
            self.avg = named(pool=nn.AvgPool2d((h, w)), bn=nn.Identity() if deploy else nn.BatchNorm2d(channels))
        if fc3_as_conv is None:
            self.fc3 = GroupedFC(channels, channels, h, w, groups, bias=deploy)
        else:
            check_kernel_sizes([fc3_as_conv])
            if max(branches, default=0) > fc3_as_conv:
                raise ValueError(f"branches {tuple(branches)} do not fit into a {fc3_as_conv}x{fc3_as_conv} kernel")
            self.fc3 = PartitionConv(channels, fc3_as_conv, groups, bias=deploy)
        self.fc3_bn = nn.Identity() if deploy else nn.BatchNorm2d(self.fc3.out_channels)
        self.add_branches(lambda k: nn.Conv2d(channels, channels, k, padding=k // 2, groups=groups, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        partitions = self._partition(x if self.fc1_fc2 is None else self._add_global(x, self.fc1_fc2))
        if self.constraint is not None:
            return self._restore(self._constrained_fc3(partitions, self.constraint), x.shape)
        # `len` would make the size of the batch a constant of an exported network.
        out = self.fc3(partitions).reshape(partitions.shape[0], self.fc3.out_channels, -1, 1)
        out = self.fc3_bn(out).view_as(partitions)
        for branch in local_branches(self, self.branches):
            out = out + branch(partitions)
        return self._restore(out, x.shape)

    @property
    def deploy(self) -> bool:  # type: ignore[override]  # as in the base class
        """Whether nothing is left to inject, neither into FC3 nor into FC1."""
        return super().deploy and (self.fc1_fc2 is None or isinstance(self.avg.bn, nn.Identity))

    def norm_channels(self) -> int:
        """Returns the number of channels of a BatchNorm after FC3: one for each of its outputs."""
        return self.fc3.out_channels

    def other_layers(self) -> set[str]:
        """Returns the names of the Global Perceptron's layers; raises ValueError where it has others."""
        if self.fc1_fc2 is None:
            return {"fc1_fc2"}
        kinds = {"fc1": nn.Linear, "act": nn.ReLU, "fc2": nn.Linear}
        layers = dict(self.fc1_fc2.named_children())
        if layers.keys() != kinds.keys() or not all(isinstance(layers[name], kind) for name, kind in kinds.items()):
            raise ValueError(f"fc1_fc2 is {describe_module(self.fc1_fc2)}: two linear layers with ReLU belong there")
        norm = self.avg.get_submodule("bn")
        if not isinstance(norm, nn.Identity) and not is_batch_norm(norm, self.channels):
            raise ValueError(
                f"avg.bn is {describe_module(norm)}: a BatchNorm of {self.channels} channels, or nothing, belongs there"
            )
        return {"fc1_fc2", "avg"}

    def _add_global(self, x: Tensor, fc1_fc2: nn.Sequential) -> Tensor:
        """Adds one value to every partition of every channel (N, C, H, W), made of the means of them all."""
        means = self.avg(x)
        offsets: Tensor = fc1_fc2(means.flatten(1)).view_as(means)[:, :, :, None, :, None]
        n, c, height, width = x.shape
        partitions = x.reshape(n, c, height // self.h, self.h, width // self.w, self.w)
        return (partitions + offsets).view_as(x)

    @torch.no_grad()
    def local_inject(self) -> None:
        """Locality Injection, in place, as of every `PartitionBlock`; FC1 takes in the BatchNorm before it as well."""
        self.check_structure()
        if self.fc1_fc2 is not None and isinstance(self.avg.bn, _BatchNorm):
            fc1 = cast(nn.Linear, self.fc1_fc2.fc1)
            weight, bias = absorb_batch_norm(fc1.weight.double(), fc1.bias, self.avg.bn)
            fc1.weight.copy_(weight)
            fc1.bias.copy_(bias)
            self.avg.bn = nn.Identity().train(self.training)
        super().local_inject()


class ResidualBlock(nn.Module):
    """Layers one after the other beside a shortcut, then ReLU.

    Args:
        layers: by the names that the published checkpoints give them.
        shortcut: what the input goes through on its way around them.
        drop_path: rate at which the layers are left out for an image in training.
    """

    def __init__(self, layers: Mapping[str, nn.Module], shortcut: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.layers = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, O, H / stride, W / stride)."""
        out: Tensor = x
        for name in self.layers:
            out = self.get_submodule(name)(out)
        out = self.act(self.shortcut(x) + self.drop_path(out))
        return out


def plain_layers(
    in_channels: int, inner: int, channels: int, stride: int, dilation: int, deploy: bool
) -> dict[str, nn.Module]:
    """Returns the layers of ResNet's bottleneck, of any stride."""
    return {
        "conv1": FoldableConvNorm(in_channels, inner, 1, act=nn.ReLU(), deploy=deploy),
        "conv2": FoldableConvNorm(inner, inner, 3, stride, nn.ReLU(), deploy, dilation),
        "conv3": FoldableConvNorm(inner, channels, 1, deploy=deploy),
    }


def light_layers(channels: int, inner: int, repmlp: RepMLP, deploy: bool) -> dict[str, nn.Module]:
    """Returns the layers of a light block, which has no `inner` channels but those of RepMLP, in place of the 3x3."""
    return {
        "light_conv1": FoldableConvNorm(channels, repmlp.channels, 1, act=nn.ReLU(), deploy=deploy),
        "light_repmlp": repmlp,
        "light_act": nn.ReLU(),
        "light_conv3": FoldableConvNorm(repmlp.channels, channels, 1, deploy=deploy),
    }


def bottleneck_layers(channels: int, inner: int, repmlp: RepMLP, deploy: bool) -> dict[str, nn.Module]:
    """Returns the layers of a RepMLP bottleneck: 3x3 convolutions lead to the fewer channels of RepMLP and back."""
    return {
        "btnk_conv1": FoldableConvNorm(channels, inner, 1, act=nn.ReLU(), deploy=deploy),
        "btnk_conv2": FoldableConvNorm(inner, repmlp.channels, 3, act=nn.ReLU(), deploy=deploy),
        "btnk_repmlp": repmlp,
        "btnk_act": nn.ReLU(),
        "btnk_conv4": FoldableConvNorm(repmlp.channels, inner, 3, act=nn.ReLU(), deploy=deploy),
        "btnk_conv5": FoldableConvNorm(inner, channels, 1, deploy=deploy),
    }


REPMLP_LAYERS = {"light": light_layers, "bottleneck": bottleneck_layers}

# Sec. 4.2, 320 pixels: partitions of 10x10 and a fourth kernel; g of c3 and of c4 give the networks their names. Their
# deploy forms differ as the paper says: from g8/16 to g4/8, 47 % more parameters and 3.6 % more FLOPs.
_RES50_320 = RepMLPResNetSpec(
    "bottleneck", (0, 2, 4, 0), (1, 8, 8, 1), partition=10, image_size=320, branches=(1, 3, 5, 7)
)
# Sec. 4.3: fewer blocks and half the channels of ResNet-50, except for the stem; no 1x1 convolution reduces or expands.
# The paper does not describe the layers that give the embedding. Here they are a linear layer and a BatchNorm after the
# pooling, as is usual in face recognition.
_FACE_RES_NET = RepMLPResNetSpec(
    "bottleneck",
    (0, 0, 0, 0),
    (4, 4, 4, 4),
    partition=6,
    image_size=96,
    channels=(128, 256, 512, 1024),
    blocks=(3, 2, 2, 2),
    embedding=True,
    bottleneck=1,
    stem_reduction=2,
)

SPECS: dict[str, RepMLPResNetSpec] = {
    # With the 4 groups of the published code. The appendix has 8, and 30 % fewer FLOPs than ResNet-50; so counted, 8
    # groups save 29 % and 4 groups 25 %.
    "RepMLP-Res50-light-224": RepMLPResNetSpec("light", (0, 8, 8, 0), (4, 4, 4, 4), partition=7, image_size=224),
    "RepMLP-Res50-bottleneck-224": RepMLPResNetSpec(
        "bottleneck", (0, 2, 4, 0), (8, 8, 8, 8), partition=7, image_size=224
    ),
    "RepMLP-Res50-g8-8-320": _RES50_320,
    "RepMLP-Res50-g8-16-320": replace(_RES50_320, groups=(1, 8, 16, 1)),
    "RepMLP-Res50-g4-8-320": replace(_RES50_320, groups=(1, 4, 8, 1)),
    "FaceResNet": _FACE_RES_NET,
    "RepMLP-FaceRes": replace(_FACE_RES_NET, reductions=(2, 2, 2, 0)),
}


class RepMLPResNet(StagedNetwork):
    """The network: ResNet's stem, four stages of residual blocks, linear head.

    Args:
        spec: a row of `SPECS`.
        num_classes: outputs of the head, logits or the dimension of the embedding; 0 leaves the pooled features.
        in_chans: channels of the input image.
        img_size: height and width that the Global Perceptrons are made for; the spec's own where None.
        drop_path_rate: of the last block; grows linearly from 0 with the depth.
        deploy: build the structure that `locality_injection` leaves.
        drop_rate: of the dropout before the head.
        global_pool: "avg", or "" for a head that classifies every position of the last map.

    Raises:
        ValueError: the partitions do not divide the maps of an image of `img_size`, or an unknown `global_pool`.
    """

    classifier = "linear"

    def __init__(
        self,
        spec: RepMLPResNetSpec,
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
        self.num_features = self.head_hidden_size = spec.channels[-1]
        step = spec.size_step
        if height % step or width % step or min(height, width) <= 0:
            raise ValueError(
                f"img_size {height}x{width} must be a positive multiple of {step}, so that partitions of "
                f"{spec.partition}x{spec.partition} divide the maps"
            )
        drop_path = torch.linspace(0, drop_path_rate, spec.depth, device="cpu").split(spec.blocks)
        self._stem_channels = spec.channels[0] // spec.stem_reduction
        injected = deploy or spec.insert_bn
        stem = FoldableConvNorm(in_chans, self._stem_channels, 7, 2, act=nn.ReLU(), deploy=injected)
        self.stage0 = nn.Sequential(stem, nn.MaxPool2d(3, 2, 1))
        for stage, rates in enumerate(drop_path):
            blocks = [self._block(stage, depth, float(rate), injected) for depth, rate in enumerate(rates)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*blocks))
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"stage{stage + 1}"}
            for stage, (channels, stride) in enumerate(zip(spec.channels, spec.strides, strict=True))
        ]
        self.head_norm = nn.Identity()
        self.num_classes = num_classes
        self.linear = self._make_head(num_classes, injected) if num_classes > 0 else nn.Identity()
        if spec.insert_bn and not deploy:
            self.insert_bn()

    def _block(self, stage: int, depth: int, drop_path: float, deploy: bool) -> ResidualBlock:
        spec = self.spec
        channels, dilation = spec.channels[stage], spec.dilation(stage)
        inner = channels // spec.bottleneck
        if depth == 0:
            before = spec.channels[stage - 1] if stage else self._stem_channels
            stride = spec.strides[stage] // spec.strides[stage - 1] if stage else 1
            shortcut = FoldableConvNorm(before, channels, 1, stride, deploy=deploy)
            return ResidualBlock(plain_layers(before, inner, channels, stride, dilation, deploy), shortcut, drop_path)
        if spec.reductions[stage]:
            layers = REPMLP_LAYERS[spec.style](channels, inner, self._repmlp(stage, deploy), deploy)
        else:
            layers = plain_layers(channels, inner, channels, 1, dilation, deploy)
        return ResidualBlock(layers, nn.Identity(), drop_path)

    @property
    def partition(self) -> tuple[int, int] | None:
        """(height, width) of the smallest partitions, in pixels of the image; None without a RepMLP."""
        spec, left = self.spec, len(self.feature_info)  # later stages may be removed
        stages = zip(spec.strides[:left], spec.reductions[:left], spec.blocks[:left], strict=True)
        sides = [spec.partition * stride for stride, reduction, blocks in stages if reduction and blocks > 1]
        return to_2tuple(min(sides)) if sides else None

    def _repmlp(self, stage: int, deploy: bool) -> RepMLP:
        spec, stride = self.spec, self.spec.strides[stage]
        return RepMLP(
            spec.repmlp_channels[stage],
            (self.img_size[0] // stride, self.img_size[1] // stride),
            spec.partition,
            spec.partition,
            spec.groups[stage],
            spec.branches,
            spec.gp_reduction[stage] if spec.global_perceptron else None,
            deploy,
        )

    @staticmethod
    def built_for(weights: Mapping[str, Tensor], spec: RepMLPResNetSpec, img_size: tuple[int, int]) -> dict[str, Any]:
        """Returns the `in_chans` and `img_size` that weights were made with, see `Family`."""
        stem = weights.get("stage0.0.conv.weight", torch.empty(0, 3))
        steps = [spec.partition * stride for stride in spec.strides]
        img_size = size_of_global_perceptrons(weights, spec.repmlp_channels, steps, img_size)
        return {"in_chans": stem.shape[1:2].numel(), "img_size": img_size}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that sort parameters by depth."""
        return {"stem": r"^stage0", "blocks": r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"}

    def _make_head(self, num_classes: int, deploy: bool = False) -> nn.Module:
        if self.spec.embedding:
            return EmbeddingHead(self.num_features, num_classes, deploy)
        return nn.Linear(self.num_features, num_classes)

    def _check_size(self, x: Tensor) -> None:
        if self.spec.global_perceptron:
            super()._check_size(x)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage, c2 first and with the stem before it, to what the stage before gave, or to the image."""
        return self._run(self.get_submodule(f"stage{stage + 1}").children(), x if stage else self.stage0(x))


def size_of_global_perceptrons(
    weights: Mapping[str, Tensor], channels: Sequence[int], steps: Sequence[int], img_size: tuple[int, int]
) -> tuple[int, int]:
    """Returns the (height, width) of the images that the Global Perceptrons of a network were made for.

    Args:
        weights: by name; those of the first stage begin with `stage1.`.
        channels: of the RepMLPs of each stage.
        steps: the side of a partition of each stage, in pixels of the image.
        img_size: to prefer where it fits; else a square one is returned.
    """
    for stage, (count, step) in enumerate(zip(channels, steps, strict=True), 1):
        kernels = (
            w for k, w in weights.items() if k.startswith(f"stage{stage}.") and k.endswith(".fc1_fc2.fc1.weight")
        )
        fc1 = next(kernels, None)
        if fc1 is not None:
            partitions = fc1.shape[1:2].numel() // max(1, count)
            fits = partitions == img_size[0] * img_size[1] // step**2
            return img_size if fits else to_2tuple(math.isqrt(partitions) * step)
    return img_size


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return variant_cfg(
        SPECS[name],
        first_conv="stage0.0.conv",
        classifier="linear",
        origin_url="https://github.com/DingXiaoH/RepMLP",
        paper_name="RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition",
        paper_ids="arXiv:2105.01883",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "repmlp_res50_light_224": _cfg("RepMLP-Res50-light-224"),
        "repmlp_res50_bottleneck_224": _cfg("RepMLP-Res50-bottleneck-224"),
        "repmlp_res50_g8_8_320": _cfg("RepMLP-Res50-g8-8-320"),
        "repmlp_res50_g8_16_320": _cfg("RepMLP-Res50-g8-16-320"),
        "repmlp_res50_g4_8_320": _cfg("RepMLP-Res50-g4-8-320"),
        "faceresnet": _cfg("FaceResNet", mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD),
        "repmlp_faceres": _cfg("RepMLP-FaceRes", mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> RepMLPResNet:
    return cast(RepMLPResNet, build_variant(RepMLPResNet, name, SPECS[name], pretrained, **kwargs))


@register_model
def repmlp_res50_light_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with light blocks, of the paper."""
    return _create("RepMLP-Res50-light-224", pretrained, **kwargs)


@register_model
def repmlp_res50_bottleneck_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with RepMLP bottlenecks, of the paper."""
    return _create("RepMLP-Res50-bottleneck-224", pretrained, **kwargs)


@register_model
def repmlp_res50_g8_8_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g8/8, of the paper: 320 pixels, 8 groups in c3 and c4."""
    return _create("RepMLP-Res50-g8-8-320", pretrained, **kwargs)


@register_model
def repmlp_res50_g8_16_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g8/16, of the paper: 320 pixels, 8 groups in c3 and 16 in c4."""
    return _create("RepMLP-Res50-g8-16-320", pretrained, **kwargs)


@register_model
def repmlp_res50_g4_8_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g4/8, of the paper: 320 pixels, 4 groups in c3 and 8 in c4."""
    return _create("RepMLP-Res50-g4-8-320", pretrained, **kwargs)


@register_model
def faceresnet(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """FaceResNet, of the paper: embeddings of aligned faces without RepMLP, the baseline of RepMLP-FaceRes."""
    return _create("FaceResNet", pretrained, **kwargs)


@register_model
def repmlp_faceres(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-FaceRes, of the paper: embeddings of aligned faces."""
    return _create("RepMLP-FaceRes", pretrained, **kwargs)
