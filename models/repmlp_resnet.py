"""RepMLP-ResNet-50: the first RepMLP, in place of 3x3 convolutions of a ResNet.

Source: Ding et al., "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition"
(arXiv:2105.01883). State-dict names and shapes are those of the published code, before and after conversion.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import DropPath, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from .layers import ConvNorm, GroupedFC, PartitionBlock
from .reparam import Reparameterizable, absorb_batch_norm, fold_batch_norm
from .stages import StagedNetwork
from .variants import build_variant, variant_cfg


@dataclass(frozen=True)
class RepMLPResNetSpec:
    """The shape of one network; stage i works on maps of image_size / (4 * 2 ** i), the paper's c2, c3, c4 and c5.

    The first block of a stage, and every block of a stage whose reduction r is 0, is ResNet's own bottleneck: 1x1, 3x3
    and 1x1 convolutions, with C / 4 inner channels and the stride in the 3x3. The other blocks hold a RepMLP:

    - `light`: 1x1, RepMLP, 1x1; the RepMLP has C / r channels.
    - `bottleneck`: 1x1, 3x3, RepMLP, 3x3, 1x1; the first 3x3 leads from C / 4 to C / 4 / r channels, the last one back.

    The paper leaves open where the activations stand, and whether the bottleneck's Global Perceptron is reduced. ReLU
    stands behind every layer but the last, RepMLP among them, which gives the published logits of the light network;
    kernels of 1, 3 and 5 and a Global Perceptron that is not reduced give both networks the published parameter counts
    (87.0 and 41.07 million).

    Raises:
        ValueError: an unknown style, or channels, blocks and reductions not of the same number of stages.
    """

    style: str
    reductions: tuple[int, ...]  # r of each stage
    groups: int  # g of FC3 and of the local convolutions
    partition: int  # h = w
    image_size: int | tuple[int, int]
    channels: tuple[int, ...] = (256, 512, 1024, 2048)
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    branches: tuple[int, ...] = (1, 3, 5)  # kernel sizes of the local convolutions
    global_perceptron: bool = True
    gp_reduction: int = 1
    embedding: bool = False  # the head's outputs are an embedding, normalised by a BatchNorm, not logits

    def __post_init__(self) -> None:
        if self.style not in REPMLP_LAYERS:
            raise ValueError(f"unknown style {self.style!r}: choose {' or '.join(REPMLP_LAYERS)}")
        stages = {"channels": self.channels, "blocks": self.blocks, "reductions": self.reductions}
        if len({len(values) for values in stages.values()}) > 1:
            raise ValueError(f"a network needs one number for each stage, not {stages}")
        if min((*self.channels, *self.blocks), default=0) < 1:
            raise ValueError(f"a stage has at least one channel and block: {stages}")

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.blocks)

    @property
    def size_step(self) -> int:
        """Of what the height and width of an image are multiples, so that partitions divide the maps."""
        return max((self.partition * 4 * 2**i for i, r in enumerate(self.reductions) if r), default=1)


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

    Raises:
        ValueError: partitions that do not divide the maps, groups that do not divide the channels, or an even kernel.
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
    ) -> None:
        super().__init__(h, w, branches, deploy)
        self.channels = channels
        if size[0] % h or size[1] % w:
            raise ValueError(f"a {size[0]}x{size[1]} map can't be divided into {h}x{w} partitions")
        self.fc1_fc2 = None
        if gp_reduction and size != (h, w):
            values = channels * (size[0] // h) * (size[1] // w)
            hidden = values // gp_reduction
            self.fc1_fc2 = named(fc1=nn.Linear(values, hidden), act=nn.ReLU(), fc2=nn.Linear(hidden, values))
            self.avg = named(pool=nn.AvgPool2d((h, w)), bn=nn.Identity() if deploy else nn.BatchNorm2d(channels))
        self.fc3 = GroupedFC(channels, channels, h, w, groups, bias=deploy)
        self.fc3_bn = nn.Identity() if deploy else nn.BatchNorm2d(self.fc3.out_channels)
        self.add_branches(lambda k: nn.Conv2d(channels, channels, k, padding=k // 2, groups=groups, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        partitions = self._partition(x if self.fc1_fc2 is None else self._add_global(x, self.fc1_fc2))
        # `len` would make the size of the batch a constant of an exported network.
        out = self.fc3_bn(self.fc3(partitions).reshape(partitions.shape[0], -1, 1, 1)).view_as(partitions)
        for branch in self._local_branches():
            out = out + branch(partitions)
        return self._restore(out, x.shape)

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
        if self.fc1_fc2 is not None and not self.deploy:
            fc1, norm = cast(nn.Linear, self.fc1_fc2.fc1), cast(nn.BatchNorm2d, self.avg.bn)
            weight, bias = absorb_batch_norm(fc1.weight.double(), fc1.bias, norm)
            fc1.weight.copy_(weight)
            fc1.bias.copy_(bias)
            self.avg.bn = nn.Identity().train(self.training)
        super().local_inject()


class FoldableConvNorm(ConvNorm, Reparameterizable):
    """A convolution that keeps the size, but for its stride, and a BatchNorm that conversion folds into it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=deploy)
        super().__init__(conv, act)
        self.deploy = deploy
        if deploy:
            del self.bn

    @torch.no_grad()
    def local_inject(self) -> None:
        """Folds the BatchNorm into the convolution, in place; does nothing where that is already done."""
        if self.deploy:
            return
        conv = self.conv
        weight, bias = fold_batch_norm(conv.weight.double(), None, self.bn)
        conv.weight.copy_(weight)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
        del self.bn
        self.deploy = True


