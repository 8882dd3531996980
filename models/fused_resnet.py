"""RepMLP-ResNet for inference: channels last, 1x1 convolutions and FC3 as matrix products, additions in place.

Made by `models.fusion.fuse_batch_norms` from the deploy form, and exactly equal to it. Maps are (N, H, W, C): a 1x1
convolution is then one product over all positions of a batch, and larger ones are faster on a CPU.

A block ends with y = relu(x + W h + b), where x is its shortcut. The product is added to x in place. So is b, but not
by a pass of its own: within a stage the shortcut holds x + B, where B is the sum of the b of the blocks to come. Then
y + B' = max(x + B + W h, B') with B = b + B'. The first layer of a block, which reads the shortcut, has B in its bias.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import ConvNorm
from .repmlp_resnet import RepMLP, RepMLPResNet, ResidualBlock
from .stages import check_exact_size


class FusedPointwise(nn.Module):
    """A 1x1 convolution (N, H, W, I) -> (N, H / stride, W / stride, O).

    Args:
        conv: the convolution.
        input_offset: (I,), what the input holds besides the map itself.
        output_offset: (O,), what the output is to hold besides the map itself.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self, conv: nn.Conv2d, input_offset: Tensor | float = 0.0, output_offset: Tensor | float = 0.0
    ) -> None:
        super().__init__()
        weight = conv.weight.flatten(1)
        self.stride = conv.stride[0]
        bias = _bias(conv) + output_offset - (weight * input_offset).sum(1)
        _register(self, weight=weight.t().contiguous(), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, I) -> (N, H / stride, W / stride, O)."""
        if self.stride > 1:
            x = x[:, :: self.stride, :: self.stride]
        n, h, w, _ = x.shape
        return torch.addmm(self.bias, _rows(x), self.weight).view(n, h, w, -1)


class FusedConv(nn.Module):
    """A larger convolution (N, H, W, I) -> (N, H / stride, W / stride, O)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.to(memory_format=torch.channels_last).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, I) -> (N, H / stride, W / stride, O)."""
        x = self.conv(x.permute(0, 3, 1, 2))
        return x.permute(0, 2, 3, 1)


class FusedGlobalPerceptron(nn.Module):
    """FC1 and FC2, with their values in the order of a map of partitions: (N, H/h, W/w, C) -> the same."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    def __init__(self, fc1_fc2: nn.Sequential, channels: int) -> None:
        super().__init__()
        fc1, fc2 = cast(nn.Linear, fc1_fc2.fc1), cast(nn.Linear, fc1_fc2.fc2)
        order = torch.arange(fc1.in_features, device=fc1.weight.device).view(channels, -1).t().flatten()
        _register(self, weight1=fc1.weight[:, order], bias1=fc1.bias, weight2=fc2.weight[order], bias2=fc2.bias[order])

    def forward(self, x: Tensor) -> Tensor:
        """(N, H/h, W/w, C) -> (N, H/h, W/w, C)."""
        hidden = F.linear(x.flatten(1), self.weight1, self.bias1).relu_()
        return F.linear(hidden, self.weight2, self.bias2).view_as(x)


