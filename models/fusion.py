"""Fused inference forms of networks, and that of RepMLPNet: BatchNorms folded, only matrix products and GELU left.

`fuse_batch_norms` rewrites a network exactly. `fused_resnet.py` has the fused RepMLP-ResNet, this file the RepMLPNet.
Its maps are kept as (C, N, h * w), with the channels in the order of their share-sets. In that layout the FC3 of a
block is one batched product and each FFN layer one product over the whole batch, with no copy between them, and the
second FFN layer adds straight onto the shortcut.

What is folded where, for a block whose shortcut holds x:

- `prebn1` is a * x + b. FC3 gives a * (W x) + b * rowsum(W) + bias, since W acts on positions and a, b on channels; the
  Global Perceptron takes a and b into its first layer, since a mean commutes with both.
- `prebn2`, and the BatchNorms of the two FFN layers, go into these layers.
- The bias of the second FFN layer is not added at all: the shortcut holds x less a constant k for each channel, which
  every layer that reads the shortcut compensates in its own constants.
"""

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import register_flop_formula

from .fused_resnet import FusedRepMLPResNet
from .layers import ConvNorm, product_for_onnx
from .reparam import check_blocks, fold_batch_norm, is_reparameterizable, relative_difference, to_deploy
from .repmlp_block import GlobalPerceptron
from .repmlp_resnet import RepMLPResNet
from .repmlpnet import RepMLPNet, RepMLPNetUnit, check_input_size

# Columns of an FFN that are computed at a time on a CPU: few enough that the hidden ones stay in the cache, enough that
# the weights are not read too often, and a multiple of 16, since a product of another width is a tenth slower.
FFN_COLUMNS = 768


def is_fusible(model: nn.Module) -> bool:
    """Returns whether a network has an inference form."""
    return type(model) in FUSED


def fuse_batch_norms(model: nn.Module) -> "Fused":
    """Returns a copy of a network in inference form, of the same dtype and on the same device.

    Computed in float64 and cast back. The copy takes inputs of the same sizes and gives the same logits; it can't be
    trained.

    Raises:
        ValueError: the network has no inference form, or something stands in a block that would not be counted.
    """
    if not is_fusible(model):
        known = " or ".join(network.__name__ for network in FUSED)
        raise ValueError(f"only a {known} can be fused, not a {type(model).__name__}")
    check_blocks(model)
    double = deepcopy(model).double()
    fused: Fused = FUSED[type(model)](to_deploy(double) if is_reparameterizable(double) else double)
    return fused.to(next(model.parameters()).dtype).eval()


@torch.no_grad()
def fuse_verified(model: nn.Module, tolerance: float = 1e-4) -> "Fused":
    """Fuses a network and compares both on random images.

    Args:
        model: in evaluation mode.
        tolerance: of the largest relative difference of the logits.

    Raises:
        ValueError: the network has no inference form, or the difference is beyond the tolerance.
    """
    fused = fuse_batch_norms(model)
    reference = next(model.parameters())
    in_chans = cast(int, model.in_chans)
    images = torch.randn(2, in_chans, *fused.img_size, generator=torch.Generator().manual_seed(0))
    images = images.to(reference)
    difference = relative_difference(model(images), fused(images))
    if not difference <= tolerance:
        raise ValueError(f"fusing the BatchNorms changes the logits by {difference:.1e}, more than {tolerance:.0e}")
    return fused


