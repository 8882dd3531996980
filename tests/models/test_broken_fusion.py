"""Fusions that are wrong on purpose: the checks that stand before every deploy checkpoint must notice each of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from model_helpers import TINY, random_tensor, tiny_network
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import convert
import models.layers
import models.reparam
from models import RepMLPNet
from models.reparam import fold_batch_norm, injection_error, merge_kernels, tap_diagonals, to_deploy

Fused = tuple[Tensor, Tensor]


def with_fields(bn: _BatchNorm, **changed: object) -> SimpleNamespace:
    """Returns what folding reads of a BatchNorm, some of it changed."""
    names = ("num_features", "running_mean", "running_var", "eps", "weight", "bias")
    return SimpleNamespace(**{name: getattr(bn, name) for name in names} | changed)


def bias_dropped(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    fused, shift = fold_batch_norm(weight, bias, bn)
    return fused, torch.zeros_like(shift)


def bias_sign_flipped(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    fused, shift = fold_batch_norm(weight, bias, bn)
    return fused, -shift


def running_mean_ignored(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    return fold_batch_norm(weight, bias, with_fields(bn, running_mean=torch.zeros_like(bn.running_mean)))


def running_mean_added(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    return fold_batch_norm(weight, bias, with_fields(bn, running_mean=-bn.running_mean))


def running_var_ignored(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    return fold_batch_norm(weight, bias, with_fields(bn, running_var=torch.ones_like(bn.running_var)))


def root_forgotten(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    return fold_batch_norm(weight, bias, with_fields(bn, running_var=bn.running_var.square()))


def eps_forgotten(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    return fold_batch_norm(weight, bias, with_fields(bn, eps=0.0))


def scale_ignored(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    return fold_batch_norm(weight, bias, with_fields(bn, weight=None))


def norm_channels_misordered(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    # Output o takes channel o mod B, as if the outputs of FC3 were (position, set).
    order = torch.arange(len(weight)).view(-1, bn.num_features).t().flatten()
    fused, shift = fold_batch_norm(weight[order], bias, bn)
    return fused[order.argsort()], shift[order.argsort()]


def norm_not_folded(weight: Tensor, bias: Tensor | None, bn: _BatchNorm) -> Fused:
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def kernel_transposed(fc: Tensor, kernel_size: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    taps = list(tap_diagonals(fc, kernel_size, size))
    return [taps[kernel_size[1] * i + j] for j in range(kernel_size[1]) for i in range(kernel_size[0])]


def kernel_flipped(fc: Tensor, kernel_size: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    return list(tap_diagonals(fc, kernel_size, size))[::-1]


def rows_misordered(fc: Tensor, kernel_size: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    # (set, position) as if it were (position, set)
    return list(tap_diagonals(fc.view(fc.shape[1], -1, fc.shape[1]).transpose(0, 1), kernel_size, size))


def taps_too_far_apart(fc: Tensor, kernel_size: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    taps = tap_diagonals(fc, kernel_size, size, dilation=2)
    right = tap_diagonals(fc, kernel_size, size)
    return [t if t.shape == r.shape else r.clone() for t, r in zip(taps, right, strict=True)]


def conv_ignored(fc: Tensor, kernel_size: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    return [tap.clone() for tap in tap_diagonals(fc, kernel_size, size)]


def last_tap_dropped(fc: Tensor, kernel_size: tuple[int, int], size: tuple[int, int]) -> list[Tensor]:
    *taps, last = tap_diagonals(fc, kernel_size, size)
    return [*taps, last.clone()]


def kernel_channels_misordered(kernels: list[Tensor]) -> Tensor:
    return merge_kernels(kernels).flip(0)


def branch_dropped(kernels: list[Tensor]) -> Tensor:
    return merge_kernels([torch.zeros_like(kernels[0]), *kernels[1:]])


def last_branch_dropped(kernels: list[Tensor]) -> Tensor:
    return merge_kernels([*kernels[:-1], torch.zeros_like(kernels[-1])])


def branches_off_centre(kernels: list[Tensor]) -> Tensor:
    merged = merge_kernels(kernels[1:])
    merged[:, :, :1, :1] += kernels[0]
    return merged


def branch_counted_twice(kernels: list[Tensor]) -> Tensor:
    return merge_kernels([*kernels, kernels[0]])


BROKEN: list[tuple[str, Callable]] = [
    ("fold_batch_norm", bias_dropped),
    ("fold_batch_norm", bias_sign_flipped),
    ("fold_batch_norm", running_mean_ignored),
    ("fold_batch_norm", running_mean_added),
    ("fold_batch_norm", running_var_ignored),
    ("fold_batch_norm", root_forgotten),
    ("fold_batch_norm", eps_forgotten),
    ("fold_batch_norm", scale_ignored),
    ("fold_batch_norm", norm_channels_misordered),
    ("fold_batch_norm", norm_not_folded),
    ("tap_diagonals", kernel_transposed),
    ("tap_diagonals", kernel_flipped),
    ("tap_diagonals", rows_misordered),
    ("tap_diagonals", taps_too_far_apart),
    ("tap_diagonals", conv_ignored),
    ("tap_diagonals", last_tap_dropped),
    ("merge_kernels", kernel_channels_misordered),
    ("merge_kernels", branch_dropped),
    ("merge_kernels", last_branch_dropped),
    ("merge_kernels", branches_off_centre),
    ("merge_kernels", branch_counted_twice),
]
# What the identity that a fresh BatchNorm is cannot show.
HIDDEN_WHEN_FRESH = {
    bias_dropped,
    bias_sign_flipped,
    running_mean_ignored,
    running_mean_added,
    running_var_ignored,
    root_forgotten,
    scale_ignored,
    norm_channels_misordered,
}

broken = pytest.mark.parametrize(("function", "replacement"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))


@contextmanager
def breaking(function: str, replacement: Callable) -> Iterator[None]:
    """Replaces a function wherever the injection looks it up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.reparam, function, replacement)
        patch.setattr(models.layers, function, replacement, raising=False)
        yield