class EmbeddingHead(nn.Linear, Reparameterizable):
    """A linear layer and its BatchNorm, which conversion folds into it: features (N, C) -> embedding (N, E)."""

    def __init__(self, in_features: int, out_features: int, deploy: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.deploy = deploy
        self.bn = nn.Identity() if deploy else nn.BatchNorm1d(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, E)."""
        x = self.bn(super().forward(x))
        return x

    @torch.no_grad()
    def local_inject(self) -> None:
        """Folds the BatchNorm into the layer, in place; does nothing where that is already done."""
        if self.deploy:
            return
        weight, bias = fold_batch_norm(self.weight.double(), self.bias, cast(nn.BatchNorm1d, self.bn))
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.bn, self.deploy = nn.Identity().train(self.training), True


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


def plain_layers(in_channels: int, channels: int, stride: int, deploy: bool) -> dict[str, nn.Module]:
    """Returns the layers of ResNet's bottleneck, of any stride."""
    inner = channels // 4
    return {
        "conv1": FoldableConvNorm(in_channels, inner, 1, act=nn.ReLU(), deploy=deploy),
        "conv2": FoldableConvNorm(inner, inner, 3, stride, act=nn.ReLU(), deploy=deploy),
        "conv3": FoldableConvNorm(inner, channels, 1, deploy=deploy),
    }


def light_layers(channels: int, repmlp: RepMLP, deploy: bool) -> dict[str, nn.Module]:
    """Returns the layers of a light block: RepMLP takes the place of the 3x3 convolution."""
    return {
        "light_conv1": FoldableConvNorm(channels, repmlp.channels, 1, act=nn.ReLU(), deploy=deploy),
        "light_repmlp": repmlp,
        "light_act": nn.ReLU(),
        "light_conv3": FoldableConvNorm(repmlp.channels, channels, 1, deploy=deploy),
    }


def bottleneck_layers(channels: int, repmlp: RepMLP, deploy: bool) -> dict[str, nn.Module]:
    """Returns the layers of a RepMLP bottleneck: 3x3 convolutions lead to the fewer channels of RepMLP and back."""
    inner = channels // 4
    return {
        "btnk_conv1": FoldableConvNorm(channels, inner, 1, act=nn.ReLU(), deploy=deploy),
        "btnk_conv2": FoldableConvNorm(inner, repmlp.channels, 3, act=nn.ReLU(), deploy=deploy),
        "btnk_repmlp": repmlp,
        "btnk_act": nn.ReLU(),
        "btnk_conv4": FoldableConvNorm(repmlp.channels, inner, 3, act=nn.ReLU(), deploy=deploy),
        "btnk_conv5": FoldableConvNorm(inner, channels, 1, deploy=deploy),
    }


REPMLP_LAYERS = {"light": light_layers, "bottleneck": bottleneck_layers}

SPECS: dict[str, RepMLPResNetSpec] = {
    "RepMLP-Res50-light-224": RepMLPResNetSpec("light", (0, 8, 8, 0), groups=4, partition=7, image_size=224),
    "RepMLP-Res50-bottleneck-224": RepMLPResNetSpec("bottleneck", (0, 2, 4, 0), groups=8, partition=7, image_size=224),
    # The paper's network for aligned faces. Blocks, channels and pooling are ResNet-50's here; the embedding, of 512
    # numbers, say, is made by a linear layer and a BatchNorm, as in face recognition at large.
    "RepMLP-FaceRes": RepMLPResNetSpec(
        "bottleneck", (2, 2, 2, 0), groups=4, partition=6, image_size=96, embedding=True
    ),
}


class RepMLPResNet(StagedNetwork):
    """The network: ResNet's stem, four stages of residual blocks, linear head.

    Args:
        spec: a row of `SPECS`.
        num_classes: outputs of the head, logits or numbers of an embedding; 0 leaves the pooled features.
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
        stem = FoldableConvNorm(in_chans, spec.channels[0] // 4, 7, 2, act=nn.ReLU(), deploy=deploy)
        self.stage0 = nn.Sequential(stem, nn.MaxPool2d(3, 2, 1))
        for stage, rates in enumerate(drop_path):
            blocks = [self._block(stage, depth, float(rate), deploy) for depth, rate in enumerate(rates)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*blocks))
        self.feature_info = [
            {"num_chs": channels, "reduction": 4 * 2**stage, "module": f"stage{stage + 1}"}
            for stage, channels in enumerate(spec.channels)
        ]
        self.head_norm = nn.Identity()
        self.num_classes = num_classes
        self.linear = self._make_head(num_classes, deploy) if num_classes > 0 else nn.Identity()

    def _block(self, stage: int, depth: int, drop_path: float, deploy: bool) -> ResidualBlock:
        spec = self.spec
        channels = spec.channels[stage]
        if depth == 0:
            before, stride = (spec.channels[stage - 1], 2) if stage else (spec.channels[0] // 4, 1)
            shortcut = FoldableConvNorm(before, channels, 1, stride, deploy=deploy)
            return ResidualBlock(plain_layers(before, channels, stride, deploy), shortcut, drop_path)
        if spec.reductions[stage]:
            layers = REPMLP_LAYERS[spec.style](channels, self._repmlp(stage, deploy), deploy)
        else:
            layers = plain_layers(channels, channels, 1, deploy)
        return ResidualBlock(layers, nn.Identity(), drop_path)

    def _repmlp(self, stage: int, deploy: bool) -> RepMLP:
        spec, stride = self.spec, 4 * 2**stage
        outer = spec.channels[stage] if spec.style == "light" else spec.channels[stage] // 4
        return RepMLP(
            outer // spec.reductions[stage],
            (self.img_size[0] // stride, self.img_size[1] // stride),
            spec.partition,
            spec.partition,
            spec.groups,
            spec.branches,
            spec.gp_reduction if spec.global_perceptron else None,
            deploy,
        )

    @staticmethod
    def built_for(weights: Mapping[str, Tensor], spec: RepMLPResNetSpec, img_size: tuple[int, int]) -> dict[str, Any]:
        """Returns the `in_chans` and `img_size` that weights were made with, see `Family`."""
        stem = weights.get("stage0.0.conv.weight", torch.empty(0, 3))
        fc1 = next((name for name in weights if name.endswith(".fc1_fc2.fc1.weight")), None)
        if fc1 is not None:
            channels = weights[fc1.replace("fc1_fc2.fc1", "fc3")].shape[:1].numel() // spec.partition**2
            partitions = weights[fc1].shape[1:2].numel() // max(1, channels)
            step = spec.partition * 2 * 2 ** int(fc1[len("stage")])
            if partitions != img_size[0] * img_size[1] // step**2:
                img_size = to_2tuple(math.isqrt(partitions) * step)
        return {"in_chans": stem.shape[1:2].numel(), "img_size": img_size}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that sort parameters by depth."""
        return {"stem": r"^stage0", "blocks": r"^stage(\d+)" if coarse else r"^stage(\d+)\.(\d+)"}

    def _make_head(self, num_classes: int, deploy: bool = False) -> nn.Module:
        if self.spec.embedding:
            return EmbeddingHead(self.num_features, num_classes, deploy)
        return nn.Linear(self.num_features, num_classes)

    def _check_size(self, x: Tensor) -> None:
        if self.spec.global_perceptron and x.shape[-2:] != self.img_size:
            (height, width), (h, w) = x.shape[-2:], self.img_size
            raise ValueError(
                f"an input of {height}x{width} does not fit a network whose Global Perceptrons are made for {h}x{w}: "
                f"resize it to {h}x{w}, or build the network with img_size=({height}, {width})"
            )

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage, c2 first and with the stem before it, to what the stage before gave, or to the image."""
        return self._run(self.get_submodule(f"stage{stage + 1}").children(), x if stage else self.stage0(x))

    def _keep(self, stages: int) -> None:
        for stage in range(stages, len(self.feature_info)):
            delattr(self, f"stage{stage + 1}")


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
def repmlp_faceres(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-FaceRes, of the paper: embeddings of aligned faces."""
    return _create("RepMLP-FaceRes", pretrained, **kwargs)
