"""The kernel algebra against the convolutions, fully-connected layers and BatchNorms that it stands for."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import TINY, largest_difference, random_tensor, randomised
from torch import Tensor, nn

import models.reparam
from models.layers import ShareSetConv, ShareSetFC
from models.reparam import (
    conv_to_fc,
    fold_batch_norm,
    inject_,
    injection_error,
    is_reparameterizable,
    merge_kernels,
    randomize_statistics,
    relative_difference,
    tap_diagonals,
    to_deploy,
)
from models.repmlpnet import RepMLPNet

EXACT = 1e-12
examples = settings(deadline=None, derandomize=True, max_examples=200)

sides = st.integers(1, 6)
odd = st.sampled_from((1, 3, 5, 7))
few = st.integers(1, 3)


def grouped_linear(rows: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """Applies the FC kernel of each group, (out / groups, in / groups) within `kernel`, to its share of the columns."""
    parts = zip(rows.chunk(groups, 1), kernel.chunk(groups, 0), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in parts], 1)


@examples
@given(
    h=sides, w=sides, kh=odd, kw=odd, inputs=few, outputs=few, groups=few, dy=st.integers(1, 3), dx=st.integers(1, 3)
)
def test_conv_to_fc_equals_the_convolution(
    h: int, w: int, kh: int, kw: int, inputs: int, outputs: int, groups: int, dy: int, dx: int
) -> None:
    x = random_tensor(2, groups * inputs, h, w)
    kernel = random_tensor(groups * outputs, inputs, kh, kw, seed=1)
    padding = (dy * (kh // 2), dx * (kw // 2))
    expected = F.conv2d(x, kernel, padding=padding, dilation=(dy, dx), groups=groups)

    for given_padding in (None, padding):
        fc = conv_to_fc(kernel, (h, w), padding=given_padding, dilation=(dy, dx))
        assert fc.shape == (groups * outputs * h * w, inputs * h * w)
        actual = grouped_linear(x.flatten(1), fc, groups).view_as(expected)
        assert largest_difference(expected, actual) < EXACT


@examples
@given(h=sides, w=sides, kh=odd, kw=odd, groups=few, piece=st.integers(1, 400), seed=st.integers(0, 99))
def test_injecting_in_place_scales_and_adds(
    h: int, w: int, kh: int, kw: int, groups: int, piece: int, seed: int
) -> None:
    kernel, fc = random_tensor(2 * groups, 2, kh, kw), random_tensor(2 * groups * h * w, 2 * h * w, seed=seed)
    scale = random_tensor(len(fc), 1, seed=seed + 1)
    expected = fc * scale + conv_to_fc(kernel, (h, w))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.reparam, "PIECE", piece)  # elements at a time: a row or a few
        for dtype, ulps in ((torch.float64, 1), (torch.float32, 1), (torch.bfloat16, 0)):
            low = fc.to(dtype, copy=True)
            exact = low.double() * scale + conv_to_fc(kernel, (h, w))
            inject_(low, scale, kernel, (h, w))
            error = (low.double() - exact.to(dtype).double()).abs()
            assert (error <= ulps * torch.finfo(dtype).eps * exact.abs()).all(), dtype
    inject_(fc, scale, kernel, (h, w))
    assert largest_difference(expected, fc) < EXACT
    inject_(fc, scale, None, (h, w))
    assert largest_difference(expected * scale, fc) < EXACT


@examples
@given(h=sides, w=sides, kh=odd, kw=odd)
def test_no_element_of_an_fc_kernel_belongs_to_two_taps(h: int, w: int, kh: int, kw: int) -> None:
    fc = torch.zeros(2 * h * w, 3 * h * w)
    for diagonal in tap_diagonals(fc, (kh, kw), (h, w)):
        diagonal.add_(1)
    assert fc.max() == 1


def test_conv_to_fc_of_a_small_kernel_by_hand() -> None:
    kernel = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    expected = torch.tensor([[2.0, 3.0, 0.0], [1.0, 2.0, 3.0], [0.0, 1.0, 2.0]])
    assert torch.equal(conv_to_fc(kernel, (1, 3)), expected)
    assert torch.equal(conv_to_fc(kernel.transpose(2, 3), (3, 1)), expected)


@examples
@given(h=sides, w=sides, kh=odd, kw=odd, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_conv_to_fc_is_linear(h: int, w: int, kh: int, kw: int, a: float, b: float) -> None:
    first, second = random_tensor(3, 2, kh, kw), random_tensor(3, 2, kh, kw, seed=1)
    expected = a * conv_to_fc(first, (h, w)) + b * conv_to_fc(second, (h, w))
    torch.testing.assert_close(conv_to_fc(a * first + b * second, (h, w)), expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_algebra_stays_in_the_dtype_of_the_kernel_and_leaves_it_alone(dtype: torch.dtype) -> None:
    kernel = random_tensor(4, 1, 3, 3).to(dtype)
    before = kernel.clone()
    bn = nn.BatchNorm2d(4)
    randomize_statistics(bn)
    statistics = {k: v.clone() for k, v in bn.state_dict().items()}

    weight, bias = fold_batch_norm(kernel, None, bn)
    assert (conv_to_fc(kernel, (4, 4)).dtype, merge_kernels([kernel]).dtype) == (dtype, dtype)
    assert (weight.dtype, bias.dtype) == (dtype, dtype)
    assert torch.equal(kernel, before)
    assert all(torch.equal(v, statistics[k]) for k, v in bn.state_dict().items())


@pytest.mark.parametrize("size", [(2, 3), (3, 2), (4, 4)])
def test_even_kernels_have_no_centre(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"even kernel \({size[0]}, {size[1]}\)"):
        conv_to_fc(torch.ones(1, 1, *size), (5, 5))


@pytest.mark.parametrize(("padding", "dilation"), [(0, 1), (2, 1), ((1, 0), 1), (1, 2)])
def test_a_padding_that_changes_the_size_is_refused(padding: int | tuple[int, int], dilation: int) -> None:
    with pytest.raises(ValueError, match="changes the size of the map"):
        conv_to_fc(torch.ones(1, 1, 3, 3), (5, 5), padding=padding, dilation=dilation)


def batch_norm(channels: int, affine: bool, seed: int) -> nn.BatchNorm2d:
    return randomised(nn.BatchNorm2d(channels, eps=1e-3, affine=affine), seed).eval()


@examples
@given(groups=few, inputs=few, outputs=few, k=odd, bias=st.booleans(), affine=st.booleans(), seed=st.integers(0, 99))
def test_folding_into_a_convolution(
    groups: int, inputs: int, outputs: int, k: int, bias: bool, affine: bool, seed: int
) -> None:
    conv = randomised(nn.Conv2d(groups * inputs, groups * outputs, k, padding=k // 2, groups=groups, bias=bias), seed)
    bn = batch_norm(groups * outputs, affine, seed + 1)
    x = random_tensor(2, groups * inputs, 4, 5, seed=seed)

    weight, shift = fold_batch_norm(conv.weight, conv.bias, bn)

    assert shift.shape == (groups * outputs,)
    actual = F.conv2d(x, weight, shift, padding=k // 2, groups=groups)
    assert largest_difference(bn(conv(x)), actual) < EXACT


@examples
@given(inputs=few, outputs=st.integers(1, 6), bias=st.booleans(), affine=st.booleans(), seed=st.integers(0, 99))
def test_folding_into_a_linear_layer(inputs: int, outputs: int, bias: bool, affine: bool, seed: int) -> None:
    linear = randomised(nn.Linear(inputs, outputs, bias=bias), seed)
    bn = randomised(nn.BatchNorm1d(outputs, affine=affine), seed + 1).eval()
    x = random_tensor(4, inputs, seed=seed)
    actual = F.linear(x, *fold_batch_norm(linear.weight, linear.bias, bn))
    assert largest_difference(bn(linear(x)), actual) < EXACT


@examples
@given(sets=st.integers(1, 5), h=few, w=few, bias=st.booleans(), affine=st.booleans(), seed=st.integers(0, 99))
def test_folding_into_a_share_set_fc(sets: int, h: int, w: int, bias: bool, affine: bool, seed: int) -> None:
    fc = randomised(nn.Conv2d(sets * h * w, sets * h * w, 1, groups=sets, bias=bias), seed)
    bn = batch_norm(sets, affine, seed + 1)  # one channel for the h * w outputs of a set
    x = random_tensor(3, sets * h * w, 1, 1, seed=seed)
    expected = bn(fc(x).view(3, sets, h, w)).view(3, -1, 1, 1)

    weight, shift = fold_batch_norm(fc.weight, fc.bias, bn)

    assert largest_difference(expected, F.conv2d(x, weight, shift, groups=sets)) < EXACT


def test_a_batch_norm_that_does_not_divide_the_outputs_is_refused() -> None:
    with pytest.raises(ValueError, match="of 3 channels can't be folded into a layer of 4 outputs"):
        fold_batch_norm(torch.ones(4, 1), None, nn.BatchNorm1d(3))


def test_a_batch_norm_without_running_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="without running statistics"):
        fold_batch_norm(torch.ones(4, 1), None, nn.BatchNorm1d(4, track_running_stats=False))


@examples
@given(
    sizes=st.lists(st.tuples(odd, odd), min_size=1, max_size=4), groups=few, h=sides, w=sides, seed=st.integers(0, 99)
)
def test_merged_kernels_equal_the_sum_of_the_convolutions(
    sizes: list[tuple[int, int]], groups: int, h: int, w: int, seed: int
) -> None:
    x = random_tensor(2, 2 * groups, h, w, seed=seed)
    kernels = [random_tensor(3 * groups, 2, *size, seed=seed + i) for i, size in enumerate(sizes)]
    expected = sum(
        F.conv2d(x, k, padding=(size[0] // 2, size[1] // 2), groups=groups)
        for k, size in zip(kernels, sizes, strict=True)
    )

    merged = merge_kernels(kernels)

    height, width = (max(side) for side in zip(*sizes, strict=True))
    assert merged.shape == (3 * groups, 2, height, width)
    actual = F.conv2d(x, merged, padding=(height // 2, width // 2), groups=groups)
    assert largest_difference(expected, actual) < EXACT


def test_gradients_of_the_algebra() -> None:
    def fold(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        bn = batch_norm(2, affine=True, seed=3)
        del bn.weight, bn.bias
        bn.weight, bn.bias = scale, shift
        return fold_batch_norm(weight, bias, bn)

    tensors = [random_tensor(*shape, seed=i).requires_grad_() for i, shape in enumerate([(4, 3), (4,), (2,), (2,)])]
    assert torch.autograd.gradcheck(fold, tensors)
    kernel, other = (random_tensor(2, 2, *size).requires_grad_() for size in ((3, 5), (1, 3)))
    assert torch.autograd.gradcheck(lambda k: conv_to_fc(k, (3, 2), dilation=(1, 2)), kernel)
    assert torch.autograd.gradcheck(lambda *k: merge_kernels(k), (kernel, other))


@examples
@given(rows=st.integers(1, 4), sets=st.integers(1, 6), h=sides, w=sides, bias=st.booleans(), seed=st.integers(0, 99))
def test_share_set_fc_equals_the_published_grouped_convolution(
    rows: int, sets: int, h: int, w: int, bias: bool, seed: int
) -> None:
    fc = randomised(ShareSetFC(sets, h, w, bias=bias), seed)
    x = random_tensor(rows, sets, h, w, seed=seed).requires_grad_()
    upstream = random_tensor(rows, sets, h, w, seed=seed + 1)
    inputs = [x, *fc.parameters()]

    actual = fc(x)
    expected = F.conv2d(x.reshape(rows, -1, 1, 1), fc.weight, fc.bias, groups=sets).reshape(rows, sets, h, w)

    assert largest_difference(expected, actual) < EXACT
    pairs = zip(torch.autograd.grad(expected, inputs, upstream), torch.autograd.grad(actual, inputs, upstream))  # noqa: B905
    assert all(largest_difference(wanted, got) < EXACT for wanted, got in pairs)


def test_share_set_fc_has_first_and_second_derivatives() -> None:
    fc = randomised(ShareSetFC(2, 2, 1, bias=False))
    x = random_tensor(3, 2, 2, 1).requires_grad_()

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(fc, {"weight": weight}, (x,))

    inputs = (x, fc.weight)
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_share_set_fc_under_autocast_computes_low_and_learns_high(bias: bool, input_dtype: torch.dtype) -> None:
    exact = randomised(ShareSetFC(4, 3, 5, bias=bias))
    x, upstream = random_tensor(6, 4, 3, 5).to(input_dtype), random_tensor(6, 4, 3, 5, seed=1)
    low = ShareSetFC(4, 3, 5, bias=bias)
    low.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        actual = low(x.requires_grad_())
    expected = exact(x.detach().double())
    assert actual.dtype == torch.bfloat16
    assert 1e-6 < largest_difference(expected, actual.double()) < 0.02

    wanted = torch.autograd.grad(expected, list(exact.parameters()), upstream)
    got = torch.autograd.grad(actual, [x, *low.parameters()], upstream.bfloat16())
    assert [gradient.dtype for gradient in got] == [input_dtype] + [torch.float32] * (1 + bias)
    assert all(largest_difference(a, b.double()) < 0.03 for a, b in zip(wanted, got[1:], strict=True))


@pytest.mark.parametrize("sets", [1, 3, 16, 20])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("h", "w"), [(4, 4), (2, 5)])
def test_share_set_conv_equals_the_grouped_convolution(sets: int, kernel_size: int, h: int, w: int) -> None:
    conv = randomised(ShareSetConv(sets, kernel_size))
    x = random_tensor(2, 3 * sets, h, w).requires_grad_()
    upstream = random_tensor(6, sets, h, w, seed=1)
    inputs = [x, conv.weight]

    actual = conv(x)
    expected = F.conv2d(x.reshape(-1, sets, h, w), conv.weight, padding=kernel_size // 2, groups=sets)

    assert largest_difference(expected, actual) < EXACT
    pairs = zip(torch.autograd.grad(expected, inputs, upstream), torch.autograd.grad(actual, inputs, upstream))  # noqa: B905
    assert all(largest_difference(wanted, got) < EXACT for wanted, got in pairs)


def test_relative_difference() -> None:
    expected = torch.tensor([[2.0, -4.0]])
    assert relative_difference(expected, expected) == 0
    assert relative_difference(expected, torch.tensor([[3.0, -4.0]])) == 0.25
    for bad in (float("nan"), float("inf")):
        assert relative_difference(expected, torch.tensor([[bad, -4.0]])) == float("inf")
        assert relative_difference(torch.tensor([[bad, -4.0]]), expected) == float("inf")


def test_randomized_statistics_are_far_from_fresh_ones_and_the_same_each_time() -> None:
    first, second = (
        nn.ModuleList([nn.BatchNorm2d(5), nn.BatchNorm1d(5, affine=False)]),
        nn.ModuleList([nn.BatchNorm2d(5), nn.BatchNorm1d(5, affine=False)]),
    )
    randomize_statistics(first)
    randomize_statistics(second, seed=0)
    fresh = nn.BatchNorm2d(5).state_dict()
    state = first.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in second.state_dict().items())
    for name in ("0.weight", "0.bias", "0.running_mean", "0.running_var", "1.running_mean", "1.running_var"):
        assert (state[name] - fresh[name[2:]]).abs().max() > 0.1, name
        assert state[name].unique().numel() == 5, name
    randomize_statistics(second, seed=1)
    assert not torch.equal(second[0].weight, first[0].weight)


def test_a_network_without_blocks_is_not_re_parameterised() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert not is_reparameterizable(plain)
    with pytest.raises(ValueError, match="this Sequential has no blocks with local branches"):
        to_deploy(plain)
    deploy = RepMLPNet(TINY, deploy=True)
    assert not is_reparameterizable(deploy)
    with pytest.raises(ValueError, match="this RepMLPNet has no blocks with local branches, or they are injected"):
        to_deploy(deploy)


def test_injection_error_measures_a_copy() -> None:
    model = RepMLPNet(TINY, num_classes=5).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert injection_error(model, random_tensor(2, 3, 16, 16), randomize=True) < EXACT
    assert model.training
    assert is_reparameterizable(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_equal_zeros_do_not_differ() -> None:
    zeros = torch.zeros(2, 3)
    assert relative_difference(zeros, zeros) == 0
    assert relative_difference(zeros, zeros + 1e-9) == float("inf")
    assert relative_difference(zeros, torch.full((2, 3), float("nan"))) == float("inf")
