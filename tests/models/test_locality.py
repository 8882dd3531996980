"""Local branches beside any linear layer that mixes tokens: exact, silent when new, gone after conversion."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import largest_difference, random_tensor, randomised
from timm.layers import GatedMlp
from timm.models.mlp_mixer import Affine, MixerBlock, MlpMixer, ResBlock, SpatialGatingBlock
from torch import Tensor, nn

from models.locality import LocalityLinear, add_local_branches, branch_names
from models.reparam import is_reparameterizable, to_deploy

EXACT = 1e-12


class TokenMixer(nn.Module):
    """A network of a user's own, for maps of 4x6: tokens mixed by a plain linear layer that is used twice."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.token_fc = nn.Linear(24, 24, bias=bias)
        self.again = self.token_fc
        self.channel_fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        x = self.again(self.token_fc(x).relu())
        return self.head(self.channel_fc(x.transpose(1, 2)).mean(1))


def small(block: type[nn.Module], **options: object) -> MlpMixer:
    """A network of timm's, of two blocks and with maps of 4x6."""
    return MlpMixer(5, (8, 12), patch_size=2, num_blocks=2, embed_dim=16, block_layer=block, **options)


def layer(h: int, w: int, branches: tuple[int, ...] = (1, 3, 5), seed: int = 0) -> LocalityLinear:
    """One whose every parameter and statistic is random."""
    return randomised(LocalityLinear(nn.Linear(h * w, h * w), (h, w), branches), seed).eval()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    branches=st.sampled_from(((1,), (3,), (7,), (1, 3), (5, 1, 3))),
    leading=st.sampled_from(((3,), (2, 3), (2, 1, 4))),
    seed=st.integers(0, 99),
)
def test_a_layer_of_any_shape(h: int, w: int, branches: tuple[int, ...], leading: tuple[int, ...], seed: int) -> None:
    mixing = layer(h, w, branches, seed)
    x = random_tensor(*leading, h * w, seed=seed)
    expected = mixing(x)
    weight, bias = mixing.get_equivalent_linear()
    assert largest_difference(expected, x @ weight.T + bias) < EXACT
    mixing.local_inject()
    assert largest_difference(expected, mixing(x)) < EXACT
    assert list(mixing.state_dict()) == ["weight", "bias"]
    values = {name: value.clone() for name, value in mixing.state_dict().items()}
    mixing.local_inject()
    assert all(torch.equal(value, values[name]) for name, value in mixing.state_dict().items())


def test_a_branch_is_a_convolution_of_every_channel_alone() -> None:
    mixing = layer(4, 3, (3,))
    nn.init.zeros_(mixing.weight)
    nn.init.zeros_(mixing.bias)
    x = random_tensor(2, 5, 12)
    maps = x.reshape(10, 1, 4, 3)
    expected = mixing.repconv3.bn(nn.functional.conv2d(maps, mixing.repconv3.conv.weight, padding=1))
    assert mixing.repconv3.conv.weight.shape == (1, 1, 3, 3)
    assert largest_difference(expected.reshape(2, 5, 12), mixing(x)) < EXACT


