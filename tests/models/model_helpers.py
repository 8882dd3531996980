"""Small networks with random weights and statistics, drawn here so that they do not rest on the code under test."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models import MobileFaceNetSpec, PureMLPSpec, RepMLPNet, RepMLPNetSpec, RepMLPResNetSpec, ResMLPSpec
from models.build import REGISTRY

# Two stages, of 8x8 and 4x4 maps.
TINY = RepMLPNetSpec((16, 32), (1, 2), (2, 4), 16, patch_size=2, gp_reduction=2)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter and every running statistic of a module anew, in place, and makes it float64."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low) + low)

    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            uniform(parameter, -((3 / fan_in) ** 0.5), (3 / fan_in) ** 0.5)
        for norm in module.modules():
            if isinstance(norm, _BatchNorm):
                uniform(norm.running_mean, -0.5, 0.5)
                uniform(norm.running_var, 0.3, 2.0)
                if norm.affine:
                    uniform(norm.weight, 0.3, 1.5)
                    uniform(norm.bias, -0.5, 0.5)
    return module


def tiny_network(num_classes: int = 5, seed: int = 0, spec: RepMLPNetSpec = TINY, **kwargs: object) -> nn.Module:
    """Returns a small float64 network in evaluation mode, with every parameter and statistic random."""
    return randomised(RepMLPNet(spec, num_classes=num_classes, **kwargs), seed).eval()


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    """Returns standard normal numbers in float64, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest_difference(expected: Tensor, actual: Tensor) -> float:
    """Returns max |actual - expected| / max |expected|, and fails where the shapes differ."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def small_options(arch: str) -> dict[str, Any]:
    """Returns with which options an architecture is small enough for a quick test, and of the same structure."""
    spec = REGISTRY[arch].specs[arch]
    match spec:
        case RepMLPNetSpec():
            return {"img_size": spec.patch_size * 2 ** len(spec.blocks), "blocks": [min(n, 2) for n in spec.blocks]}
        case RepMLPResNetSpec():
            narrow = [c // (8 if max(spec.groups) <= 8 else 4) for c in spec.channels]
            return {"img_size": spec.size_step, "channels": narrow, "blocks": [min(n, 2) for n in spec.blocks]}
        case MobileFaceNetSpec():
            narrow = [c // 8 for c in spec.channels]
            return {"img_size": 32, "stem": 8, "channels": narrow, "blocks": [min(n, 2) for n in spec.blocks]}
        case ResMLPSpec():
            return {"img_size": 3 * spec.patch_size, "width": spec.width // 4, "depth": 2}
        case PureMLPSpec():
            return {"img_size": 16, "channels": [c // 4 for c in spec.channels], "partition": 4}
        case _:
            return {}
