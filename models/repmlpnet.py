"""RepMLPNet: a hierarchical vision MLP with re-parameterised locality.

Source: Ding et al., "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022 (arXiv:2112.11081).
State-dict names and shapes are those of the published code, so that its checkpoints load here and ours load there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers import DropPath, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from . import training_form
from .layers import ConvNorm
from .repmlp_block import FFNBlock, RepMLPBlock
from .signatures import also_called_as, mmpretrain_network, published_network
from .stages import StagedNetwork
from .variants import CIFAR100, DIGITS, SHAPES, build_variant, variant_cfg


@dataclass(frozen=True)
class RepMLPNetSpec:
    """The shape of one network; stage i works on maps of image_size / (patch_size * 2 ** i).

    Raises:
        ValueError: channels, blocks and share-sets are not of the same number of stages, or too few.
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    share_sets: tuple[int, ...]
    image_size: int | tuple[int, int]
    patch_size: int = 4
    branches: tuple[int, ...] = (1, 3)  # kernel sizes of the local convolutions
    global_perceptron: bool = True
    gp_reduction: int = 4
    ffn_expansion: int = 4
    insert_bn: bool = False  # the training structure is the deploy structure with a BatchNorm after every FC3

    def __post_init__(self) -> None:
        stages = {"channels": self.channels, "blocks": self.blocks, "share_sets": self.share_sets}
        if len({len(values) for values in stages.values()}) > 1:
            raise ValueError(f"a network needs one number for each stage, not {stages}")
        if not all(min(values, default=0) > 0 for values in stages.values()):
            raise ValueError(f"a stage has at least one channel, block and share-set: {stages}")
        if min(self.channels) < self.gp_reduction:
            raise ValueError(f"{min(self.channels)} channels can't be reduced {self.gp_reduction} times")

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return sum(self.blocks)


# fmt: off
SPECS: dict[str, RepMLPNetSpec] = {
    #                                 channels              blocks         share-sets       image
    "RepMLPNet-T224": RepMLPNetSpec(( 64, 128, 256, 512), (2, 2,  6, 2), (1, 4, 16, 128), 224),
    "RepMLPNet-B224": RepMLPNetSpec(( 96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128), 224),
    "RepMLPNet-T256": RepMLPNetSpec(( 64, 128, 256, 512), (2, 2,  6, 2), (1, 4, 16, 128), 256),
    "RepMLPNet-B256": RepMLPNetSpec(( 96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128), 256),
    "RepMLPNet-D256": RepMLPNetSpec(( 80, 160, 320, 640), (2, 2, 18, 2), (1, 4, 16, 128), 256),
    "RepMLPNet-L256": RepMLPNetSpec(( 96, 192, 384, 768), (2, 2, 18, 2), (1, 4, 32, 256), 256),
    # The CIFAR-100 network of the paper: two stages, 16x16 and 8x8.
    "RepMLPNet-C100": RepMLPNetSpec((128, 256), (6, 6), (8, 32), 32, patch_size=2),
    # Small enough to train on the embedded digits in a minute on a CPU: 8x8 and 4x4.
    "RepMLPNet-Digits": RepMLPNetSpec((32, 64), (2, 2), (4, 16), 16, patch_size=2),
    # For ablations on the rendered shapes, minutes on a CPU: 16x16 and 8x8.
    "RepMLPNet-Shapes": RepMLPNetSpec((48, 96), (2, 2), (4, 16), 32, patch_size=2),
}
# fmt: on
BASE = SPECS["RepMLPNet-B224"]  # what MMPretrain calls "base"


