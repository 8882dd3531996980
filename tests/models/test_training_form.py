"""The training form computes what the layers compute one by one: outputs, gradients, running statistics."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import RepMLPBlock, RepMLPNetUnit, create_model, training_form, training_ops
from models.reparam import randomize_statistics
from models.repmlpnet import PatchEmbedding

ROUNDING = 1e-11  # of float64, through a whole unit and back
SHAPES = {
    "published": {},
    "one share-set": {"share_sets": 1},
    "a share-set for each channel": {"share_sets": 8},
    "FC3 alone": {"branches": ()},
    "1x1 alone": {"branches": (1,)},
    "3x3 alone": {"branches": (3,)},
    "three branches": {"branches": (1, 3, 5)},
    "no Global Perceptron": {"gp_reduction": None},
    "a row": {"h": 1, "w": 6},
    "partitions": {"down": 2, "across": 3},
    "drop path": {"drop_path": 0.4},
    "partitions and drop path": {"drop_path": 0.4, "down": 2},
    "one image": {"images": 1},
}


@pytest.fixture(autouse=True)
def _however_small_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_form, "MANY_ON_CPUS", 0)


def unit(
    *,
    h: int = 3,
    w: int = 4,
    share_sets: int = 4,
    branches: tuple[int, ...] = (1, 3),
    gp_reduction: int | None = 4,
    drop_path: float = 0.0,
    **_: Any,
) -> RepMLPNetUnit:
    """Returns a unit in float64 with random parameters and running statistics."""
    torch.manual_seed(0)
    block = RepMLPBlock(8, h, w, share_sets=share_sets, branches=branches, gp_reduction=gp_reduction)
    made = RepMLPNetUnit(8, block, ffn_expansion=4, drop_path=drop_path).double()
    randomize_statistics(made)
    return made.train()


def maps(*, h: int = 3, w: int = 4, down: int = 1, across: int = 1, images: int = 5, **_: Any) -> Tensor:
    """Returns an input in float64."""
    return torch.randn(images, 8, h * down, w * across, generator=torch.Generator().manual_seed(1)).double()


def layer_by_layer(module: nn.Module) -> nn.Module:
    """Returns a copy of a module that does not take the training form."""
    copy = deepcopy(module)
    for part in copy.modules():
        if isinstance(part, RepMLPNetUnit | PatchEmbedding):
            part.takes_training_form = False
    return copy


def everything(module: nn.Module, x: Tensor, passes: int = 1) -> dict[str, Tensor]:
    """Returns output, gradients and buffers after forward and backward passes of a copy."""
    module, x = deepcopy(module), x.clone().requires_grad_()
    torch.manual_seed(2)  # of drop path
    for _ in range(passes):
        out = module(x)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
        (out * weight).sum().backward()
    found = {"output": out.detach(), "input": x.grad}
    for name, p in module.named_parameters():
        found[f"gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return found | {name: buffer.double() for name, buffer in module.named_buffers()}


def worst(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Returns the largest difference, of gradients relative to all gradients: some are zero but for rounding."""
    assert expected.keys() == actual.keys()
    scale = max(float(t.abs().max()) for name, t in expected.items() if name.startswith("gradient"))
    differences = []
    for name, tensor in expected.items():
        reference = scale if name.startswith("gradient") else float(tensor.abs().max())
        differences.append(float((actual[name] - tensor).abs().max()) / max(reference, 1e-30))
    return max(differences)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_unit_computes_what_its_layers_compute(shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = unit(**shape), maps(**shape)
    expected = everything(layer_by_layer(module), x, passes=2)
    assert worst(expected, everything(module, x, passes=2)) < ROUNDING
    monkeypatch.setattr(training_ops, "_is_eager_on_cpu", lambda x: False)  # the operators that GPUs take
    assert worst(expected, everything(module, x, passes=2)) < ROUNDING


def test_weights_of_zero_and_below() -> None:
    module, x = unit(), maps()
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight[::2], norm.weight[1] = 0, -0.5
    assert worst(everything(layer_by_layer(module), x), everything(module, x)) < ROUNDING


def test_an_embedding_computes_what_its_layers_compute() -> None:
    torch.manual_seed(0)
    module = PatchEmbedding(3, 8, 2).double()
    randomize_statistics(module)
    x = torch.randn(4, 3, 6, 8).double()
    assert worst(everything(layer_by_layer(module), x), everything(module, x)) < ROUNDING
    module.append(nn.Tanh())
    assert worst(everything(layer_by_layer(module), x), everything(module, x)) < ROUNDING
    assert module(x).abs().max() < 1


def error(make: Callable[[nn.Module], nn.Module], module: nn.Module, x: Tensor) -> float:
    """Returns the difference from float64 of what a form of a module computes in float32, over all values as one."""
    exact = everything(layer_by_layer(module), x)
    rounded = everything(make(deepcopy(module).float()), x.float())
    squares = sum(float((rounded[name].double() - exact[name]).square().sum()) for name in exact)
    return (squares / sum(float(t.square().sum()) for t in exact.values())) ** 0.5


def test_float32_is_as_exact_as_that_of_the_layers() -> None:
    module, x = unit(h=7, w=7), maps(h=7, w=7, images=16)
    assert error(lambda m: m, module, x) < 2 * error(layer_by_layer, module, x)


@pytest.mark.parametrize("mean", [3, 10, 100])
def test_a_mean_far_above_the_deviation_costs_no_more_than_in_the_layers(mean: float) -> None:
    module, x = unit(h=7, w=7), maps(h=7, w=7, images=16) + mean
    assert error(lambda m: m, module, x) < 3 * error(layer_by_layer, module, x) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_that_of_the_layers(dtype: torch.dtype) -> None:
    module, x = unit(h=7, w=7), maps(h=7, w=7, images=16)
    exact = everything(layer_by_layer(module), x)

    def difference(made: nn.Module) -> float:
        with torch.autocast("cpu", dtype):
            found = everything(made.float(), x.to(dtype))
        assert found["output"].dtype == dtype
        names = [name for name in exact if name.startswith(("gradient", "output"))]
        squares = sum(float((found[name].double() - exact[name]).square().sum()) for name in names)
        return (squares / sum(float(exact[name].square().sum()) for name in names)) ** 0.5

    assert difference(deepcopy(module)) < 1.2 * difference(layer_by_layer(module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mean", [1, 3, 10, 1000])
def test_a_channel_that_hardly_varies_does_not_spoil_the_ffn(mean: float, dtype: torch.dtype) -> None:
    """It is normalised, and so multiplied by a large number; what is left of its mean then would count."""
    module, x = unit(h=7, w=7, share_sets=1), maps(h=7, w=7, images=16)
    with torch.no_grad():
        for norm in (module.repmlp_block.fc3_bn, module.repmlp_block.repconv1.bn, module.repmlp_block.repconv3.bn):
            norm.weight.zero_()
            norm.bias.zero_()
        x[:, 3] = mean
    exact = everything(layer_by_layer(module), x.to(dtype).double())

    def difference(made: nn.Module, name: str) -> float:
        with torch.autocast("cpu", dtype):
            found = everything(made.float(), x.to(dtype))
        return float((found[name].double() - exact[name]).norm() / exact[name].norm())

    for name in ("output", "input", "gradient of ffn_block.ffn_fc1.conv.weight"):
        assert difference(deepcopy(module), name) < 2 * difference(layer_by_layer(module), name), name


@pytest.mark.parametrize("deviation", [1e-2, 1e-3, 1e-4])
def test_float16_does_not_overflow_where_the_layers_do_not(deviation: float) -> None:
    module, x = unit(h=7, w=7).float(), (maps(h=7, w=7, images=16) * deviation).half()

    def overflows(made: nn.Module, power: int) -> bool:
        made = deepcopy(made)
        with torch.autocast("cpu", torch.float16):
            (made(x.clone().requires_grad_()).float().mean() * 2.0**power).backward()
        return not all(p.grad.isfinite().all() for p in made.parameters())

    first = [next(p for p in range(8, 60) if overflows(m, p)) for m in (module, layer_by_layer(module))]
    assert first[0] >= first[1] - 1


def test_running_statistics_of_half_precision_are_not_rounded() -> None:
    module, x = unit(h=7, w=7).float(), maps(h=7, w=7, images=64).bfloat16() + 3
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(module, x)
    norm = deepcopy(module.prebn1).double()
    norm(x.double())
    torch.testing.assert_close(found["prebn1.running_mean"], norm.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["prebn1.running_var"], norm.running_var, rtol=1e-4, atol=1e-6)


def frozen(module: RepMLPNetUnit) -> None:
    """Freezes a BatchNorm."""
    module.ffn_block.ffn_fc1.bn.eval()


def cumulative(module: RepMLPNetUnit) -> None:
    """Makes running statistics the mean over all batches."""
    module.prebn2.momentum = None


def without_statistics(module: RepMLPNetUnit) -> None:
    """Takes away running statistics."""
    module.repmlp_block.fc3_bn = nn.BatchNorm2d(4, track_running_stats=False).double()


def other_momentum(module: RepMLPNetUnit) -> None:
    """Gives one BatchNorm another momentum."""
    module.prebn1.momentum = 0.5


def other_eps(module: RepMLPNetUnit) -> None:
    """Gives one BatchNorm another eps."""
    module.repmlp_block.repconv3.bn.eps = 0.1


def other_activation(module: RepMLPNetUnit) -> None:
    """Replaces GELU by its approximation."""
    module.ffn_block.act = nn.GELU(approximate="tanh")


def other_norm(module: RepMLPNetUnit) -> None:
    """Replaces a BatchNorm by another norm."""
    module.prebn1 = nn.GroupNorm(2, 8).double()


def converted(module: RepMLPNetUnit) -> None:
    """Injects the block."""
    module.repmlp_block.local_inject()


def converted_with_norm(module: RepMLPNetUnit) -> None:
    """Injects the block and inserts a BatchNorm."""
    module.repmlp_block.local_inject()
    module.repmlp_block.insert_bn()


def other_convolution(module: RepMLPNetUnit) -> None:
    """Replaces a layer of the FFN by one with a bias."""
    module.ffn_block.ffn_fc2.conv = nn.Conv2d(32, 8, 1).double()


def another_layer(module: RepMLPNetUnit) -> None:
    """Appends a layer to one of the FFN."""
    module.ffn_block.ffn_fc1.append(nn.Tanh())


def other_drop_path(module: RepMLPNetUnit) -> None:
    """Replaces drop path by what does not act on images."""
    module.drop_path = nn.Softmax(1)


def other_forward(module: RepMLPNetUnit) -> None:
    """Replaces what a layer does."""
    module.repmlp_block.gp.forward = lambda x: 0.5 * x.mean((2, 3), keepdim=True)


def other_block(module: RepMLPNetUnit) -> None:
    """Replaces the block by one of a class that computes something else."""

    class Doubled(RepMLPBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module.repmlp_block.__class__ = Doubled


def other_gate(module: RepMLPNetUnit) -> None:
    """Gates by the maxima of the channels."""

    class Maxima(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.amax((2, 3), keepdim=True).sigmoid()

    module.repmlp_block.gp = Maxima()


def without_buffers(module: RepMLPNetUnit) -> None:
    """Takes away running statistics, but does not say so."""
    module.prebn2.running_mean = module.prebn2.running_var = None


def constrained(module: RepMLPNetUnit) -> None:
    """Constrains the equivalent kernel."""
    module.repmlp_block.constraint = lambda kernel: kernel.clamp(-0.1, 0.1)


CHANGES = [
    frozen,
    cumulative,
    without_statistics,
    other_momentum,
    other_eps,
    other_activation,
    other_norm,
    converted,
    converted_with_norm,
    constrained,
    other_convolution,
    another_layer,
    other_drop_path,
    other_forward,
    other_block,
    other_gate,
    without_buffers,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_the_form_does_not_cover_is_computed_by_the_layers(change: Callable[[RepMLPNetUnit], None]) -> None:
    module, x = unit(), maps()
    change(module)
    assert worst(everything(layer_by_layer(module), x), everything(module, x)) < ROUNDING


def test_networks_of_half_precision_train_without_autocast() -> None:
    module, x = unit().bfloat16(), maps().bfloat16()
    assert worst(everything(layer_by_layer(module), x), everything(module, x)) == 0


@pytest.mark.parametrize(("positions", "taken"), [(24, True), (23, True), (25, False)])
def test_a_small_map_is_left_to_the_layers(positions: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_form, "MANY_ON_CPUS", positions - 1)
    calls = []
    monkeypatch.setattr(training_form, "apply", lambda _layers, x: calls.append(x) or x)
    unit()(maps(images=2))  # of 12 positions each
    assert bool(calls) == taken


def test_a_network_can_be_told_to_train_layer_by_layer() -> None:
    network = create_model("RepMLPNet-Digits", 10).double().train()
    x = torch.randn(4, 3, 16, 16).double().requires_grad_()
    network.set_training_form(False)
    (grad,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "name", ["prebn1", "drop_path", "repmlp_block", "repmlp_block.gp.fc1", "ffn_block.act", "repmlp_block.fc3"]
)
def test_hooks_are_called(name: str) -> None:
    module, seen = unit(), []
    module.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    module(maps())
    assert set(seen) == {name}


def test_one_value_of_a_channel_is_an_error_as_for_the_layers() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unit(h=1, w=1, branches=(1,), images=1)(maps(h=1, w=1, images=1))


def test_strides_and_parts_of_a_batch_do_not_matter() -> None:
    module, x = unit(), maps()
    expected = everything(module, x)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert worst(expected, everything(module, other)) < ROUNDING


def test_a_frozen_parameter_gets_no_gradient() -> None:
    module = unit()
    module.repmlp_block.requires_grad_(False)
    module(maps()).sum().backward()
    assert all(p.grad is None for p in module.repmlp_block.parameters())
    assert module.ffn_block.ffn_fc2.conv.weight.grad is not None


def test_second_derivatives_are_refused() -> None:
    module, x = unit(), maps().requires_grad_()
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        grad.sum().backward()


def random(*shape: int) -> Tensor:
    """Returns a tensor in float64 that takes a gradient."""
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("eager_on_cpu", [True, False])
def test_gradients_of_the_operations_are_those_of_finite_differences(
    eager_on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not eager_on_cpu:
        monkeypatch.setattr(training_ops, "_is_eager_on_cpu", lambda x: False)
    torch.manual_seed(0)
    n, c, k, s = 3, 4, 6, 2
    check = torch.autograd.gradcheck
    assert check(lambda *t: training_ops.normalize(*t, 1e-5), (random(n, c, k), random(c), random(c)))
    y, fc = random(n, c, 2, 3), random(s, k, k)
    assert check(lambda *t: training_ops.convolve(t[0], t[1], t[2:]), (y, fc, random(c, 1, 3, 3)))
    assert check(lambda *t: training_ops.convolve(t[0], t[1], ()), (y, fc))
    rows = [random(n, c) for _ in range(3)]
    norms = random(2, s), random(2, s)
    in_maps = random(n, c, k), random(n, c, k)
    assert check(
        lambda x, *t: training_ops.combine(x, *t[:5], 1e-5, t[5:])[0], (random(n, c, k), *rows, *norms, *in_maps)
    )
    below = torch.zeros(training_ops.EXTRA_ROWS, n * k, dtype=torch.float64)
    below[0] = 1
    x, gate = random(c, n * k), torch.rand(n, 1, dtype=torch.float64)
    middle = torch.randn(c, dtype=torch.float64)
    weights = random(2 * c, c + len(below)), random(c, 2 * c), random(c), random(c)
    assert check(
        lambda x, *t: training_ops.feed_forward(torch.cat((x, below)), middle, *t, 1e-5, gate)[0], (x, *weights)
    )
    assert check(lambda x: training_ops.center(torch.cat((x, below)), x.detach()[:, 0])[2], (x,))
