"""RepMLPNet: a hierarchical vision MLP with re-parameterised locality.

Source: Ding et al., "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022 (arXiv:2112.11081).
State-dict names and shapes are those of the published code, so that its checkpoints load here and ours load there.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .reparam import (
    Reparameterizable,
    ReparameterizableNetwork,
    conv_to_fc,
    fold_batch_norm,
    inject_,
    merge_kernels,
)


@dataclass(frozen=True)
class RepMLPNetSpec:
    """The shape of one network; stage i works on maps of image_size / (patch_size * 2 ** i).

    Raises:
        ValueError: channels, blocks and share-sets are not of the same number of stages.
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

    def __post_init__(self) -> None:
        stages = {"channels": self.channels, "blocks": self.blocks, "share_sets": self.share_sets}
        if len({len(values) for values in stages.values()}) > 1:
            raise ValueError(f"a network needs one number for each stage, not {stages}")


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
}
# fmt: on


class GlobalPerceptron(nn.Module):
    """Gates every channel by what the whole image holds, as squeeze-and-excitation does."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> gate (N, C, 1, 1) in (0, 1)."""
        x = x.mean((2, 3), keepdim=True)
        return self.fc2(self.fc1(x).relu()).sigmoid()


class _BatchedLinear(torch.autograd.Function):
    """rows (S, M, I) times kernel (S, O, I) transposed, with a kernel gradient that is laid out as the kernel is.

    Derived from `torch.bmm` alone it would come transposed, and be copied, and under autocast converted, with strides
    that defeat the cache: for the kernel of a first stage that takes longer than the product.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        return torch.bmm(rows, kernel.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        rows, kernel = ctx.saved_tensors
        return torch.bmm(grads[0], kernel), torch.bmm(grads[0].transpose(1, 2), rows)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which a matrix product with `x` is to be computed."""
    device = x.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if enabled and x.dtype != torch.float64:  # which autocast leaves alone
        return torch.get_autocast_dtype(device)
    return x.dtype


