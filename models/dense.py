"""Maps of several levels for dense prediction, from any of our networks that has levels.

Source: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022, the section on semantic
segmentation: the same partitions on a larger image, and embeddings that exchange information across their borders.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet, FeatureInfo, feature_take_indices
from torch import Tensor, nn

from .layers import ConvNorm
from .stages import StagedNetwork

# By name, the side of the depth-wise kernels that `dense_backbone` puts into the place of the 2x2 embeddings.
DOWNSAMPLINGS = {"conv3": 3, "conv5": 5}
FULL_RANK = 4  # of a 2x2 kernel, seen as a matrix (input channel, tap) for each output channel


class DenseBackbone(FeatureGetterNet):
    """A network as a feature extractor; build it by `dense_backbone`.

    Args:
        network: cut down, in place, to what the levels need.
        out_indices: the levels, ascending.
        pad: take images of other sizes than the network.
    """

    feature_info: FeatureInfo
    out_indices: tuple[int, ...]

    def __init__(self, network: StagedNetwork, out_indices: Sequence[int], pad: bool) -> None:
        super().__init__(network, tuple(out_indices))
        self.pad = pad

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image (N, in_chans, H, W) -> for each level a map (N, C_i, H / stride_i, W / stride_i), rounded up.

        With `pad`, zeros to the right of and below the image make it a size that the network takes; the maps are then
        cut to the image. The Global Perceptron and BatchNorm's batch statistics see the zeros. A RepMLPNet takes all
        multiples of its `img_size`, so that images may be of any size; a RepMLP-ResNet takes no more than that size.

        Raises:
            ValueError: an image of another size, without `pad`, or one that is too large.
        """
        network = cast(StagedNetwork, self.model)
        height, width = x.shape[-2:]
        if self.pad:
            h, w = network.img_size
            if not network.takes_multiples and (height > h or width > w):
                raise ValueError(
                    f"an image of {height}x{width} is larger than the {h}x{w} that the backbone is made for"
                )
            x = F.pad(x, (0, -width % w, 0, -height % h))
        levels = cast(list[Tensor], network.forward_intermediates(x, list(self.out_indices), intermediates_only=True))
        strides = self.feature_info.reduction()
        return [
            level[..., : -(-height // stride), : -(-width // stride)]
            for level, stride in zip(levels, strides, strict=True)
        ]


def dense_backbone(
    network: nn.Module,
    out_indices: int | Sequence[int] | None = None,
    downsample: str | None = None,
    rank: int = FULL_RANK,
    pad: bool = True,
) -> DenseBackbone:
    """Turns a network into a feature extractor for segmentation or detection, as timm's `features_only=True` does.

    Args:
        network: a `StagedNetwork`, which becomes part of the backbone and is changed in place; its weights are kept.
        out_indices: the levels to return, negative ones counted from the end; a number n stands for the last n, None
            for all. They are returned in the order of the network. Layers that no level needs are removed.
        downsample: replace the 2x2 embeddings of a RepMLPNet: `conv3` or `conv5`; None keeps them.
        rank: of the replacement, see `Downsampling`.
        pad: take images of other sizes than the network, see `DenseBackbone.forward`.

    Raises:
        ValueError: a network without levels, or without one of `out_indices`; an unknown `downsample`, or one for a
            network without 2x2 embeddings; a `rank` that is out of range.
    """
    if not isinstance(network, StagedNetwork):
        raise ValueError(f"a {type(network).__name__} has no maps of several levels: it can't be a backbone")
    if downsample not in (None, *DOWNSAMPLINGS):
        raise ValueError(f"unknown downsample {downsample!r}: choose {' or '.join(DOWNSAMPLINGS)}, or None")
    if downsample is not None:
        network.replace_embeddings(lambda embedding: Downsampling(embedding, DOWNSAMPLINGS[downsample], rank))
    count = len(network.feature_info)
    levels = out_indices if isinstance(out_indices, int | None) else list(out_indices)
    wanted = [levels - 1] if isinstance(levels, int) else levels or []
    if not all(-count <= level < count for level in wanted):
        raise ValueError(f"out_indices {out_indices}: this {type(network).__name__} has the levels 0 to {count - 1}")
    return DenseBackbone(network, sorted(feature_take_indices(count, levels)[0]), pad)


class Downsampling(nn.Sequential):
    """A 1x1 expansion and a depth-wise convolution of stride 2, in place of a 2x2 embedding and with its weights.

    Unlike the embedding its receptive field crosses the borders of 2x2 patches, and so of the partitions. Nothing lies
    between the two convolutions, so that together they are one convolution, whose kernel has for each output channel a
    matrix (input channel, tap) of rank 1: the structure of the published cost. With `rank` r, each output is the sum of
    r such pairs (r times the cost of the expansion).

    It starts from the best approximation of that rank to the pretrained kernel, with zeros for the taps that the
    embedding does not have; BatchNorm and activation are the embedding's own. Rank 4 is exact: the features are those
    of the embedding up to rounding. A lower rank is not, for four taps are in general linearly independent.

    Args:
        embedding: a 2x2 convolution of stride 2, BatchNorm, activation.
        kernel_size: of the depth-wise convolution, odd, 3 or more.
        rank: 1 to 4.

    Raises:
        ValueError: the rank is out of range.
    """

    def __init__(self, embedding: ConvNorm, kernel_size: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= FULL_RANK:
            raise ValueError(f"a 2x2 kernel can be taken apart with a rank of 1 to {FULL_RANK}, not {rank}")
        weight = embedding.conv.weight
        outputs, inputs = weight.shape[:2]
        self.expand = nn.Conv2d(inputs, rank * outputs, 1, bias=False)
        self.conv = nn.Conv2d(
            rank * outputs, outputs, kernel_size, stride=2, padding=kernel_size // 2, groups=outputs, bias=False
        )
        self.to(weight)
        self.bn, self.act = embedding.bn, embedding.act
        if weight.device.type != "meta":  # which has shapes only
            self._start_from(weight)

    @torch.no_grad()
    def _start_from(self, weight: Tensor) -> None:
        """Factorises a kernel (O, I, 2, 2), in float64."""
        outputs, inputs = weight.shape[:2]
        u, s, v = torch.linalg.svd(weight.double().flatten(2), full_matrices=False)  # (O, I, m), (O, m), (O, m, 4)
        rank = min(self.expand.out_channels // outputs, s.shape[1])
        root = s[:, :rank].sqrt()  # in both factors, so that they are of the same magnitude
        expand = self.expand.weight.new_zeros(outputs, self.expand.out_channels // outputs, inputs)
        expand[:, :rank] = (u[..., :rank].mT * root[..., None]).to(expand.dtype)
        self.expand.weight.copy_(expand.view_as(self.expand.weight))
        first = self.conv.kernel_size[0] // 2  # the taps of the embedding lie right and below of the centre
        taps = self.conv.weight.zero_()[:, :rank, first : first + 2, first : first + 2]
        taps.copy_((v[:, :rank] * root[..., None]).unflatten(2, (2, 2)))
