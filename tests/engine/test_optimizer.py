"""Which parameters decay, which options arrive, and one update against torch's plain implementation."""

from copy import deepcopy

import pytest
import torch
from timm.optim import Lamb
from torch import nn
from training_parts import optimizer_of

from configs.constraints import CONSTRAINTS
from engine.optimizer import OPTIMIZERS, match_layout, parameter_groups

LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Exempting(nn.Module):
    """A network that names a matrix which shall not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(2, 3))
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

    def no_weight_decay(self) -> set[str]:
        return {"position"}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)).double()


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def test_biases_norms_and_exempt_names_do_not_decay():
    model = Exempting()
    decaying, plain = parameter_groups(model, weight_decay=0.3)
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in decaying["params"]] == [id(model.linear.weight)]
    expected = [model.position, model.linear.bias, model.norm.weight, model.norm.bias]
    assert [id(p) for p in plain["params"]] == [id(p) for p in expected]


def test_the_order_within_a_group_is_that_of_the_network():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    decaying, plain = parameter_groups(model, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in decaying["params"]] == ["0.weight", "2.weight"]
    assert [names[id(p)] for p in plain["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]


def test_a_bias_of_several_dimensions_does_not_decay():
    model = nn.Module()
    model.bias_holder = nn.Module()
    model.bias_holder.bias = nn.Parameter(torch.ones(3, 1, 1))
    decaying, plain = parameter_groups(model, weight_decay=0.3)
    assert (len(decaying["params"]), len(plain["params"])) == (0, 1)


def test_the_options_of_adamw():
    optimizer = optimizer_of(network(), name="adamw", lr=0.02, weight_decay=0.3, betas=[0.7, 0.8], eps=1e-5)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.7, 0.8), 1e-5)
        assert (group["weight_decay"], group["amsgrad"]) == (decay, False)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_options_of_sgd(momentum):
    optimizer = optimizer_of(network(), name="sgd", lr=0.02, weight_decay=0.3, momentum=momentum)
    assert isinstance(optimizer, torch.optim.SGD)
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.02, momentum, decay)
        assert (group["nesterov"], group["dampening"]) == (momentum > 0, 0)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("adamw", lambda groups: torch.optim.AdamW(groups, lr=0.02, betas=(0.7, 0.8), eps=1e-5, foreach=False)),
        ("lamb", lambda groups: Lamb(groups, lr=0.02, betas=(0.7, 0.8), eps=1e-5, max_grad_norm=None, foreach=False)),
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.6, nesterov=True, foreach=False)),
    ],
)
def test_updates_equal_those_of_the_library_unfused(name, plain):
    ours = network()
    theirs = deepcopy(ours)
    optimizer = optimizer_of(ours, name=name, lr=0.02, weight_decay=0.3, momentum=0.6, betas=(0.7, 0.8), eps=1e-5)
    reference = plain(parameter_groups(theirs, weight_decay=0.3))
    start = [p.clone() for p in ours.parameters()]
    for step in range(3):
        gradients(ours, step)
        gradients(theirs, step)
        optimizer.step()
        reference.step()
    for own, other, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)
        assert not torch.equal(own, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_take_the_layout_of_their_parameters(name):
    kernel = torch.randn(4, 3, 3, 3)
    parameters = {layout: nn.Parameter(kernel.clone(memory_format=layout)) for layout in LAYOUTS}
    holders = {layout: nn.ParameterDict({"kernel": p, "bias": torch.zeros(3)}) for layout, p in parameters.items()}
    ours, theirs = (optimizer_of(holders[layout], name=name, lr=0.1, weight_decay=0.1) for layout in LAYOUTS)
    gradients(holders[LAYOUTS[0]], 1)
    ours.step()
    theirs.load_state_dict(deepcopy(ours.state_dict()))
    match_layout(theirs)
    for parameter, moments in theirs.state.items():
        assert all(moment.stride() == parameter.stride() for key, moment in moments.items() if key != "step")
    before = ours.state_dict()["state"]
    torch.testing.assert_close(theirs.state_dict()["state"], before, rtol=0, atol=0)


def test_adamw_by_hand():
    model = nn.Linear(1, 1, bias=False).double()
    model.weight.data.fill_(2.0)
    optimizer = optimizer_of(model, name="adamw", lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-8)
    model.weight.grad = torch.full((1, 1), 3.0, dtype=torch.float64)
    optimizer.step()
    # The first step has the size of the learning rate for any gradient; weight decay is decoupled.
    assert model.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, rel=1e-8)


def test_lamb_by_hand():
    model = nn.Linear(1, 2).double()
    model.weight.data.copy_(torch.tensor([[3.0], [-4.0]]))
    model.bias.data.fill_(2.0)
    optimizer = optimizer_of(model, name="lamb", lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-12)
    model.weight.grad = torch.full((2, 1), 7.0, dtype=torch.float64)
    model.bias.grad = torch.tensor([7.0, -7.0], dtype=torch.float64)
    optimizer.step()
    # A first step of Adam is 1 with the sign of the gradient. With the decay, that of the kernel is (2.5, -1); it is
    # made as long as the kernel, 5. That of the bias is neither decayed nor scaled.
    share = 0.1 * 5 / (2.5**2 + 1) ** 0.5
    assert model.weight.flatten().tolist() == pytest.approx([3 - 2.5 * share, -4 + share], rel=1e-10)
    assert model.bias.tolist() == pytest.approx([1.9, 2.1], rel=1e-10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_lamb_moves_a_kernel_of_zeros():
    model = nn.Linear(2, 2, bias=False)
    model.weight.data.zero_()
    optimizer = optimizer_of(model, name="lamb", lr=0.1, weight_decay=0.5)
    model.weight.grad = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    optimizer.step()
    torch.testing.assert_close(model.weight.data, torch.tensor([[-0.1, 0.1], [0.0, -0.1]]))


def test_the_schema_allows_all_optimizers_and_no_others():
    assert [*OPTIMIZERS] == ["adamw", "lamb", "sgd"]
    assert CONSTRAINTS["TRAIN.OPTIMIZER.NAME"].allowed == f"one of {', '.join(OPTIMIZERS)}"


def test_parameters_of_the_loss_follow_those_of_the_network():
    model, criterion = Exempting(), nn.Linear(2, 2)
    optimizer = optimizer_of(model, weight_decay=0.3, criterion=criterion)
    decaying, plain = (group["params"] for group in optimizer.param_groups)
    assert [id(p) for p in decaying] == [id(model.linear.weight), id(criterion.weight)]
    assert [id(p) for p in plain[-1:]] == [id(criterion.bias)]
    assert id(model.position) in map(id, plain), "the names that a network exempts stay exempt"