class FusedLinear(nn.Module):
    """A linear layer over channels: (in, n) -> (out, n)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = _constant(weight), _constant(bias[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """(in, n) -> (out, n)."""
        if torch.onnx.is_in_onnx_export():
            return product_for_onnx(x, self.weight, self.bias.flatten())
        return torch.addmm(self.bias, self.weight, x)


class FusedGate(nn.Module):
    """The Global Perceptron after an affine map of its input.

    Args:
        gp: the Global Perceptron.
        order: (C,) the channel of `gp` that each channel of the input is.
        scale: (C,) of the affine map.
        offset: (C,) of the affine map.
    """

    def __init__(self, gp: GlobalPerceptron, order: Tensor, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        fc1, fc2 = (fc.weight.flatten(1) for fc in (gp.fc1, gp.fc2))
        bias1, bias2 = (cast(Tensor, fc.bias) for fc in (gp.fc1, gp.fc2))
        self.fc1 = FusedLinear(fc1[:, order] * scale, bias1 + fc1[:, order] @ offset)
        self.fc2 = FusedLinear(fc2[order], bias2[order])

    def forward(self, x: Tensor) -> Tensor:
        """Means (C, N) -> gate (C, N) in (0, 1)."""
        x = self.fc2(self.fc1(x).relu_())
        return x.sigmoid_()


class FusedUnit(nn.Module):
    """A RepMLP block and an FFN, both adding to the shortcut in place.

    Args:
        unit: in deploy structure.
        order: (C,) the channel of the unit that each channel of the shortcut is.
        shift: (C,) constants that the shortcut's channels lack; updated in place for the next unit.
    """

    def __init__(self, unit: RepMLPNetUnit, order: Tensor, shift: Tensor) -> None:
        super().__init__()
        block, ffn = unit.repmlp_block, unit.ffn_block
        sets, positions = block.share_sets, block.h * block.w
        scale, offset = (t[order] for t in _affine(unit.prebn1))
        offset = offset + scale * shift

        kernel = block.fc3.weight.reshape(sets, positions, positions)
        of_set = torch.arange(len(order), device=order.device) // (len(order) // sets)
        bias = cast(Tensor, block.fc3.bias).reshape(sets, positions)
        self.fc3 = _constant(kernel.transpose(1, 2))  # (S, in, out), which a product of few rows reads faster
        self.fc3_scale = _constant(scale[:, None])
        self.fc3_offset = _constant((offset[:, None] * kernel.sum(2)[of_set] + bias[of_set])[:, None])

        self.gate = None if block.gp is None else FusedGate(block.gp, order, scale, offset)

        scale, offset = (t[order] for t in _affine(unit.prebn2))
        fc1, bias1 = _fold(ffn.ffn_fc1)
        fc2, bias2 = _fold(ffn.ffn_fc2)
        self.ffn1 = FusedLinear(fc1[:, order] * scale, bias1 + fc1[:, order] @ (offset + scale * shift))
        self.ffn2 = _constant(fc2[order])
        shift += bias2[order]

    def forward(self, x: Tensor, partitions: int) -> None:
        """Adds to x (C, N * partitions, h * w), contiguous."""
        self._add_block(x, partitions)
        self._add_ffn(x.flatten(1))

    def _add_block(self, x: Tensor, partitions: int) -> None:
        channels, rows, positions = x.shape
        out = self._fc3(x.view(len(self.fc3), -1, positions)).view_as(x)
        if self.gate is None:
            gate = x.new_ones(1, 1)
        else:
            images = (channels, rows // partitions, partitions)
            gate = self.gate(x.view(*images[:2], -1).mean(2))[:, :, None].expand(images).reshape(channels, rows)
        x.addcmul_(out, (gate * self.fc3_scale)[:, :, None])
        x.addcmul_(self.fc3_offset, gate[:, :, None])

    def _fc3(self, maps: Tensor) -> Tensor:
        """(S, m, h * w) -> (S, m, h * w)."""
        if torch.onnx.is_in_onnx_export():
            columns, kernel = (t.transpose(1, 2).flatten(0, 1) for t in (maps, self.fc3))
            return product_for_onnx(columns, kernel).view(*self.fc3.shape[::2], -1).transpose(1, 2).contiguous()
        return torch.bmm(maps, self.fc3)

    def _add_ffn(self, x: Tensor) -> None:
        if torch.onnx.is_in_onnx_export():
            x.add_(product_for_onnx(torch.ops.aten.gelu_(self.ffn1(x)), self.ffn2))
            return
        plain = x.is_cuda or torch.compiler.is_exporting()  # an exported network must not need this package
        add_ffn = _add_ffn if plain else _add_ffn_in_pieces
        add_ffn(x, self.ffn1.weight, self.ffn1.bias, self.ffn2)


def _add_ffn(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> None:
    """Adds W2 gelu(W1 x + b1) to x (C, n) in place."""
    x.addmm_(weight2, torch.ops.aten.gelu_(torch.addmm(bias1, weight1, x)))


# A custom operator, since the compiler would unroll the loop and call a slower GELU.
@torch.library.custom_op("repmlpnet::add_ffn_in_pieces", mutates_args=("x",))
def _add_ffn_in_pieces(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> None:
    """The same, of a few columns of x at a time, whose hidden elements stay in a CPU's cache."""
    for columns in x.split(FFN_COLUMNS, 1):
        _add_ffn(columns, weight1, bias1, weight2)


@register_flop_formula(torch.ops.repmlpnet.add_ffn_in_pieces)
def _flops_of_ffn(x: torch.Size, weight1: torch.Size, *_: object, **__: object) -> int:
    """Counts the two products for torch's FlopCounterMode, each of two operations per weight and column."""
    return 2 * 2 * weight1.numel() * x[1]


