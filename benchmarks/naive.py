"""RepMLPNet as it was published, operation by operation: the baseline that everything else is measured against.

FC3 is a grouped 1x1 convolution on a map of one pixel and S * h * w channels, local branches are grouped convolutions
on (M, S, h, w), FFNs are 1x1 convolutions, no BatchNorm is folded. It shares no forward pass with the library, so that
a faster library does not make the baseline faster. Weights are contiguous: the published conversion leaves a
transposed view that every forward pass copies again, which would flatter us.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import GlobalPerceptron, RepMLPBlock, RepMLPNet, RepMLPNetUnit
from models.layers import ConvNorm


def naive(model: RepMLPNet) -> "NaiveRepMLPNet":
    """Returns a copy of a network, in training or deploy structure, in the published formulation.

    Its state dict has the same names and values, it is in the same mode and on the same device.
    """
    with torch.device("meta"):
        copy = NaiveRepMLPNet(model)
    state = {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    return copy.train(model.training)


@torch.no_grad()
def naive_injection(block: "NaiveBlock | RepMLPBlock") -> tuple[Tensor, Tensor]:
    """Returns what Locality Injection makes of FC3, its BatchNorm and the branches, the published way.

    The merged kernel becomes an FC by convolving the identity matrix of h * w positions, once for each set, and
    everything is computed in the dtype of the weights.

    Args:
        block: in training structure.

    Returns:
        Weight (S * h * w, h * w, 1, 1), a transposed view where there are branches, and bias (S * h * w,).
    """
    positions, sets = block.h * block.w, block.share_sets
    weight, bias = _fold(block.fc3, cast(nn.BatchNorm2d, block.fc3_bn))
    if block.branches:
        kernel, kernel_bias = _merged_branches(block)
        eye = torch.eye(positions, dtype=kernel.dtype, device=kernel.device)
        maps = eye.repeat(1, sets).reshape(positions, sets, block.h, block.w)
        fc = F.conv2d(maps, kernel, padding=kernel.shape[-1] // 2, groups=sets)
        weight = fc.reshape(positions, sets * positions).t().reshape_as(weight) + weight
        bias = kernel_bias.repeat_interleave(positions) + bias
    return weight, bias


def inject(model: "NaiveRepMLPNet") -> None:
    """Injects every block of a network, in place, as the published `local_inject` does."""
    for block in model.modules():
        if isinstance(block, NaiveBlock) and not block.deploy:
            block.local_inject()


def _fold(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    std = (cast(Tensor, bn.running_var) + bn.eps).sqrt()
    scale = (bn.weight / std).repeat_interleave(conv.weight.shape[0] // bn.num_features)
    bias = bn.bias - cast(Tensor, bn.running_mean) * bn.weight / std
    return conv.weight * scale.reshape(-1, 1, 1, 1), bias.repeat_interleave(len(scale) // len(bias))


def _merged_branches(block: "NaiveBlock | RepMLPBlock") -> tuple[Tensor, Tensor]:
    """Returns kernel (S, 1, k, k) and bias (S,) of the one convolution that equals all branches."""
    largest = max(block.branches)
    kernels, biases = [], []
    for k in block.branches:
        branch = block.get_submodule(f"repconv{k}")
        kernel, bias = _fold(cast(nn.Conv2d, branch.conv), cast(nn.BatchNorm2d, branch.bn))
        kernels.append(F.pad(kernel, [(largest - k) // 2] * 4))
        biases.append(bias)
    return sum(kernels[1:], kernels[0]), sum(biases[1:], biases[0])


def _conv(like: nn.Conv2d) -> nn.Conv2d:
    """Returns a plain convolution of the same shape; the library's may be a faster subclass."""
    return nn.Conv2d(
        like.in_channels,
        like.out_channels,
        cast(tuple[int, int], like.kernel_size),
        cast(tuple[int, int], like.stride),
        cast(tuple[int, int], like.padding),
        groups=like.groups,
        bias=like.bias is not None,
    )


def _norm(like: nn.BatchNorm2d) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(like.num_features, like.eps, like.momentum)


class NaiveConvNorm(nn.Sequential):
    """Convolution, BatchNorm, and perhaps an activation."""

    def __init__(self, like: ConvNorm, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.bn = _conv(like.conv), _norm(like.bn)
        if act is not None:
            self.act = act


class NaiveGlobalPerceptron(nn.Module):
    """Pooling, two 1x1 convolutions, sigmoid."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = _conv(cast(nn.Conv2d, like.fc1)), _conv(cast(nn.Conv2d, like.fc2))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> gate (N, C, 1, 1)."""
        x = F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)), inplace=True)
        return self.fc2(x).sigmoid()


