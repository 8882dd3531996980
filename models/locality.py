"""Locality Injection for any network that mixes tokens by one linear layer: ResMLP, gMLP, or a user's own.

A branch is a convolution over the map of tokens, with a BatchNorm, parallel to the layer; all channels share its one
kernel (one share-set). The layer has no BatchNorm of its own, so that injection adds to it and scales nothing.

Only a linear layer from the h * w positions of a map to the same positions can take branches. The token MLP of an
MLP-Mixer can't: a convolution parallel to all of it can't be merged through the nonlinearity, and neither of its two
layers maps positions to positions, since hidden units have no place on the map.

Source: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022 (arXiv:2112.11081).
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models.mlp_mixer import MixerBlock, ResBlock, SpatialGatingUnit
from torch import Tensor, nn

from .layers import (
    ConvNorm,
    ShareSetConv,
    check_kernel_sizes,
    check_layers,
    check_own_weight,
    fold_branches,
    local_branches,
)
from .reparam import Reparameterizable, conv_to_fc, inject_

# The modules of timm that mix tokens, and the attribute that does it.
TOKEN_MIXING = {ResBlock: "linear_tokens", SpatialGatingUnit: "proj", MixerBlock: "mlp_tokens"}


class LocalityLinear(nn.Linear, Reparameterizable):
    """A linear layer over the positions of a map, with local branches beside it.

    Weight and bias are those of the layer that it replaces, of the same names; `local_inject` leaves nothing else.

    Args:
        linear: from h * w positions to as many, with a bias, which takes the branches' shift. Its parameters are used.
        size: (h, w) of the map, whose positions are counted row by row.
        branches: odd kernel sizes, at least one.
        scale: initial, of the branches' BatchNorms; with 0 the branches do not change the output at first.

    Attributes:
        constraint: applied to the equivalent weight in the forward pass; None for none. `qat.constrain` sets
            it.

    Raises:
        ValueError: another kind of layer, or of branches.
    """

    def __init__(
        self, linear: nn.Linear, size: int | tuple[int, int], branches: Sequence[int] = (1, 3), scale: float = 0.0
    ) -> None:
        h, w = to_2tuple(size)
        mergeable = (
            f"local branches merge only into an nn.Linear from the {h * w} positions of a {h}x{w} map to the same"
        )
        if type(linear) is not nn.Linear:
            raise ValueError(f"{mergeable}, not into a {type(linear).__name__}")
        if not linear.in_features == linear.out_features == h * w:
            raise ValueError(f"{mergeable}, not into one from {linear.in_features} to {linear.out_features} features")
        if linear.bias is None:
            raise ValueError("the shift of local branches merges only into a bias: build the layer with bias=True")
        if not branches:
            raise ValueError("local branches need at least one kernel size")
        check_kernel_sizes(branches)
        super().__init__(h * w, h * w, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.size, self.branches = (h, w), tuple(branches)
        self.constraint: Callable[[Tensor], Tensor] | None = None
        for k in self.branches:
            branch = ConvNorm(ShareSetConv(1, k))
            nn.init.constant_(branch.bn.weight, scale)
            self.add_module(f"repconv{k}", branch.to(linear.weight))
        self.train(linear.training)

    @property
    def deploy(self) -> bool:  # type: ignore[override]  # follows from the layers, so that none of them is overlooked
        """Whether nothing is left to inject: there are no branches and there is no constraint."""
        return not self.branches and self.constraint is None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, h * w) -> (..., C, h * w)."""
        if self.constraint is not None:
            weight, bias = self.get_equivalent_linear()
            return F.linear(x, self.constraint(weight), bias)
        out = super().forward(x)
        maps = x.reshape(-1, x.shape[-2], *self.size)
        for branch in local_branches(self, self.branches):
            out = out + branch(maps).reshape(x.shape)
        return out

    def check_structure(self) -> None:
        """Raises ValueError where something stands in the layer that Locality Injection would not count."""
        check_own_weight("the layer", self)
        check_layers(self, self.branches, {"constraint"})

    def get_equivalent_linear(self) -> tuple[Tensor, Tensor]:
        """Returns the weight (h * w, h * w) and bias (h * w,) of the linear layer that equals this one.

        Fused in float64 and cast back to the parameter's dtype; differentiable, for quantization-aware training. A
        `constraint` is not applied.

        Raises:
            ValueError: something else stands in the layer, see `check_structure`.
        """
        self.check_structure()
        if not self.branches:
            return self.weight, self.bias
        kernel, shift = fold_branches(local_branches(self, self.branches))
        weight = self.weight.double() + conv_to_fc(kernel, self.size)
        return weight.to(self.weight.dtype), (self.bias.double() + shift).to(self.bias.dtype)

    @torch.no_grad()
    def local_inject(self) -> None:
        """Locality Injection, in place; does nothing where it is already done.

        A constraint is applied to the weight, and removed.

        Raises:
            ValueError: something else stands in the layer, see `check_structure`.
        """
        self.check_structure()
        if self.deploy:
            return
        if self.constraint is not None:  # by the very computation of the forward pass, since rounding may follow
            weight, bias = self.get_equivalent_linear()
            self.weight.data = self.constraint(weight).contiguous()
        else:
            kernel, shift = fold_branches(local_branches(self, self.branches))
            self.weight.data = self.weight.contiguous()
            inject_(self.weight, shift.new_ones(len(self.weight), 1), kernel, self.size)
            bias = self.bias.double() + shift
        self.bias.copy_(bias)
        for k in self.branches:
            delattr(self, f"repconv{k}")
        self.branches, self.constraint = (), None