class FusedRepMLPNet(nn.Module):
    """A RepMLPNet without BatchNorm, for inference; made by `fuse_batch_norms`."""

    def __init__(self, model: RepMLPNet) -> None:
        super().__init__()
        self.img_size, self.num_classes, self.global_pool = model.img_size, model.num_classes, model.global_pool
        self.patches = [model.conv_embedding.conv.stride[0]]
        self.patches += [cast(ConvNorm, embed).conv.stride[0] for embed in model.embeds]
        self.embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        order = torch.arange(model.in_chans, device=model.head_norm.weight.device)
        shift = torch.zeros(model.in_chans, dtype=torch.float64, device=order.device)
        for embed, stage in zip([model.conv_embedding, *model.embeds], model.stages, strict=True):
            weight, bias = _fold(cast(ConvNorm, embed), flat=False)
            weight = weight[:, order]
            bias = bias + weight.sum((2, 3)) @ shift
            units = [cast(RepMLPNetUnit, unit) for unit in stage.children()]
            order = _by_share_set(len(bias), units[0].repmlp_block.share_sets).to(order.device)
            shift = torch.zeros_like(bias)
            self.embeds.append(FusedLinear(weight[order].flatten(1), bias[order]))
            self.stages.append(nn.ModuleList(FusedUnit(unit, order, shift) for unit in units))
        scale, offset = (t[order] for t in _affine(model.head_norm))
        if isinstance(model.head, nn.Linear):
            weight, bias = model.head.weight[:, order], cast(Tensor, model.head.bias)
        else:  # the pooled features, in the order of the network
            weight, bias = torch.eye(len(order)).to(scale)[:, order], torch.zeros_like(scale)
        self.head = FusedLinear(weight * scale, bias + weight @ (offset + scale * shift))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> logits (N, num_classes), or pooled features (N, C) of a network without head.

        Those of a network without pooling are (N, num_classes, h, w) and (N, C, h, w).

        Raises:
            ValueError: H or W is no multiple of `img_size`.
        """
        check_input_size(x, self.img_size)
        parts = x.shape[2] // self.img_size[0], x.shape[3] // self.img_size[1]
        size = x.shape[2:]
        x = x.transpose(0, 1)
        for patch, embed, stage in zip(self.patches, self.embeds, self.stages, strict=True):
            size = torch.Size(s // patch for s in size)
            x = embed(_patches(x, patch)).relu_().view(-1, x.shape[1], *size)
            x = _partition(x, parts)
            for unit in cast(nn.ModuleList, stage):
                unit(x, parts[0] * parts[1])
            x = _restore(x, parts, size)
        if self.global_pool:
            x = self.head(x.flatten(2).mean(2))
            return x.t()
        n, h, w = x.shape[1:]
        x = self.head(x.flatten(1))
        return x.view(-1, n, h, w).transpose(0, 1)


Fused = FusedRepMLPNet | FusedRepMLPResNet
FUSED: dict[type[nn.Module], Any] = {RepMLPNet: FusedRepMLPNet, RepMLPResNet: FusedRepMLPResNet}


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def _affine(bn: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Returns the scale and shift (C,) that a BatchNorm applies in inference."""
    return fold_batch_norm(torch.ones_like(cast(Tensor, bn.running_mean)), None, bn)


def _fold(layer: ConvNorm, flat: bool = True) -> tuple[Tensor, Tensor]:
    """Returns weight (O, I, k, k), or (O, I) of a 1x1 convolution, and bias (O,) of a convolution and its BatchNorm."""
    weight, bias = fold_batch_norm(layer.conv.weight, None, layer.bn)
    return weight.flatten(1) if flat else weight, bias


def _by_share_set(channels: int, share_sets: int) -> Tensor:
    """Returns the channels (C,) set by set: those of set s are s, s + S, s + 2 S ..."""
    return torch.arange(channels).reshape(-1, share_sets).t().reshape(-1)


def _patches(x: Tensor, patch: int) -> Tensor:
    """Returns the pixels of each patch in a column: (C, N, H, W) -> (C * patch * patch, N * H/patch * W/patch)."""
    c, n, height, width = x.shape
    x = x.reshape(c, n, height // patch, patch, width // patch, patch)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(c * patch * patch, -1)


def _partition(x: Tensor, parts: tuple[int, int]) -> Tensor:
    """(C, N, H, W) -> (C, N * p * q, H/p * W/q), image by image."""
    c, n, height, width = x.shape
    (p, q), h, w = parts, height // parts[0], width // parts[1]
    return x.view(c, n, p, h, q, w).transpose(3, 4).reshape(c, n * p * q, h * w)


def _restore(x: Tensor, parts: tuple[int, int], size: torch.Size) -> Tensor:
    """Undoes `_partition` towards maps of a given size (H, W)."""
    (p, q), h, w = parts, size[0] // parts[0], size[1] // parts[1]
    return x.view(len(x), -1, p, q, h, w).transpose(3, 4).reshape(len(x), -1, *size)