NETWORKS = {
    "ResMLP": (
        lambda: small(ResBlock, mlp_ratio=2, norm_layer=Affine),
        ["blocks.0.linear_tokens", "blocks.1.linear_tokens"],
    ),
    "gMLP": (
        lambda: small(SpatialGatingBlock, mlp_ratio=2, mlp_layer=GatedMlp),
        ["blocks.0.mlp_channels.gate.proj", "blocks.1.mlp_channels.gate.proj"],
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_timm(kind: str) -> None:
    build, layers = NETWORKS[kind]
    original = randomised(build()).eval()
    model = deepcopy(original)
    images = random_tensor(2, 3, 8, 12)

    assert add_local_branches(model, (4, 6), (1, 3, 5)) == layers

    assert is_reparameterizable(model)
    assert torch.equal(original(images), model(images))
    branches = branch_names(model)
    assert len(branches) == 2 * 3 * 6
    own = model.state_dict()
    assert {k for k in own if k not in branches} == set(original.state_dict())
    randomised(model)
    expected, deploy = model(images), to_deploy(model)
    assert largest_difference(original(images), expected) > 1e-3
    assert largest_difference(expected, deploy(images)) < EXACT
    assert list(deploy.state_dict()) == list(original.state_dict())
    original.load_state_dict(deploy.state_dict())
    assert largest_difference(expected, original(images)) < EXACT


def test_a_network_of_ones_own_with_a_layer_used_twice() -> None:
    model = randomised(TokenMixer()).eval()
    names, parameters = list(model.state_dict()), {id(p) for p in model.parameters()}
    images = random_tensor(2, 3, 8, 12)
    before = model(images)

    assert add_local_branches(model, (4, 6), names=["token*", "again"]) == ["token_fc", "again"]

    assert model.token_fc is model.again
    assert torch.equal(before, model(images))
    assert parameters < {id(p) for p in model.parameters()}  # an optimizer made before still holds them
    randomised(model)
    deploy = to_deploy(model)
    assert largest_difference(model(images), deploy(images)) < EXACT
    assert list(deploy.state_dict()) == names


@pytest.mark.parametrize("training", [True, False])
def test_new_branches_are_silent_and_learn(training: bool) -> None:
    model = randomised(TokenMixer()).float().train(training)
    images = random_tensor(4, 3, 8, 12).float()
    before = model(images)
    add_local_branches(model, (4, 6), (3,), ["token_fc"])
    branch = model.token_fc.repconv3
    assert branch.training == training
    assert branch.conv.weight.dtype == torch.float32
    assert torch.equal(before, model(images))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = branch.conv.weight.clone()
    for _ in range(2):  # the first step moves the scale alone, which lets the second reach the kernel
        optimizer.zero_grad()
        model(images).square().sum().backward()
        optimizer.step()
    assert branch.bn.weight.abs() > 0
    assert branch.bn.bias.abs() > 0
    assert (branch.conv.weight != start).all()


def test_the_equivalent_layer_is_differentiable() -> None:
    mixing = layer(3, 4)
    x, upstream = random_tensor(5, 2, 12), random_tensor(5, 2, 12, seed=1)
    weight, bias = mixing.get_equivalent_linear()
    parameters = list(mixing.parameters())
    wanted = torch.autograd.grad(mixing(x), parameters, upstream)
    got = torch.autograd.grad(nn.functional.linear(x, weight, bias), parameters, upstream)
    for a, b in zip(wanted, got, strict=True):
        assert a.abs().min() > 0
        assert largest_difference(a, b) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_injection_rounds_once(dtype: torch.dtype) -> None:
    mixing = layer(5, 4).to(dtype)
    exact = deepcopy(mixing).double()
    exact.local_inject()
    weight, bias = mixing.get_equivalent_linear()
    mixing.local_inject()
    for actual, alike, reference in ((mixing.weight, weight, exact.weight), (mixing.bias, bias, exact.bias)):
        assert actual.dtype == dtype
        assert torch.equal(actual, reference.to(dtype))
        assert torch.equal(actual, alike)


def test_the_token_mlp_of_a_mixer_is_refused() -> None:
    mixer = small(MixerBlock)
    before = list(mixer.state_dict())
    with pytest.raises(ValueError, match="blocks.0.mlp_tokens of MlpMixer can't take local branches: .*24 positions"):
        add_local_branches(mixer, (4, 6))
    with pytest.raises(ValueError, match="same, not into one from 24 to 8 features"):
        add_local_branches(mixer, (4, 6), names=["blocks.*.mlp_tokens.fc1"])
    assert list(mixer.state_dict()) == before


@pytest.mark.parametrize(
    ("size", "names", "message"),
    [
        ((6, 6), ["token_fc"], "token_fc of TokenMixer .*36 positions of a 6x6 map .* one from 24 to 24 features"),
        ((4, 6), ["token_fc", "channel_fc"], "channel_fc of TokenMixer .*from 8 to 8 features"),
        ((4, 6), ["stem"], "stem of TokenMixer .*not into a Conv2d"),
        ((4, 6), ["token_fc", "tokens.*"], r"no layer of the network is named 'tokens\.\*'"),
        ((4, 6), None, "no layer is known to mix tokens"),
    ],
)
def test_layers_that_can_not_take_branches(size: tuple[int, int], names: list[str] | None, message: str) -> None:
    model = TokenMixer()
    with pytest.raises(ValueError, match=message) as error:
        add_local_branches(model, size, names=names)
    assert "\n" not in str(error.value)
    assert type(model.token_fc) is nn.Linear  # none is changed where one is refused


def test_a_layer_without_bias_and_one_that_has_branches_are_refused() -> None:
    with pytest.raises(ValueError, match="token_fc of TokenMixer .* build the layer with bias=True"):
        add_local_branches(TokenMixer(bias=False), (4, 6), names=["token_fc"])
    model = TokenMixer()
    add_local_branches(model, (4, 6), names=["token_fc"])
    with pytest.raises(ValueError, match="not into a LocalityLinear"):
        add_local_branches(model, (4, 6), names=["token_fc"])


@pytest.mark.parametrize("branches", [(), (2,), (1, 4), (3, 3), (-1,)])
def test_wrong_kernel_sizes_are_refused(branches: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="kernel size"):
        LocalityLinear(nn.Linear(4, 4), 2, branches)
