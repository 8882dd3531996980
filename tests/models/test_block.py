"""The RepMLP block and its units against the published formulation, written out here partition by partition."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import largest_difference, random_tensor, randomised
from torch import Tensor, nn

from models import FFNBlock, RepMLPBlock, RepMLPNetUnit

EXACT = 1e-12
examples = settings(deadline=None, derandomize=True, max_examples=200)


def normalise(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The formula of BatchNorm, by the batch's own statistics in training."""
    if bn.training:
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, variance = bn.running_mean, bn.running_var
    scale = bn.weight / (variance + bn.eps).sqrt()
    return x * scale[:, None, None] + (bn.bias - mean * scale)[:, None, None]


def published(block: RepMLPBlock, x: Tensor) -> Tensor:
    """The block as published: FC3 is a grouped convolution over (M, S * h * w, 1, 1), for one partition after another.

    The partitions meet in the BatchNorms alone, whose statistics are over all of them.
    """
    (n, c, height, width), (h, w, sets) = x.shape, (block.h, block.w, block.share_sets)
    corners = [(top, left) for top in range(0, height, h) for left in range(0, width, w)]
    parts = [x[:, :, top : top + h, left : left + w] for top, left in corners]
    rows = torch.cat([part.reshape(-1, sets, h, w) for part in parts])

    fc3 = F.conv2d(rows.reshape(-1, sets * h * w, 1, 1), block.fc3.weight, block.fc3.bias, groups=sets)
    local = fc3.reshape(-1, sets, h, w)
    if not block.deploy:
        local = normalise(block.fc3_bn, local)
    for k in block.branches:
        branch = block.get_submodule(f"repconv{k}")
        local = local + normalise(branch.bn, F.conv2d(rows, branch.conv.weight, padding=k // 2, groups=sets))

    out = torch.full_like(x, float("nan"))
    for (top, left), part in zip(corners, local.chunk(len(corners)), strict=True):
        out[:, :, top : top + h, left : left + w] = part.reshape(n, c, h, w)
    pooled = F.adaptive_avg_pool2d(x, 1)
    gate = torch.sigmoid(block.gp.fc2(torch.relu(block.gp.fc1(pooled))))
    return out * gate


shapes = st.fixed_dictionaries(
    {
        "h": st.integers(1, 5),
        "w": st.integers(1, 5),
        "share_sets": st.sampled_from((1, 2, 4, 16)),
        "branches": st.sampled_from(((), (1,), (5,), (1, 3), (1, 3, 5))),
    }
)


@examples
@given(shape=shapes, down=st.integers(1, 3), across=st.integers(1, 3), training=st.booleans(), seed=st.integers(0, 99))
def test_block_equals_the_published_formulation(shape: dict, down: int, across: int, training: bool, seed: int) -> None:
    block = randomised(RepMLPBlock(16, **shape), seed).train(training)
    x = random_tensor(3, 16, down * shape["h"], across * shape["w"], seed=seed).requires_grad_()
    expected, actual = published(block, x), block(x)
    assert largest_difference(expected, actual) < EXACT

    upstream = random_tensor(*x.shape, seed=seed + 1)
    inputs = [x, *block.parameters()]
    wanted = torch.autograd.grad(expected, inputs, upstream)
    got = torch.autograd.grad(actual, inputs, upstream)
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    assert max(float((a - b).abs().max()) for a, b in zip(wanted, got, strict=True)) < 1e-9 * largest


@examples
@given(shape=shapes, down=st.integers(1, 3), across=st.integers(1, 3), seed=st.integers(0, 99))
def test_deploy_block_equals_the_published_formulation(shape: dict, down: int, across: int, seed: int) -> None:
    block = randomised(RepMLPBlock(16, **shape, deploy=True), seed).eval()
    x = random_tensor(2, 16, down * shape["h"], across * shape["w"], seed=seed)
    assert largest_difference(published(block, x), block(x)) < EXACT


def test_partitions_do_not_see_each_other() -> None:
    block = randomised(RepMLPBlock(4, 3, 2, share_sets=2)).eval()
    block.gp = nn.Identity()  # the Global Perceptron alone looks beyond a partition
    block.gp.forward = lambda x: 1.0
    x = random_tensor(1, 4, 6, 6)
    changed = x.clone()
    changed[:, :, 3:, 2:4] += 1
    difference = (block(changed) - block(x)).abs().amax((0, 1))
    inside = torch.zeros(6, 6, dtype=torch.bool)
    inside[3:, 2:4] = True
    assert (difference[inside] > 1e-3).all()
    assert (difference[~inside] == 0).all()


def test_what_a_block_is_unless_it_is_told_otherwise() -> None:
    block = RepMLPBlock(8, 3, 2)
    assert (block.share_sets, block.branches, block.deploy) == (1, (1, 3), False)
    assert block.gp.fc1.out_channels == 2
    assert block.fc3.weight.shape == (6, 6, 1, 1)


def test_channels_of_one_share_set_use_the_same_kernel() -> None:
    block = randomised(RepMLPBlock(6, 3, 3, share_sets=2)).eval()
    x = random_tensor(1, 1, 3, 3).expand(1, 6, 3, 3)
    local = block(x) / block.gp(x)
    assert largest_difference(local[:, :2].repeat(1, 3, 1, 1), local) < EXACT
    assert largest_difference(local[:, 0], local[:, 1]) > 0.1


def test_a_block_refuses_what_it_cannot_share_or_centre() -> None:
    with pytest.raises(ValueError, match="10 channels can't be divided among 4 share-sets"):
        RepMLPBlock(10, 4, 4, share_sets=4)
    with pytest.raises(ValueError, match=r"odd kernel sizes, not \(1, 2\)"):
        RepMLPBlock(8, 4, 4, branches=(1, 2))


def test_a_map_that_partitions_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a 4x7 map can't be divided into 4x3 partitions"):
        RepMLPBlock(8, 4, 3)(torch.zeros(1, 8, 4, 7))


def test_ffn_block_is_a_perceptron_over_channels() -> None:
    ffn = randomised(FFNBlock(4, 12)).eval()
    x = random_tensor(2, 4, 3, 3)
    layers = ffn.ffn_fc1, ffn.ffn_fc2
    hidden = normalise(layers[0].bn, torch.einsum("nchw,dc->ndhw", x, layers[0].conv.weight[:, :, 0, 0]))
    expected = normalise(layers[1].bn, torch.einsum("nchw,dc->ndhw", F.gelu(hidden), layers[1].conv.weight[:, :, 0, 0]))
    assert largest_difference(expected, ffn(x)) < EXACT


def test_unit_adds_both_halves_to_a_shortcut() -> None:
    unit = randomised(RepMLPNetUnit(8, RepMLPBlock(8, 4, 4, share_sets=2), ffn_expansion=3, drop_path=0.5)).eval()
    x = random_tensor(2, 8, 4, 4)
    middle = x + published(unit.repmlp_block, normalise(unit.prebn1, x))
    expected = middle + unit.ffn_block(normalise(unit.prebn2, middle))
    assert largest_difference(expected, unit(x)) < EXACT
    assert unit.ffn_block.ffn_fc1.conv.out_channels == 24
