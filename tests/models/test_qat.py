"""Quantization-aware training: blocks compute with f(equivalent kernel), and are converted to exactly that."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import largest_difference, random_tensor, randomised, small_options
from torch import Tensor, nn

from models import RepMLP, RepMLPBlock, add_local_branches, create_model
from models.layers import PartitionBlock
from models.locality import LocalityLinear
from models.qat import FakeQuantize, constrain, release
from models.reparam import injection_error, is_reparameterizable, to_deploy

EXACT = 1e-12
examples = settings(deadline=None, derandomize=True, max_examples=100)
ARCHS = ["RepMLPNet-Digits", "RepMLP-Res50-light-224", "ResMLP-Shapes"]


def repmlpnet_block(deploy: bool = False) -> nn.Module:
    return RepMLPBlock(8, 3, 4, share_sets=2, deploy=deploy)


def repmlp_block(deploy: bool = False) -> nn.Module:
    return RepMLP(8, (6, 8), 3, 4, 2, (1, 3), deploy=deploy)


def inserted_block(deploy: bool = False) -> nn.Module:
    block = RepMLPBlock(8, 3, 4, share_sets=2, deploy=True)
    block.insert_bn()
    return block


def token_mixing_layer(deploy: bool = False) -> nn.Module:
    model = nn.Sequential(nn.Linear(48, 48))
    add_local_branches(model, (6, 8), names=["0"], scale=1.0)
    return model[0]


BLOCKS = [repmlpnet_block, repmlp_block, inserted_block, token_mixing_layer]
every_block = pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)


def maps(block: nn.Module, seed: int = 0) -> Tensor:
    x = random_tensor(2, 8, 6, 8, seed=seed)
    return x.flatten(2) if isinstance(block, LocalityLinear) else x


def equivalent(block: nn.Module) -> tuple[Tensor, Tensor]:
    return block.get_equivalent_linear() if isinstance(block, LocalityLinear) else block.get_equivalent_fc3()


def replaced(block: nn.Module, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Converts a copy, and gives it f(kernel) by hand."""
    copy = deepcopy(block)
    release(copy)
    copy.local_inject()
    layer = copy if isinstance(copy, LocalityLinear) else copy.fc3
    with torch.no_grad():
        layer.weight.copy_(f(layer.weight))
        return copy(x)


# Blocks


@every_block
@pytest.mark.parametrize("training", [False, True])
def test_a_constrained_block_computes_with_the_constrained_equivalent_kernel(make, training: bool) -> None:
    block = randomised(make()).eval()
    x, f = maps(block), lambda kernel: 0.5 * kernel.clamp(-0.2, 0.2)
    plain = block(x)
    assert constrain(block, nn.Identity()) == 1
    assert largest_difference(plain, block(x)) < EXACT
    constrain(block, f)
    actual = block(x)
    assert largest_difference(replaced(block, f, x), actual) < EXACT
    assert largest_difference(plain, actual) > 1e-2
    if training and not isinstance(block, RepMLP):  # whose Global Perceptron has a BatchNorm of its own
        assert torch.equal(block.train()(x), actual), "the statistics are the running ones"
    release(block)
    assert torch.equal(block.eval()(x), plain)


@every_block
def test_the_gradient_reaches_all_that_the_kernel_is_made_of(make) -> None:
    """Compared with finite differences, of the square as f."""
    block = randomised(make()).eval()
    constrain(block, torch.square)
    x, upstream = maps(block), maps(block, seed=1)
    made_of = ("fc3", "repconv", "weight", "bias")
    named = {name: parameter for name, parameter in block.named_parameters() if name.startswith(made_of)}
    (block(x) * upstream).sum().backward()
    step = 1e-6
    for name, parameter in named.items():
        assert parameter.grad is not None, name
        at = int(parameter.grad.abs().argmax())
        with torch.no_grad():
            flat, sums = parameter.view(-1), []
            for sign in (1, -1):
                flat[at] += sign * step
                sums.append(float((block(x) * upstream).sum()))
                flat[at] -= sign * step
        slope = float(parameter.grad.view(-1)[at])
        assert slope != 0, name
        assert slope == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=1e-5), name


@every_block
def test_conversion_leaves_the_very_kernel_that_was_used(make) -> None:
    for dtype in (torch.float32, torch.float64):
        block, quantize = randomised(make()).to(dtype).eval(), FakeQuantize()
        constrain(block, quantize)
        kernel = quantize(equivalent(block)[0])
        x = maps(block).to(dtype)
        expected = block(x)
        assert is_reparameterizable(block)
        block.local_inject()
        assert not is_reparameterizable(block)
        assert block.constraint is None
        deployed = equivalent(block)[0]
        assert torch.equal(kernel, deployed)
        assert torch.equal(quantize(deployed), deployed)
        assert largest_difference(expected, block(x)) < 100 * torch.finfo(dtype).eps


def test_a_deployed_block_can_be_constrained_too() -> None:
    block = randomised(RepMLPBlock(8, 3, 4, share_sets=2, deploy=True)).eval()
    x = maps(block)
    expected = replaced(block, torch.sin, x)
    constrain(block, torch.sin)
    assert largest_difference(expected, block(x)) < EXACT
    block.local_inject()
    assert largest_difference(expected, block(x)) < EXACT