class PatchEmbedding(ConvNorm):
    """A convolution that takes patches together, a BatchNorm and ReLU."""

    takes_training_form = True

    def __init__(self, in_channels: int, out_channels: int, patch: int) -> None:
        super().__init__(nn.Conv2d(in_channels, out_channels, patch, stride=patch, bias=False), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H / patch, W / patch)."""
        for name, layer in self.named_children():
            takes_form = name == "bn" and self.takes_training_form
            x = training_form.batch_norm(layer, x) if takes_form else layer(x)
        return x


class RepMLPNetUnit(nn.Module):
    """A RepMLP block over positions, then an FFN over channels, each after a BatchNorm and beside a shortcut.

    Attributes:
        takes_training_form: whether training takes the form of `training_form.py` where that suits.
    """

    takes_training_form = True

    def __init__(self, channels: int, block: RepMLPBlock, ffn_expansion: int, drop_path: float) -> None:
        super().__init__()
        self.repmlp_block = block
        self.ffn_block = FFNBlock(channels, channels * ffn_expansion)
        self.prebn1 = nn.BatchNorm2d(channels)
        self.prebn2 = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        if self.training and self.takes_training_form:
            layers = training_form.UnitLayers(
                self.prebn1, self.repmlp_block, self.prebn2, self.ffn_block, self.drop_path
            )
            if training_form.suits(layers, x):
                return training_form.apply(layers, x)
        x = x + self.drop_path(self.repmlp_block(self.prebn1(x)))
        x = x + self.drop_path(self.ffn_block(self.prebn2(x)))
        return x


class RepMLPNet(StagedNetwork):
    """The hierarchical network: patch embedding, stages of units with 2x2 embeddings between, linear head.

    It can also be called with the arguments of the published network and of MMPretrain's (`signatures.py`).

    Args:
        spec: a row of `SPECS`.
        num_classes: outputs of the head; 0 leaves the pooled features.
        in_chans: channels of the input image.
        img_size: height and width that the partitions are made for; the spec's own where None.
        drop_path_rate: of the last unit; grows linearly from 0 with the depth.
        deploy: build the structure that `locality_injection` leaves.
        drop_rate: of the dropout before the head.
        global_pool: "avg", or "" for a head that classifies every position of the last map.
        use_checkpoint: as after `set_grad_checkpointing`.

    Raises:
        ValueError: `img_size` is no multiple of the network's total stride, or an unknown `global_pool`.
    """

    head: nn.Module
    head_norm: nn.BatchNorm2d
    takes_multiples = True
    takes_training_form = True

    @also_called_as(RepMLP=partial(published_network, BASE), MMPretrain=partial(mmpretrain_network, BASE))
    def __init__(
        self,
        spec: RepMLPNetSpec,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__(drop_rate, global_pool)
        self.spec = spec
        self.set_grad_checkpointing(use_checkpoint)
        self.img_size = height, width = to_2tuple(spec.image_size if img_size is None else img_size)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = spec.channels[-1]
        strides = [spec.patch_size * 2**i for i in range(len(spec.blocks))]
        if height % strides[-1] or width % strides[-1] or min(height, width) <= 0:
            raise ValueError(f"img_size {height}x{width} must be a positive multiple of the total stride {strides[-1]}")
        drop_path = torch.linspace(0, drop_path_rate, spec.depth, device="cpu").split(spec.blocks)
        injected = deploy or spec.insert_bn

        def unit(stage: int, depth: int) -> RepMLPNetUnit:
            channels, stride = spec.channels[stage], strides[stage]
            block = RepMLPBlock(
                channels,
                height // stride,
                width // stride,
                share_sets=spec.share_sets[stage],
                branches=spec.branches,
                gp_reduction=spec.gp_reduction if spec.global_perceptron else None,
                deploy=injected,
            )
            return RepMLPNetUnit(channels, block, spec.ffn_expansion, float(drop_path[stage][depth]))

        self.conv_embedding = PatchEmbedding(in_chans, spec.channels[0], spec.patch_size)
        self.stages = nn.ModuleList(
            nn.ModuleList(unit(stage, depth) for depth in range(blocks)) for stage, blocks in enumerate(spec.blocks)
        )
        self.embeds = nn.ModuleList(PatchEmbedding(before, after, patch=2) for before, after in pairwise(spec.channels))
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"stages.{stage}.{blocks - 1}"}
            for stage, (channels, stride, blocks) in enumerate(zip(spec.channels, strides, spec.blocks, strict=True))
        ]
        self.head_norm = nn.BatchNorm2d(self.num_features)
        self.reset_classifier(num_classes)
        if spec.insert_bn and not deploy:
            self.insert_bn()

    @staticmethod
    def built_for(weights: Mapping[str, Tensor], spec: RepMLPNetSpec, img_size: tuple[int, int]) -> dict[str, Any]:
        """Returns the `in_chans` and `img_size` that weights were made with, see `Family`."""
        names = "conv_embedding.conv.weight", "stages.0.0.repmlp_block.fc3.weight"
        return input_of(weights, *names, spec.patch_size, img_size)

    @property
    def partition(self) -> tuple[int, int]:
        """(height, width) of the partitions of every stage, in pixels of the image."""
        return self.img_size

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that sort parameters by depth; an embedding belongs to the first block after it."""
        first = () if coarse else (0,)
        embeds = [(rf"^embeds\.{i}\.", (i + 1, *first)) for i in range(len(self.embeds))]
        stages = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^conv_embedding", "blocks": [*embeds, (stages, None), (r"^head_norm", (99999,))]}

    def replace_embeddings(self, make: Callable[[ConvNorm], nn.Module]) -> None:
        """Replaces the 2x2 embeddings between the stages, each by what `make` returns for it."""
        self.embeds = nn.ModuleList(make(cast(ConvNorm, embedding)) for embedding in self.embeds)

    def _make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes)

    def _check_size(self, x: Tensor) -> None:
        check_input_size(x, self.img_size)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage, with the embedding before it, to what the stage before gave, or to the image."""
        x = self.embeds[stage - 1](x) if stage else self.conv_embedding(x)
        return self._run(self.stages[stage].children(), x)

    def set_training_form(self, enable: bool = True) -> None:
        """Trains in the form of `training_form.py`, as is the default, or layer by layer.

        Both compute the same. The form has no second derivatives.
        """
        for module in self.modules():
            if isinstance(module, RepMLPNet | RepMLPNetUnit | PatchEmbedding):
                module.takes_training_form = enable

    def _apply_head_norm(self, x: Tensor) -> Tensor:
        return training_form.batch_norm(self.head_norm, x) if self.takes_training_form else self.head_norm(x)

    def _keep(self, stages: int) -> None:
        self.stages, self.embeds = self.stages[:stages], self.embeds[: stages - 1]


def check_input_size(x: Tensor, img_size: tuple[int, int]) -> None:
    """Raises ValueError where partitions made for images of `img_size` do not divide an input (..., H, W)."""
    (height, width), (h, w) = x.shape[-2:], img_size
    if height % h or width % w:
        raise ValueError(
            f"an input of {height}x{width} does not fit a network whose partitions are made for {h}x{w}: resize it to "
            f"{h}x{w} or a multiple of that, or build the network with img_size=({height}, {width})"
        )


def input_of(
    weights: Mapping[str, Tensor], embedding: str, fc: str, patch_size: int, img_size: tuple[int, int]
) -> dict[str, Any]:
    """Returns the `in_chans` and `img_size` that the weights of a network were made with.

    Args:
        weights: by name.
        embedding: the name of the patch embedding's kernel (C, in_chans, ...); 3 channels where it is missing.
        fc: the name of the first FC kernel, whose second dimension is the h * w positions of its map.
        patch_size: height and width of a position, in pixels.
        img_size: (height, width) to prefer where it fits; else a square one is returned.
    """
    in_chans = weights[embedding].shape[1:2].numel() if embedding in weights else 3
    positions = weights[fc].shape[1:2].numel() if fc in weights else None
    if positions is not None and positions != img_size[0] * img_size[1] // patch_size**2:
        img_size = to_2tuple(math.isqrt(positions) * patch_size)
    return {"in_chans": in_chans, "img_size": img_size}


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return variant_cfg(
        SPECS[name],
        first_conv="conv_embedding.conv",
        classifier="head",
        origin_url="https://github.com/DingXiaoH/RepMLP",
        paper_name="RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality",
        paper_ids="arXiv:2112.11081",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "repmlpnet_t224": _cfg("RepMLPNet-T224"),
        "repmlpnet_b224": _cfg("RepMLPNet-B224"),
        "repmlpnet_t256": _cfg("RepMLPNet-T256"),
        "repmlpnet_b256": _cfg("RepMLPNet-B256"),
        "repmlpnet_d256": _cfg("RepMLPNet-D256"),
        "repmlpnet_l256": _cfg("RepMLPNet-L256"),
        "repmlpnet_c100": _cfg("RepMLPNet-C100", **CIFAR100),
        "repmlpnet_digits": _cfg("RepMLPNet-Digits", **DIGITS),
        "repmlpnet_shapes": _cfg("RepMLPNet-Shapes", **SHAPES),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> RepMLPNet:
    return cast(RepMLPNet, build_variant(RepMLPNet, name, SPECS[name], pretrained, **kwargs))


@register_model
def repmlpnet_t224(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-T224 of the paper."""
    return _create("RepMLPNet-T224", pretrained, **kwargs)


@register_model
def repmlpnet_b224(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-B224 of the paper."""
    return _create("RepMLPNet-B224", pretrained, **kwargs)


@register_model
def repmlpnet_t256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-T256 of the paper."""
    return _create("RepMLPNet-T256", pretrained, **kwargs)


@register_model
def repmlpnet_b256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-B256 of the paper."""
    return _create("RepMLPNet-B256", pretrained, **kwargs)


@register_model
def repmlpnet_d256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-D256 of the paper."""
    return _create("RepMLPNet-D256", pretrained, **kwargs)


@register_model
def repmlpnet_l256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-L256 of the paper."""
    return _create("RepMLPNet-L256", pretrained, **kwargs)


@register_model
def repmlpnet_c100(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet for CIFAR-100, of the paper."""
    return _create("RepMLPNet-C100", pretrained, **kwargs)


@register_model
def repmlpnet_digits(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet for the embedded digits."""
    return _create("RepMLPNet-Digits", pretrained, **kwargs)


@register_model
def repmlpnet_shapes(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet for the rendered shapes."""
    return _create("RepMLPNet-Shapes", pretrained, **kwargs)