class FusedRepMLP(nn.Module):
    """Global Perceptron and FC3: (N, H, W, C) -> (N, H, W, C)."""

    kernel: Tensor
    bias: Tensor

    def __init__(self, block: RepMLP) -> None:
        super().__init__()
        self.h, self.w, fc3 = block.h, block.w, block.fc3
        groups, positions, c = fc3.groups, self.h * self.w, block.channels // fc3.groups
        # group, output channel, its position, input channel, its position
        kernel = fc3.weight.reshape(groups, c, positions, c, positions)
        _register(self, kernel=kernel.permute(0, 4, 3, 2, 1).reshape(groups, positions * c, -1))
        bias = cast(Tensor, fc3.bias).view(groups, c, positions)
        _register(self, bias=bias.transpose(1, 2).reshape(groups, 1, -1))
        self.gp = None if block.fc1_fc2 is None else FusedGlobalPerceptron(block.fc1_fc2, block.channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        n, height, width, c = x.shape
        groups, p, q = len(self.kernel), height // self.h, width // self.w
        parts = x.reshape(n, p, self.h, q, self.w, c)
        if self.gp is not None:
            parts = parts + self.gp(parts.mean((2, 4)))[:, :, None, :, None]
        parts = parts.view(n, p, self.h, q, self.w, groups, c // groups).permute(5, 0, 1, 3, 2, 4, 6)
        out = torch.baddbmm(self.bias, parts.reshape(groups, n * p * q, -1), self.kernel)
        return out.view(parts.shape).permute(1, 2, 4, 3, 5, 0, 6).reshape(x.shape)


class FusedBlock(nn.Module):
    """A residual block whose input and output hold an offset for each channel, see the top of this file.

    Args:
        block: in deploy form.
        input_offset: (I,), what its input holds besides the map itself.
        output_offset: (O,), what its output is to hold besides the map itself.
    """

    weight: Tensor
    floor: Tensor

    def __init__(self, block: ResidualBlock, input_offset: Tensor | float, output_offset: Tensor) -> None:
        super().__init__()
        *before, last = (layer for layer in map(block.get_submodule, block.layers) if not isinstance(layer, nn.ReLU))
        conv = cast(ConvNorm, last).conv
        first, *others = before
        layers = [FusedPointwise(cast(ConvNorm, first).conv, input_offset), *map(_fused, others)]
        self.layers = nn.ModuleList(layers)
        self.shortcut = None
        if isinstance(block.shortcut, ConvNorm):
            self.shortcut = FusedPointwise(block.shortcut.conv, input_offset, _bias(conv) + output_offset)
        _register(self, weight=conv.weight.flatten(1).t().contiguous(), floor=output_offset)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, I) -> (N, H / stride, W / stride, O), written into x where its shortcut has no layer."""
        hidden = x
        for layer in self.layers:
            hidden = layer(hidden).relu_()
        out = x if self.shortcut is None else self.shortcut(x)
        rows = out.view(-1, out.shape[-1])
        torch.addmm(rows, _rows(hidden), self.weight, out=rows)
        return out.clamp_(min=self.floor)


class FusedRepMLPResNet(nn.Module):
    """A RepMLP-ResNet for inference; made by `models.fusion.fuse_batch_norms`.

    Args:
        model: in deploy form.
    """

    def __init__(self, model: RepMLPResNet) -> None:
        super().__init__()
        self.img_size, self.num_classes, self.global_pool = model.img_size, model.num_classes, model.global_pool
        self.step, self.any_size = model.spec.size_step, not model.spec.global_perceptron
        stem, self.pool = cast(ConvNorm, model.stage0[0]), model.stage0[1]
        self.stem = FusedConv(stem.conv)
        stages = [model.get_submodule(info["module"]).children() for info in model.feature_info]
        self.blocks = nn.ModuleList(block for stage in stages for block in _fused_stage(stage))
        self.head = model.linear.requires_grad_(False)  # without BatchNorm, or the identity

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> logits (N, num_classes), or pooled features (N, C) of a network without head.

        Those of a network without pooling are (N, num_classes, h, w) and (N, C, h, w).

        Raises:
            ValueError: H or W does not fit the network.
        """
        if not self.any_size:
            check_exact_size(x, self.img_size)
        elif x.shape[2] % self.step or x.shape[3] % self.step:
            raise ValueError(f"an input of {x.shape[2]}x{x.shape[3]} must be a multiple of {self.step}")
        x = self.stem(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.pool(x).relu_().permute(0, 2, 3, 1)  # the largest is the same before ReLU, which is cheaper after it
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x.mean((1, 2)) if self.global_pool else x)
        return out if self.global_pool else out.permute(0, 3, 1, 2)


def _fused_stage(blocks: Iterable[nn.Module]) -> list[FusedBlock]:
    """Fuses the blocks of a stage, the last one first, since each needs the offsets of those after it."""
    fused: list[FusedBlock] = []
    output_offset: Tensor | None = None
    for block in reversed([cast(ResidualBlock, block) for block in blocks]):
        bias = _bias(cast(ConvNorm, block.get_submodule(block.layers[-1])).conv)
        output_offset = torch.zeros_like(bias) if output_offset is None else output_offset
        input_offset = 0.0 if isinstance(block.shortcut, ConvNorm) else bias + output_offset
        fused.insert(0, FusedBlock(block, input_offset, output_offset))
        output_offset = bias + output_offset
    return fused


def _fused(layer: nn.Module) -> nn.Module:
    """Returns the fused form of a layer after the first one of a block."""
    return FusedRepMLP(layer) if isinstance(layer, RepMLP) else FusedConv(cast(ConvNorm, layer).conv)


def _bias(conv: nn.Conv2d) -> Tensor:
    return cast(Tensor, conv.bias)


def _register(module: nn.Module, **constants: Tensor) -> None:
    """Gives a module tensors that are not trained."""
    for name, tensor in constants.items():
        module.register_buffer(name, tensor.detach())


def _rows(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N * H * W, C), a view where the map is contiguous."""
    return x.reshape(-1, x.shape[-1])