class GroupedFC(nn.Conv2d):
    """A fully-connected layer over the values of maps of one size, with a kernel for each group of C / groups channels.

    Its parameters are those of the published grouped 1x1 convolution over C * h * w channels; the product is one matrix
    multiplication for each group on a strided view of the input, which is many times faster.
    """

    def __init__(self, in_channels: int, out_channels: int, h: int, w: int, groups: int, bias: bool) -> None:
        super().__init__(in_channels * h * w, out_channels * h * w, 1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(M, C, h, w) -> (M, O, h, w), the result strided as (groups, M, O / groups * h * w)."""
        m, _, h, w = x.shape
        groups, values, dtype = self.groups, self.in_channels // self.groups, autocast_dtype(x)
        rows = x.reshape(m, groups, values).transpose(0, 1).to(dtype)
        kernel = self.weight.reshape(groups, -1, values).to(dtype)
        if self.bias is None:
            out = _BatchedLinear.apply(rows, kernel)
        else:
            out = torch.baddbmm(self.bias.reshape(groups, 1, -1).to(dtype), rows, kernel.transpose(1, 2))
        return out.transpose(0, 1).reshape(m, self.out_channels // (h * w), h, w)


class ShareSetFC(GroupedFC):
    """A fully-connected layer over the h * w positions of a map, one kernel for each of S share-sets."""

    def __init__(self, share_sets: int, h: int, w: int, bias: bool) -> None:
        super().__init__(share_sets, share_sets, h, w, share_sets, bias)


class ShareSetConv(nn.Conv2d):
    """A depth-wise convolution in which channel c of C uses kernel c mod S."""

    def __init__(self, share_sets: int, kernel_size: int) -> None:
        super().__init__(share_sets, share_sets, kernel_size, padding=kernel_size // 2, groups=share_sets, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N * C / S, S, h, w)."""
        c, h, w = x.shape[1:]
        s = self.groups
        if self.kernel_size == (1, 1):
            return x.reshape(-1, s, h, w) * self.weight.reshape(s, 1, 1)
        # One kernel for each channel: many times faster than S groups over N * C / S maps.
        return F.conv2d(x, self.weight.repeat(c // s, 1, 1, 1), padding=self.padding, groups=c).reshape(-1, s, h, w)


class ConvNorm(nn.Sequential):
    """A convolution and its BatchNorm, under the names that the published checkpoints give them."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        if act is not None:
            self.act = act


def check_kernel_sizes(branches: Sequence[int]) -> None:
    """Raises ValueError where parallel local convolutions of these sizes could not be merged, or even told apart."""
    if any(k % 2 == 0 or k < 1 for k in branches) or len(set(branches)) < len(branches):
        raise ValueError(f"local convolutions need different, odd kernel sizes, not {tuple(branches)}")


def fold_branches(branches: Sequence[ConvNorm]) -> tuple[Tensor, Tensor]:
    """Returns, in float64, the one convolution that equals parallel ones with their BatchNorms.

    Args:
        branches: at least one; convolutions of the same channels with odd kernels.

    Returns:
        The kernel (O, I, kh, kw), of the largest height and width, and the bias (O,).
    """
    folded = [fold_batch_norm(branch.conv.weight.double(), None, branch.bn) for branch in branches]
    kernels, biases = zip(*folded, strict=True)
    return merge_kernels(kernels), torch.stack(biases).sum(0)


class PartitionBlock(Reparameterizable):
    """What the RepMLP blocks of both papers share: an FC over partitions, `fc3`, and the convolutions that go into it.

    A subclass sets `fc3`, with `fc3_bn` behind it, and gives `add_branches` the convolutions.

    Args:
        h: height of a partition.
        w: width of a partition.
        branches: kernel sizes of the Local Perceptron's convolutions; may be empty.
        deploy: build the structure that `local_inject` leaves.

    Raises:
        ValueError: kernel sizes that are even, or the same twice.
    """

    fc3: GroupedFC
    fc3_bn: nn.Module

    def __init__(self, h: int, w: int, branches: Sequence[int], deploy: bool) -> None:
        super().__init__()
        check_kernel_sizes(branches)
        self.h, self.w, self.deploy = h, w, deploy
        self.branches = () if deploy else tuple(branches)

    def add_branches(self, conv: Callable[[int], nn.Conv2d]) -> None:
        """Adds a convolution without bias, `conv(kernel_size)`, and its BatchNorm for every branch."""
        for k in self.branches:
            self.add_module(f"repconv{k}", ConvNorm(conv(k)))

    def _local_branches(self) -> list[ConvNorm]:
        return [cast(ConvNorm, self.get_submodule(f"repconv{k}")) for k in self.branches]

    def _partition(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N * H/h * W/w, C, h, w)."""
        n, c, height, width = x.shape
        if (height, width) == (self.h, self.w):
            return x
        if height % self.h or width % self.w:
            raise ValueError(f"a {height}x{width} map can't be divided into {self.h}x{self.w} partitions")
        x = x.reshape(n, c, height // self.h, self.h, width // self.w, self.w)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, self.h, self.w)

    def _restore(self, partitions: Tensor, shape: torch.Size) -> Tensor:
        """Undoes `_partition`, towards a given shape (N, C, H, W)."""
        n, c, height, width = shape
        if (height, width) == (self.h, self.w):
            return partitions
        x = partitions.reshape(n, height // self.h, width // self.w, c, self.h, self.w)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(shape)

    def _terms(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns, in float64, what makes the equal FC: a factor (O*h*w, 1) for FC3, a bias (O*h*w,), a convolution."""
        assert isinstance(self.fc3_bn, _BatchNorm)
        ones = torch.ones(self.fc3.out_channels, 1, dtype=torch.float64, device=self.fc3.weight.device)
        factor, bias = fold_batch_norm(ones, None, self.fc3_bn)
        if not self.branches:
            return factor, bias, None
        kernel, shift = fold_branches(self._local_branches())
        return factor, bias + shift.repeat_interleave(self.h * self.w), kernel

    def get_equivalent_fc3(self) -> tuple[Tensor, Tensor]:
        """Returns the FC that equals FC3, its BatchNorm and all branches: kernel and bias in the shapes of `fc3`'s.

        Fused in float64 and cast back to the parameter's dtype; differentiable, for quantisation-aware training.
        """
        if self.deploy:
            assert self.fc3.bias is not None
            return self.fc3.weight, self.fc3.bias
        factor, bias, kernel = self._terms()
        weight = self.fc3.weight.flatten(1).double() * factor
        if kernel is not None:
            weight = weight + conv_to_fc(kernel, (self.h, self.w))
        dtype = self.fc3.weight.dtype
        return weight.to(dtype).view_as(self.fc3.weight), bias.to(dtype)

    @torch.no_grad()
    def local_inject(self) -> None:
        """Locality Injection, in place; does nothing where it is already done.

        Computes what `get_equivalent_fc3` does, but leaves it where the weight is, so that it takes next to no memory.
        A state dict taken before shares the weight: copy it first where it is still wanted.
        """
        if self.deploy:
            return
        factor, bias, kernel = self._terms()
        self.fc3.weight.data = self.fc3.weight.contiguous()
        inject_(self.fc3.weight.flatten(1), factor, kernel, (self.h, self.w))
        self.fc3.bias = nn.Parameter(bias.to(self.fc3.weight.dtype), self.fc3.weight.requires_grad)
        self.fc3_bn = nn.Identity().train(self.training)
        for k in self.branches:
            delattr(self, f"repconv{k}")
        self.branches, self.deploy = (), True


class RepMLPBlock(PartitionBlock):
    """Channel, Local and Global Perceptron: an FC with local prior over the positions of every partition.

    Args:
        channels: C, a multiple of `share_sets`; channel c belongs to set c mod S.
        h: height of a partition.
        w: width of a partition.
        share_sets: S, how many kernels the C channels share.
        branches: kernel sizes of the Local Perceptron's convolutions; may be empty.
        gp_reduction: the Global Perceptron's hidden width is C / gp_reduction; None leaves it out.
        deploy: build the structure that `local_inject` leaves.
    """

    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        share_sets: int = 1,
        branches: Sequence[int] = (1, 3),
        gp_reduction: int | None = 4,
        deploy: bool = False,
    ) -> None:
        super().__init__(h, w, branches, deploy)
        if channels % share_sets:
            raise ValueError(f"{channels} channels can't be divided among {share_sets} share-sets")
        self.share_sets = share_sets
        self.gp = GlobalPerceptron(channels, channels // gp_reduction) if gp_reduction else None
        self.fc3 = ShareSetFC(share_sets, h, w, bias=deploy)
        self.fc3_bn = nn.Identity() if deploy else nn.BatchNorm2d(share_sets)
        self.add_branches(partial(ShareSetConv, share_sets))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), H and W multiples of h and w."""
        partitions = self._partition(x)
        out = self.fc3_bn(self.fc3(partitions.reshape(-1, self.share_sets, self.h, self.w)))
        for branch in self._local_branches():
            out = out + branch(partitions)
        out = self._restore(out.reshape(partitions.shape), x.shape)
        return out if self.gp is None else out * self.gp(x)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of one image (1, C, H, W) as a matrix product, which is faster than a convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, C, H, W) -> (1, O, H, W)."""
        return torch.mm(self.weight.flatten(1), x.reshape(x.shape[1], -1)).view(1, -1, *x.shape[2:])


class FFNBlock(nn.Module):
    """The usual two-layer perceptron over channels, as 1x1 convolutions with BatchNorm.

    It treats positions alike, so the images of a batch are put below each other and taken for one.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.ffn_fc1 = ConvNorm(PointwiseConv(channels, hidden_channels))
        self.ffn_fc2 = ConvNorm(PointwiseConv(hidden_channels, channels))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), strided as (C, N, H, W)."""
        n, c, h, w = x.shape
        tall = x.transpose(0, 1).reshape(1, c, n * h, w)
        return self.ffn_fc2(self.act(self.ffn_fc1(tall))).view(c, n, h, w).transpose(0, 1)


class RepMLPNetUnit(nn.Module):
    """A RepMLP block over positions, then an FFN over channels, each behind a BatchNorm and beside a shortcut."""

    def __init__(self, channels: int, block: RepMLPBlock, ffn_expansion: int, drop_path: float) -> None:
        super().__init__()
        self.repmlp_block = block
        self.ffn_block = FFNBlock(channels, channels * ffn_expansion)
        self.prebn1 = nn.BatchNorm2d(channels)
        self.prebn2 = nn.BatchNorm2d(channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(self.repmlp_block(self.prebn1(x)))
        return x + self.drop_path(self.ffn_block(self.prebn2(x)))


class RepMLPNet(ReparameterizableNetwork):
    """The hierarchical network: patch embedding, stages of units with 2x2 embeddings between, linear head.

    Args:
        spec: a row of `SPECS`.
        num_classes: outputs of the head; 0 leaves the pooled features.
        in_chans: channels of the input image.
        img_size: height and width that the partitions are made for; the spec's own where None.
        drop_path_rate: of the last unit; grows linearly from 0 with the depth.
        deploy: build the structure that `locality_injection` leaves.

    `feature_info` says of each stage what timm wants to know: channels, stride, and the module whose output it is.

    Raises:
        ValueError: `img_size` is no multiple of the network's total stride.
    """

    def __init__(
        self,
        spec: RepMLPNetSpec,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.img_size = height, width = to_2tuple(spec.image_size if img_size is None else img_size)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = spec.channels[-1]
        self.grad_checkpointing = False
        strides = [spec.patch_size * 2**i for i in range(len(spec.blocks))]
        if height % strides[-1] or width % strides[-1] or min(height, width) <= 0:
            raise ValueError(f"img_size {height}x{width} must be a positive multiple of the total stride {strides[-1]}")
        drop_path = torch.linspace(0, drop_path_rate, sum(spec.blocks), device="cpu").split(spec.blocks)

        def unit(stage: int, depth: int) -> RepMLPNetUnit:
            channels, stride = spec.channels[stage], strides[stage]
            block = RepMLPBlock(
                channels,
                height // stride,
                width // stride,
                spec.share_sets[stage],
                spec.branches,
                spec.gp_reduction if spec.global_perceptron else None,
                deploy,
            )
            return RepMLPNetUnit(channels, block, spec.ffn_expansion, float(drop_path[stage][depth]))

        def embedding(in_channels: int, out_channels: int, patch: int) -> ConvNorm:
            return ConvNorm(nn.Conv2d(in_channels, out_channels, patch, stride=patch, bias=False), nn.ReLU())

        self.conv_embedding = embedding(in_chans, spec.channels[0], spec.patch_size)
        self.stages = nn.ModuleList(
            nn.ModuleList(unit(stage, depth) for depth in range(blocks)) for stage, blocks in enumerate(spec.blocks)
        )
        self.embeds = nn.ModuleList(embedding(before, after, patch=2) for before, after in pairwise(spec.channels))
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": f"stages.{stage}.{blocks - 1}"}
            for stage, (channels, stride, blocks) in enumerate(zip(spec.channels, strides, spec.blocks, strict=True))
        ]
        self.head_norm = nn.BatchNorm2d(self.num_features)
        self.reset_classifier(num_classes)

    @staticmethod
    def built_for(weights: Mapping[str, Tensor], spec: RepMLPNetSpec, img_size: tuple[int, int]) -> dict[str, Any]:
        """Returns the `in_chans` and `img_size` that weights were made with.

        Args:
            weights: by name, in either form.
            spec: their network's.
            img_size: (height, width) to prefer where it fits; of others, only square ones can be told from the weights.
        """
        names = "conv_embedding.conv.weight", "stages.0.0.repmlp_block.fc3.weight"
        return input_of(weights, *names, spec.patch_size, img_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes every unit in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Puts in a new head of `num_classes` outputs; 0 leaves the pooled features."""
        self.num_classes = num_classes
        reference = self.conv_embedding.bn.weight
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(device=reference.device, dtype=reference.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> normalised features (N, C, H / stride, W / stride).

        Raises:
            ValueError: H or W is no multiple of `img_size`, so that the partitions do not divide the maps.
        """
        check_input_size(x, self.img_size)
        for stage in range(len(self.stages)):
            x = self._stage(stage, x)
        return self.head_norm(x)

    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage, with the embedding before it, to what the stage before gave, or to the image."""
        x = self.embeds[stage - 1](x) if stage else self.conv_embedding(x)
        for unit in self.stages[stage].children():
            x = checkpointed(unit, x) if self.grad_checkpointing and self.training else unit(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns what the stages give, under the names and with the meaning that timm's networks have for it.

        Args:
            x: image (N, in_chans, H, W).
            indices: which stages, negative ones counted from the end; a number n stands for the last n, None for all.
            norm: put the last stage's map through the final BatchNorm, which fits no other.
            stop_early: leave out the stages behind the last one that is asked for.
            output_fmt: NCHW, the only layout there is.
            intermediates_only: return the maps alone.

        Returns:
            The maps (N, C_i, H / stride_i, W / stride_i) in the order of the stages; unless `intermediates_only`, after
            the map that the network ends with: `forward_features(x)`, or with `stop_early` the last one computed.

        Raises:
            ValueError: another layout, or as `forward_features`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"the maps of a {type(self).__name__} are NCHW, not {output_fmt}")
        check_input_size(x, self.img_size)
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        features, final = [], x
        for stage in range(last_taken + 1 if stop_early else len(self.stages)):
            x = self._stage(stage, x)
            ends = stage + 1 == len(self.stages)
            final = self.head_norm(x) if ends and (norm or not intermediates_only) else x
            if stage in taken:
                features.append(final if norm else x)
        return features if intermediates_only else (final, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes, in place, what `forward_intermediates` does not need for some of the stages, as timm's networks do.

        Args:
            indices: as there.
            prune_norm: remove the final BatchNorm even where the last stage stays.
            prune_head: remove the head even where the last stage stays.

        Returns:
            The stages that `indices` stand for, none of them negative.
        """
        taken, last = feature_take_indices(len(self.stages), indices)
        cut = last + 1 < len(self.stages)
        self.stages, self.embeds = self.stages[: last + 1], self.embeds[:last]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.head_norm = nn.Identity()  # type: ignore[assignment]
        if prune_head or cut:
            self.reset_classifier(0)
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (N, C, h, w) -> logits (N, num_classes), or pooled features (N, C) before the head."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def input_of(
    weights: Mapping[str, Tensor], embedding: str, fc: str, patch_size: int, img_size: tuple[int, int]
) -> dict[str, Any]:
    """Returns the `in_chans` and `img_size` that the weights of a network were made with.

    Args:
        weights: by name.
        embedding: the name of the patch embedding's kernel (C, in_chans, ...); without it, 3 channels.
        fc: the name of the first FC kernel (..., h * w, ...), the positions of its map second.
        patch_size: height and width of what makes a position, in pixels.
        img_size: (height, width) to prefer where it fits; of others, only square ones can be told.
    """
    in_chans = weights[embedding].shape[1:2].numel() if embedding in weights else 3
    positions = weights[fc].shape[1:2].numel() if fc in weights else None
    if positions is not None and positions != img_size[0] * img_size[1] // patch_size**2:
        img_size = to_2tuple(math.isqrt(positions) * patch_size)
    return {"in_chans": in_chans, "img_size": img_size}


def check_input_size(x: Tensor, img_size: tuple[int, int]) -> None:
    """Raises ValueError where partitions made for images of `img_size` do not divide an input (..., H, W)."""
    (height, width), (h, w) = x.shape[-2:], img_size
    if height % h or width % w:
        raise ValueError(
            f"an input of {height}x{width} does not fit a network whose partitions are made for {h}x{w}: give it "
            f"{h}x{w} or a multiple of that, or build it with img_size=({height}, {width})"
        )


@contextmanager
def untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, the BatchNorms of a module normalise as ever, but keep their running statistics in copies to throw away.

    They are not told to stop tracking, since checkpointing wants the same tensors saved in both passes.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    buffers = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """Applies a module, keeping only its input for the backward pass, where it is computed once more.

    Running statistics take in a batch once, not twice, so that training is the same with and without.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), untracked_statistics(module)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)
