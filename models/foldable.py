"""Layers with a BatchNorm that conversion folds into them."""

from typing import cast

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from .layers import ConvNorm, describe_module, is_batch_norm
from .reparam import Reparameterizable, fold_batch_norm


class FoldableConvNorm(ConvNorm, Reparameterizable):
    """A convolution and a BatchNorm, which conversion folds into it.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: the same for height and width, or (kh, kw).
        stride: of the convolution.
        act: activation after the BatchNorm; None for none.
        deploy: build the structure that `local_inject` leaves.
        dilation: of the convolution.
        groups: of the convolution.
        padding: zeros on each side; None for as many as keep the size of the map at stride 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        act: nn.Module | None = None,
        deploy: bool = False,
        dilation: int = 1,
        groups: int = 1,
        padding: int | None = None,
    ) -> None:
        height, width = to_2tuple(kernel_size)
        zeros = (dilation * (height // 2), dilation * (width // 2)) if padding is None else padding
        conv = nn.Conv2d(
            in_channels, out_channels, (height, width), stride, zeros, dilation, groups=groups, bias=deploy
        )
        super().__init__(conv, act)
        self.deploy = deploy
        if deploy:
            del self.bn

    def check_structure(self) -> None:
        """Raises ValueError where another layer than the convolution, its BatchNorm and the activation stands here."""
        for name, layer in self.named_children():
            if name not in ("conv", "act") and (self.deploy or name != "bn"):
                raise ValueError(f"{name} is {describe_module(layer)}: nothing of that name belongs there")
        if not self.deploy and not is_batch_norm(self.bn, self.conv.out_channels):
            raise ValueError(
                f"bn is {describe_module(self.bn)}: a BatchNorm of {self.conv.out_channels} channels belongs there"
            )

    @torch.no_grad()
    def local_inject(self) -> None:
        """Folds the BatchNorm into the convolution, in place; does nothing where that is already done.

        Raises:
            ValueError: another layer stands here.
        """
        self.check_structure()
        if self.deploy:
            return
        conv = self.conv
        weight, bias = fold_batch_norm(conv.weight.double(), conv.bias, self.bn)
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
