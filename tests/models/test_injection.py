"""Locality Injection: the deploy network gives the answers of the training network, exactly."""

from copy import deepcopy

import pytest
import timm.utils
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import largest_difference, random_tensor, randomised, tiny_network
from torch import Tensor, nn

from models import RepMLPBlock, RepMLPNet, RepMLPNetSpec
from models.reparam import is_reparameterizable, to_deploy

EXACT = 1e-12

specs = st.builds(
    lambda stages, share, branches, gate, patch, cells: RepMLPNetSpec(
        channels=tuple(4 * width for width, _ in stages),
        blocks=tuple(blocks for _, blocks in stages),
        share_sets=tuple(share[: len(stages)]),
        image_size=tuple(cell * patch * 2 ** (len(stages) - 1) for cell in cells),
        patch_size=patch,
        branches=branches,
        global_perceptron=gate,
        gp_reduction=2,
        ffn_expansion=2,
    ),
    stages=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2)), min_size=1, max_size=3),
    share=st.lists(st.sampled_from((1, 2, 4)), min_size=3, max_size=3),
    branches=st.sampled_from(((), (1,), (3,), (5,), (1, 3), (1, 3, 5), (3, 7))),
    gate=st.booleans(),
    patch=st.sampled_from((1, 2)),
    cells=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(spec=specs, seed=st.integers(0, 99), scale=st.sampled_from((1, 2)))
def test_networks_of_any_shape(spec: RepMLPNetSpec, seed: int, scale: int) -> None:
    model = tiny_network(3, seed, spec)
    images = random_tensor(2, 3, *(scale * side for side in spec.image_size), seed=seed)
    with torch.no_grad():
        assert largest_difference(model(images), to_deploy(model)(images)) < EXACT


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    share_sets=st.sampled_from((1, 2, 4, 16)),
    branches=st.sampled_from(((), (1,), (5,), (1, 3), (1, 3, 5))),
    seed=st.integers(0, 99),
)
def test_blocks_of_any_shape(h: int, w: int, share_sets: int, branches: tuple[int, ...], seed: int) -> None:
    block = randomised(RepMLPBlock(16, h, w, share_sets=share_sets, branches=branches), seed).eval()
    x = random_tensor(2, 16, 2 * h, w, seed=seed)
    with torch.no_grad():
        expected = block(x)
        block.local_inject()
        assert largest_difference(expected, block(x)) < EXACT