def add_local_branches(
    model: nn.Module,
    size: int | tuple[int, int],
    branches: Sequence[int] = (1, 3),
    names: Sequence[str] | None = None,
    scale: float = 0.0,
) -> list[str]:
    """Puts local branches beside the layers of a network that mix tokens, in place.

    Weights keep their names, and those of the branches are added; `to_deploy` leaves the former alone.

    Args:
        model: the network.
        size: (h, w) of its maps of tokens.
        branches: odd kernel sizes.
        names: patterns of the layers' names, as `blocks.*.token_fc`; None finds those of timm's ResMLP and gMLP.
        scale: initial, of the branches' BatchNorms. With 0 the output of a trained network does not change at first;
            training from scratch works better with 1.

    Returns:
        The names of the layers.

    Raises:
        ValueError: there are no such layers, or one is no nn.Linear from h * w positions to as many, with a bias.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = _token_mixing(modules) if names is None else _named(modules, names)
    layers: dict[nn.Module, LocalityLinear] = {}  # one for each, though the network may hold it under several names
    for name in found:
        linear = cast(nn.Linear, modules[name])
        try:
            layers[linear] = layers.get(linear) or LocalityLinear(linear, size, branches, scale)
        except ValueError as error:
            raise ValueError(f"{name} of {type(model).__name__} can't take local branches: {error}") from error
    for name in found:
        model.set_submodule(name, layers[modules[name]])
    return found


def branch_names(model: nn.Module) -> list[str]:
    """Returns the names that the branches of `LocalityLinear` layers have in a network's state dict."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LocalityLinear)}
    return [
        f"{name}.{leaf}" for name, layer in layers.items() for leaf in layer.state_dict() if leaf.startswith("repconv")
    ]


def _named(modules: dict[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"no layer of the network is named {pattern!r}")
    return [name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _token_mixing(modules: dict[str, nn.Module]) -> list[str]:
    """Returns the names of what mixes tokens in timm's networks."""
    found = [
        f"{name}.{leaf}".lstrip(".")
        for name, module in modules.items()
        for kind, leaf in TOKEN_MIXING.items()
        if isinstance(module, kind)
    ]
    if not found:
        raise ValueError("no layer is known to mix tokens, as those of timm's ResMLP and gMLP are: give `names`")
    return found