@pytest.fixture(scope="module")
def fresh() -> RepMLPNet:
    """A network as it is before its first step."""
    torch.manual_seed(0)
    return RepMLPNet(TINY, num_classes=5).double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return random_tensor(4, 3, *[TINY.image_size] * 2)


def test_the_right_fusion_passes(fresh: RepMLPNet, images: Tensor) -> None:
    assert injection_error(fresh, images, randomize=True) < 1e-13
    assert convert.verify(fresh, to_deploy(fresh), fresh.img_size) < 1e-13


@broken
def test_injection_error_exceeds_the_tolerance(
    function: str, replacement: Callable, fresh: RepMLPNet, images: Tensor
) -> None:
    with breaking(function, replacement):
        assert injection_error(fresh, images, randomize=True) > 100 * convert.ALGEBRA_TOLERANCE


@broken
def test_fresh_statistics_would_hide_some_of_them(
    function: str, replacement: Callable, fresh: RepMLPNet, images: Tensor
) -> None:
    with breaking(function, replacement):
        hidden = injection_error(fresh, images) <= convert.ALGEBRA_TOLERANCE
    assert hidden == (replacement in HIDDEN_WHEN_FRESH)


@broken
def test_convert_refuses(function: str, replacement: Callable, fresh: RepMLPNet) -> None:
    with breaking(function, replacement):
        deploy = to_deploy(fresh)
        with pytest.raises(ValueError, match="the conversion is wrong, and nothing was written"):
            convert.verify(fresh, deploy, fresh.img_size)


def test_convert_compares_the_very_weights_that_it_writes() -> None:
    model = tiny_network()
    for value in (1e-9, float("nan"), float("inf")):
        deploy = to_deploy(model)
        deploy.head.bias.data[0] += value
        with pytest.raises(ValueError, match="are not equivalent to the training weights, and nothing was written"):
            convert.verify(model, deploy, model.img_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_convert_allows_for_the_rounding_of_the_dtype(dtype: torch.dtype) -> None:
    model = tiny_network().to(dtype)
    difference = convert.verify(model, to_deploy(model), model.img_size)
    assert 0 < difference < 100 * torch.finfo(dtype).eps