@pytest.mark.parametrize("branches", [(), (1, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_injection_in_place_equals_the_equivalent_kernel(branches: tuple[int, ...], dtype: torch.dtype) -> None:
    block = randomised(RepMLPBlock(8, 5, 4, share_sets=2, branches=branches)).to(dtype)
    weight, bias = block.get_equivalent_fc3()
    block.local_inject()
    tolerance = EXACT if dtype is torch.float64 else 0
    assert largest_difference(weight, block.fc3.weight) <= tolerance
    assert largest_difference(bias, block.fc3.bias) <= tolerance


def test_injection_makes_a_weight_in_channels_last_memory_contiguous() -> None:
    block = randomised(RepMLPBlock(8, 5, 4, share_sets=2)).eval()
    x = random_tensor(2, 8, 5, 4)
    expected = block(x)
    block.fc3.weight.data = block.fc3.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    block.local_inject()
    assert block.fc3.weight.is_contiguous()
    assert largest_difference(expected, block(x)) < EXACT


def test_the_injected_block_has_the_deploy_structure() -> None:
    block = randomised(RepMLPBlock(8, 4, 3, share_sets=2, branches=(1, 3, 5)))
    block.local_inject()
    with torch.device("meta"):
        built = RepMLPBlock(8, 4, 3, share_sets=2, deploy=True)
    assert {k: v.shape for k, v in block.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    assert [name for name, _ in block.named_modules()] == [name for name, _ in built.named_modules()]
    assert block.deploy
    assert block.branches == ()
    assert not is_reparameterizable(block)
    assert all(p.is_contiguous() and p.is_leaf for p in block.parameters())


def test_a_built_deploy_network_takes_the_injected_weights() -> None:
    model = tiny_network()
    images = random_tensor(2, 3, 16, 16)
    deploy = tiny_network(seed=1, deploy=True)
    deploy.load_state_dict(to_deploy(model).state_dict())
    assert largest_difference(model(images), deploy(images)) < EXACT


NAMES = ("locality_injection", "switch_to_deploy", "reparameterize")


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", NAMES)
def test_every_name_of_the_network_injects_and_a_second_call_changes_nothing(first: str, second: str) -> None:
    model = tiny_network()
    images = random_tensor(2, 3, 16, 16)
    expected = to_deploy(model)(images)
    getattr(model, first)()
    assert not is_reparameterizable(model)
    tensors = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    getattr(model, second)()
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == {
        name: pointer for name, (pointer, _) in tensors.items()
    }
    assert all(torch.equal(value, tensors[name][1]) for name, value in model.state_dict().items())
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["local_inject", "switch_to_deploy", "reparameterize"])
def test_every_name_of_the_block_injects_and_a_second_call_changes_nothing(name: str) -> None:
    block = randomised(RepMLPBlock(8, 4, 4, share_sets=2)).eval()
    x = random_tensor(2, 8, 4, 4)
    expected = block(x)
    getattr(block, name)()
    weight = block.fc3.weight
    getattr(block, name)()
    assert block.fc3.weight is weight
    assert largest_difference(expected, block(x)) < EXACT


def test_block_by_block_as_the_published_readme_shows() -> None:
    model = tiny_network()
    images = random_tensor(2, 3, 16, 16)
    expected = model(images)
    for module in model.modules():
        if hasattr(module, "local_inject"):
            module.local_inject()
    assert not is_reparameterizable(model)
    assert largest_difference(expected, model(images)) < EXACT


def test_timm_reparameterizes_a_network() -> None:
    model = tiny_network()
    images = random_tensor(2, 3, 16, 16)
    deploy = timm.utils.reparameterize_model(model)
    assert is_reparameterizable(model)
    assert not is_reparameterizable(deploy)
    assert torch.equal(to_deploy(model)(images), deploy(images))
    assert largest_difference(model(images), deploy(images)) < EXACT


@pytest.mark.parametrize("training", [True, False])
def test_to_deploy_leaves_the_network_alone(training: bool) -> None:
    model = tiny_network().train(training)
    model.stages[0][0].eval()
    flags = [module.training for module in model.modules()]
    tensors = dict(model.state_dict(keep_vars=True))
    values = {name: value.clone() for name, value in tensors.items()}

    deploy = to_deploy(model)

    assert not any(module.training for module in deploy.modules())
    assert [module.training for module in model.modules()] == flags
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[name] is value and torch.equal(value, values[name]) for name, value in tensors.items())
    shared = {t.data_ptr() for t in tensors.values()} & {t.data_ptr() for t in deploy.state_dict().values()}
    assert not shared


@pytest.mark.parametrize("training", [True, False])
def test_injection_in_place_keeps_the_training_flag(training: bool) -> None:
    model = tiny_network().train(training)
    model.locality_injection()
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("trainable", [True, False])
def test_injection_keeps_requires_grad(trainable: bool) -> None:
    model = tiny_network().requires_grad_(trainable)
    model.head.requires_grad_(not trainable)
    model.locality_injection()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (trainable != name.startswith("head.")), name
    if trainable:
        model(random_tensor(2, 3, 16, 16)).square().sum().backward()
        assert all(unit.repmlp_block.fc3.weight.grad.abs().sum() > 0 for stage in model.stages for unit in stage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_injection_rounds_once(dtype: torch.dtype) -> None:
    block = randomised(RepMLPBlock(8, 5, 4, share_sets=4, branches=(1, 3, 5))).to(dtype).eval()
    reference = deepcopy(block).double()
    reference.local_inject()
    block.local_inject()
    for name, exact in reference.fc3.named_parameters():
        fused = block.fc3.get_parameter(name)
        assert fused.dtype == dtype
        assert torch.equal(fused, exact.to(dtype)), name


def test_injection_of_a_bfloat16_network() -> None:
    model = tiny_network().bfloat16()
    images = random_tensor(4, 3, 16, 16).bfloat16()
    deploy = to_deploy(model)
    assert {p.dtype for p in deploy.parameters()} == {torch.bfloat16}
    exact = deepcopy(model).double()(images.double())
    with torch.no_grad():
        assert largest_difference(exact, model(images).double()) < 0.05
        assert largest_difference(exact, deploy(images).double()) < 0.05


def test_the_equivalent_kernel_is_differentiable_down_to_every_branch() -> None:
    block = randomised(RepMLPBlock(8, 3, 4, share_sets=2, branches=(1, 3, 5))).eval()
    block.gp.requires_grad_(False)
    x, upstream = random_tensor(5, 2, 3, 4), random_tensor(5, 2, 3, 4, seed=1)
    inner = [block.fc3_bn, *(block.get_submodule(f"repconv{k}") for k in (1, 3, 5))]
    parameters = [block.fc3.weight, *(p for module in inner for p in module.parameters())]
    assert len(parameters) == 1 + 2 + 3 * 3

    direct = block.fc3_bn(block.fc3(x)) + sum(branch(x) for branch in inner[1:])
    weight, bias = block.get_equivalent_fc3()
    assert (weight.shape, bias.shape) == ((24, 12, 1, 1), (24,))
    fused = nn.functional.conv2d(x.reshape(5, 24, 1, 1), weight, bias, groups=2).view_as(x)
    assert largest_difference(direct, fused) < EXACT

    wanted = torch.autograd.grad(direct, parameters, upstream)
    got = torch.autograd.grad(fused, parameters, upstream)
    for a, b in zip(wanted, got, strict=True):
        assert a.abs().min() > 0
        assert largest_difference(a, b) < EXACT


def test_the_equivalent_kernel_of_a_single_precision_block_has_gradients_of_its_dtype() -> None:
    block = RepMLPBlock(8, 3, 4, share_sets=2)
    weight, bias = block.get_equivalent_fc3()
    (weight.square().sum() + bias.square().sum()).backward()
    fused = {name: p.grad for name, p in block.named_parameters() if not name.startswith("gp.")}
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in fused.values())
    assert block.repconv3.conv.weight.grad.abs().min() > 0


def test_the_equivalent_kernel_of_a_deploy_block_is_its_own() -> None:
    block = RepMLPBlock(8, 3, 4, share_sets=2, deploy=True)
    weight, bias = block.get_equivalent_fc3()
    assert weight is block.fc3.weight
    assert bias is block.fc3.bias


def test_injection_uses_running_statistics_also_in_training_mode() -> None:
    model = tiny_network()
    expected = to_deploy(model).state_dict()
    model.train().locality_injection()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_an_injected_network_still_takes_other_sizes_and_classes() -> None:
    model: RepMLPNet = tiny_network()
    model.locality_injection()
    model.reset_classifier(7)
    output: Tensor = model(random_tensor(1, 3, 32, 48))
    assert output.shape == (1, 7)
    assert output.dtype == torch.float64