class NaiveBlock(nn.Module):
    """The RepMLP block of the published code."""

    def __init__(self, like: RepMLPBlock) -> None:
        super().__init__()
        self.share_sets, self.h, self.w, self.deploy = like.share_sets, like.h, like.w, like.deploy
        self.branches: Sequence[int] = like.branches
        self.gp = NaiveGlobalPerceptron(cast(GlobalPerceptron, like.gp))
        self.fc3 = _conv(like.fc3)
        self.fc3_bn: nn.Module = nn.Identity() if like.deploy else _norm(cast(nn.BatchNorm2d, like.fc3_bn))
        for k in self.branches:
            self.add_module(f"repconv{k}", NaiveConvNorm(cast(ConvNorm, like.get_submodule(f"repconv{k}"))))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        n, c, height, width = x.shape
        parts = (height // self.h, width // self.w)
        partitions = x.reshape(n, c, parts[0], self.h, parts[1], self.w).permute(0, 2, 4, 1, 3, 5)
        out = self.fc3(partitions.reshape(-1, self.share_sets * self.h * self.w, 1, 1))
        out = self.fc3_bn(out.reshape(-1, self.share_sets, self.h, self.w))
        if self.branches:
            maps = partitions.reshape(-1, self.share_sets, self.h, self.w)
            out = out + sum(self.get_submodule(f"repconv{k}")(maps) for k in self.branches)
        out = out.reshape(n, *parts, c, self.h, self.w).permute(0, 3, 1, 4, 2, 5).reshape(n, c, height, width)
        return out * self.gp(x)

    def local_inject(self) -> None:
        """Locality Injection, in place; FC3's weight stays the view that it is."""
        weight, bias = naive_injection(self)
        for k in self.branches:
            delattr(self, f"repconv{k}")
        self.branches, self.deploy, self.fc3_bn = (), True, nn.Identity()
        self.fc3.weight, self.fc3.bias = nn.Parameter(weight), nn.Parameter(bias)


class NaiveFFN(nn.Module):
    """Two 1x1 convolutions with BatchNorm and GELU between."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.ffn_fc1, self.ffn_fc2 = (NaiveConvNorm(cast(ConvNorm, fc)) for fc in (like.ffn_fc1, like.ffn_fc2))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return self.ffn_fc2(self.act(self.ffn_fc1(x)))


class NaiveUnit(nn.Module):
    """A block and an FFN, each after a BatchNorm and beside a shortcut."""

    def __init__(self, like: RepMLPNetUnit) -> None:
        super().__init__()
        self.repmlp_block, self.ffn_block = NaiveBlock(like.repmlp_block), NaiveFFN(like.ffn_block)
        self.prebn1, self.prebn2 = _norm(like.prebn1), _norm(like.prebn2)
        self.drop_path = like.drop_path

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        x = x + self.drop_path(self.repmlp_block(self.prebn1(x)))
        return x + self.drop_path(self.ffn_block(self.prebn2(x)))


class NaiveRepMLPNet(nn.Module):
    """The network around the blocks; made by `naive`."""

    def __init__(self, like: RepMLPNet) -> None:
        super().__init__()
        self.conv_embedding = NaiveConvNorm(like.conv_embedding, nn.ReLU())
        self.stages = nn.ModuleList(
            nn.ModuleList(NaiveUnit(cast(RepMLPNetUnit, unit)) for unit in stage.children()) for stage in like.stages
        )
        self.embeds = nn.ModuleList(NaiveConvNorm(cast(ConvNorm, embed), nn.ReLU()) for embed in like.embeds)
        self.head_norm = _norm(like.head_norm)
        self.head = nn.Linear(like.num_features, like.num_classes) if like.num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, 3, H, W) -> logits (N, num_classes)."""
        x = self.conv_embedding(x)
        for i, stage in enumerate(self.stages):
            for unit in cast(nn.ModuleList, stage):
                x = unit(x)
            if i < len(self.embeds):
                x = self.embeds[i](x)
        return self.head(F.adaptive_avg_pool2d(self.head_norm(x), 1).flatten(1))
