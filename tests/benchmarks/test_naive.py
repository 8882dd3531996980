"""The baseline: the published formulation gives the same results as the library, and is none of its code."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from benchmarks.naive import NaiveBlock, inject, naive, naive_injection
from models.reparam import randomize_statistics, relative_difference, to_deploy

ARCH = "RepMLPNet-Digits"
EXACT = 1e-12


@pytest.fixture
def model() -> models.RepMLPNet:
    torch.manual_seed(0)
    network = models.create_model(ARCH, num_classes=10).double().eval()
    randomize_statistics(network)
    return network


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_training_structure_is_equal(model, images) -> None:
    copy = naive(model)
    assert relative_difference(model(images).detach(), copy(images).detach()) < EXACT
    assert {k: v.shape for k, v in copy.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_deploy_structure_is_equal(model, images) -> None:
    deploy = to_deploy(model)
    copy = naive(deploy)
    assert relative_difference(model(images).detach(), copy(images).detach()) < EXACT
    assert all(p.is_contiguous() for p in copy.parameters())


def test_partitions_are_equal(model) -> None:
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    assert relative_difference(model(images).detach(), naive(model)(images).detach()) < EXACT


def test_training_is_equal(model, images) -> None:
    copy = naive(model).train()
    model.train()
    for network in (model, copy):
        network(images).square().sum().backward()
    ours = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-9, atol=1e-12)
    buffers = dict(model.named_buffers())
    for name, buffer in copy.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)


def test_it_is_a_copy(model, images) -> None:
    before = model(images)
    copy = naive(model)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_everything_is_a_convolution_but_the_head(model, images) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        naive(model)(images)
    operators = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert operators == {"aten.convolution", "aten.addmm"}
    assert counter.get_flop_counts()["Global"][torch.ops.aten.addmm] == 2 * 3 * model.num_features * 10


@pytest.mark.parametrize("branches", [(1, 3), (3,), (1, 3, 5), ()])
def test_injection_is_equal(branches) -> None:
    torch.manual_seed(0)
    block = models.RepMLPBlock(8, 5, 4, share_sets=4, branches=branches).double().eval()
    randomize_statistics(block)
    weight, bias = naive_injection(block)
    expected_weight, expected_bias = block.get_equivalent_fc3()
    torch.testing.assert_close(weight, expected_weight.detach())
    torch.testing.assert_close(bias, expected_bias.detach())


def test_injecting_a_network(model, images) -> None:
    copy = naive(model)
    inject(copy)
    assert relative_difference(model(images).detach(), copy(images).detach()) < EXACT
    blocks = [m for m in copy.modules() if isinstance(m, NaiveBlock)]
    assert all(block.deploy and isinstance(block.fc3_bn, nn.Identity) for block in blocks)
    model.locality_injection()
    assert copy.state_dict().keys() == model.state_dict().keys()
