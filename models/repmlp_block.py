"""The blocks of RepMLPNet: one mixes the positions of a map, one its channels.

Source: Ding et al., "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022 (arXiv:2112.11081).
State-dict names and shapes are those of the published code.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .layers import ConvNorm, PartitionBlock, PointwiseConv, ShareSetConv, ShareSetFC, describe_module, local_branches
from .signatures import also_called_as, mmpretrain_block, published_block


class GlobalPerceptron(nn.Module):
    """Gates every channel by the means of all channels over the image, as squeeze-and-excitation does."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden_channels, 1)
        self.fc2 = nn.Conv2d(hidden_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> gate (N, C, 1, 1) in (0, 1)."""
        x = x.mean((2, 3), keepdim=True)
        x = self.fc2(self.fc1(x).relu())
        return x.sigmoid()


class RepMLPBlock(PartitionBlock):
    """Channel, Local and Global Perceptron: an FC with local prior over the positions of every partition.

    It can also be called with the arguments of the published block and of MMPretrain's (`signatures.py`).

    Args:
        channels: C, a multiple of `share_sets`; channel c belongs to set c mod S.
        h: height of a partition.
        w: width of a partition.
        share_sets: S, how many kernels the C channels share.
        branches: kernel sizes of the Local Perceptron's convolutions; may be empty.
        gp_reduction: the Global Perceptron's hidden width is C / gp_reduction; None leaves it out.
        deploy: build the structure that `local_inject` leaves.
    """

    @also_called_as(RepMLP=published_block, MMPretrain=mmpretrain_block)
    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        *,  # the published block goes on in another order
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
        rows = partitions.reshape(-1, self.share_sets, self.h, self.w)
        if self.constraint is not None:
            out = self._constrained_fc3(rows, self.constraint)
        else:
            out = self.fc3_bn(self.fc3(rows))
            for branch in local_branches(self, self.branches):
                out = out + branch(partitions)
        out = self._restore(out.reshape(partitions.shape), x.shape)
        return out if self.gp is None else out * self.gp(x)

    def norm_channels(self) -> int:
        """Returns the number of channels of a BatchNorm after FC3: one for each share-set."""
        return self.share_sets

    def other_layers(self) -> set[str]:
        """Returns the name of the Global Perceptron; raises ValueError where another layer has taken its place."""
        if not (self.gp is None or isinstance(self.gp, GlobalPerceptron)):
            raise ValueError(f"gp is {describe_module(self.gp)}: a GlobalPerceptron, or None, belongs there")
        return {"gp"}


class _Unstacked(torch.autograd.Function):
    """The images of a tall image: (1, C, N * H, W) -> (N, C, H, W), strided as (C, N, H, W).

    The gradient of a mere view could be a tall image whose channels are its last axis in memory. torch's BatchNorm on a
    CPU would misread it: with one image, its strides do not tell the two layouts apart (seen with torch 2.15).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, images: int) -> Tensor:
        _, c, height, w = x.shape
        return x.view(c, images, height // images, w).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        n, c, h, w = grads[0].shape
        return grads[0].transpose(0, 1).contiguous().view(1, c, n * h, w), None


class FFNBlock(nn.Module):
    """The usual two-layer perceptron over channels, as 1x1 convolutions with BatchNorm.

    It treats all positions alike, so the images of a batch are stacked to one tall image.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.ffn_fc1 = ConvNorm(PointwiseConv(channels, hidden_channels))
        self.ffn_fc2 = ConvNorm(PointwiseConv(hidden_channels, channels))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W), strided as (C, N, H, W)."""
        n, c, h, w = x.shape
        x = x.transpose(0, 1).reshape(1, c, n * h, w)
        x = self.ffn_fc2(self.act(self.ffn_fc1(x)))
        out: Tensor = _Unstacked.apply(x, n)
        return out