# Networks


def network(arch: str, **options: object) -> nn.Module:
    return randomised(create_model(arch, num_classes=5, **small_options(arch) | options)).eval()


@pytest.mark.parametrize("arch", ARCHS)
def test_names_and_values_stay(arch: str) -> None:
    model = network(arch)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = [m for m in model.modules() if isinstance(m, PartitionBlock | LocalityLinear)]
    assert constrain(model, FakeQuantize()) == len(blocks) > 1
    state = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    other = network(arch)
    constrain(other, FakeQuantize())
    other.load_state_dict(before)
    images = random_tensor(2, 3, *model.img_size)
    assert torch.equal(model(images), other(images))
    assert injection_error(model, images, randomize=True) < EXACT
    release(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in network(arch).named_modules()]


@pytest.mark.parametrize("arch", ARCHS)
def test_training_freezes_the_statistics_that_are_folded_and_no_others(arch: str) -> None:
    model = network(arch)
    constrain(model, FakeQuantize())
    folded = {
        f"{name}.{leaf}"
        for name, block in model.named_modules()
        if isinstance(block, PartitionBlock | LocalityLinear)
        for leaf in block.state_dict()
        if leaf.startswith(("fc3_bn.", "repconv"))
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = F.cross_entropy(model.train()(random_tensor(4, 3, *model.img_size)), torch.arange(4))
    loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert folded & statistics
    assert not changed & folded & statistics
    assert statistics - folded <= changed
    assert folded - statistics <= changed


def test_parameters_of_the_constraint_are_trained_and_saved() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, kernel: Tensor) -> Tensor:
            return kernel * self.factor

    model, f = network("RepMLPNet-Digits"), Scaled()
    constrain(model, f)
    model(random_tensor(2, 3, 16, 16)).sum().backward()
    assert f.factor.grad != 0
    assert sum(parameter is f.factor for parameter in model.parameters()) == 1
    assert "stages.0.0.repmlp_block.constraint.factor" in model.state_dict()


def test_nothing_to_constrain_is_an_error() -> None:
    with pytest.raises(ValueError, match="this Linear has no blocks whose equivalent kernel could be constrained"):
        constrain(nn.Linear(2, 2), FakeQuantize())
    model = network("RepMLPNet-Digits")
    model.stages[0][1].repmlp_block.fc3_bn = nn.LayerNorm([4, 1, 1])
    with pytest.raises(ValueError, match=r"^stages\.0\.1\.repmlp_block: fc3_bn is LayerNorm"):
        constrain(model, FakeQuantize())


# Fake quantization


@examples
@given(
    bits=st.integers(2, 8),
    per_row=st.booleans(),
    rows=st.integers(1, 6),
    columns=st.integers(1, 20),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    seed=st.integers(0, 10**6),
)
def test_fake_quantization_rounds_to_integers_of_the_scale(bits, per_row, rows, columns, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10.0 ** torch.randint(-6, 4, (rows, 1), generator=generator)
    kernel = (torch.randn(rows, columns, 1, 1, generator=generator) * magnitudes[..., None, None]).to(dtype)
    kernel[0] = 0
    quantize = FakeQuantize(bits, per_row)
    kernel.requires_grad_()
    rounded = quantize(kernel)
    integers, scale = quantize.quantize(kernel)
    columns_scale = scale.view(-1, 1, 1, 1).to(dtype)
    assert (rounded.dtype, integers.dtype, scale.shape) == (dtype, torch.int8, (rows,))
    assert torch.equal(integers.double() * columns_scale.double(), rounded.double()), "the product is not rounded"
    assert torch.equal(quantize(rounded), rounded), "again changes nothing"
    assert ((rounded - kernel).abs() <= 0.5001 * columns_scale).all(), "to the nearest"
    assert int(integers.abs().max()) == (2 ** (bits - 1) - 1 if kernel.any() else 0)
    if per_row:
        used = kernel.detach().abs().flatten(1).amax(1) > 0
        assert (integers.abs().flatten(1).amax(1)[used] == quantize.largest).all()
    else:
        assert len(scale.unique()) == 1
    upstream = torch.randn(kernel.shape, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad(rounded, kernel, upstream)
    assert torch.equal(gradient, upstream), "straight through"


@pytest.mark.parametrize("bits", [1, 9])
def test_other_numbers_of_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 8 bits, not {bits}"):
        FakeQuantize(bits)


def test_the_quantizer_shows_its_arguments() -> None:
    assert repr(FakeQuantize(4, per_row=False)) == "FakeQuantize(bits=4, per_row=False)"


def test_the_converted_kernels_are_integers_of_a_scale() -> None:
    model, quantize = network("RepMLPNet-Digits").float(), FakeQuantize()
    constrain(model, quantize)
    deploy = to_deploy(model)
    for block in (m for m in deploy.modules() if isinstance(m, RepMLPBlock)):
        integers, scale = quantize.quantize(block.fc3.weight)
        assert torch.equal(integers * scale.view(-1, 1, 1, 1), block.fc3.weight)
        assert len(integers.unique()) > 50
