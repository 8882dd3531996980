"""What the whole network does: gradients, checkpointing, drop path, sizes, heads, parameter and operation counts."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from model_helpers import TINY, largest_difference, random_tensor, tiny_network
from timm.layers import DropPath
from torch import Tensor, nn

from models import SPECS, RepMLPNet, create_model
from models.repmlpnet import RepMLPNetUnit
from models.stages import checkpointed

EXACT = 1e-12
# A shift of every pixel alike, which the next BatchNorm takes away again.
SHIFTS = ("prebn2.bias", "ffn_fc2.bn.bias")


def backward(model: nn.Module, images: Tensor) -> Tensor:
    loss = F.cross_entropy(model(images), torch.arange(len(images)) % model.num_classes)
    loss.backward()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_every_parameter_learns(training: bool, deploy: bool) -> None:
    model = tiny_network(deploy=deploy).train(training)
    backward(model, random_tensor(8, 3, 16, 16))
    largest = {name: float(gradient.abs().max()) for name, gradient in gradients(model).items()}
    if training:
        shifts = {name for name in largest if name.endswith(SHIFTS)}
        assert len(shifts) == 2 * sum(TINY.blocks)
        assert max(largest.pop(name) for name in shifts) < 1e-14
    assert min(largest.values()) > 1e-8 * max(largest.values())


def test_a_fresh_network_learns_a_batch_by_heart() -> None:
    torch.manual_seed(0)
    model = create_model("RepMLPNet-Digits", num_classes=4)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def count_calls(model: nn.Module) -> Counter:
    """Counts the forward passes of every unit from now on."""
    calls: Counter = Counter()
    for module in model.modules():
        if isinstance(module, RepMLPNetUnit):
            calls[module] = 0
            module.register_forward_pre_hook(lambda unit, _: calls.update([unit]))
    return calls


def frozen_norms(model: nn.Module) -> nn.Module:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


@pytest.mark.parametrize("mode", [nn.Module.train, frozen_norms], ids=["training", "frozen norms"])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_checkpointing_changes_memory_alone(mode: Callable, drop_path_rate: float) -> None:
    images = random_tensor(6, 3, 16, 16)
    plain, thrifty = (mode(tiny_network(drop_path_rate=drop_path_rate)) for _ in range(2))
    thrifty.set_grad_checkpointing()
    calls, thrifty_calls = count_calls(plain), count_calls(thrifty)
    losses = []
    for model in (plain, thrifty):
        for step in range(2):
            torch.manual_seed(step)
            losses.append(backward(model, images))

    assert set(calls.values()) == {2}
    assert set(thrifty_calls.values()) == {4}
    assert losses[:2] == losses[2:]
    expected, actual = gradients(plain), gradients(thrifty)
    assert all(torch.equal(gradient, actual[name]) for name, gradient in expected.items())
    buffers = dict(thrifty.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers())
    assert buffers["head_norm.num_batches_tracked"] == (2 if plain.head_norm.training else 0)


def test_checkpointing_under_autocast() -> None:
    images = random_tensor(6, 3, 16, 16).float()
    plain, thrifty = (tiny_network().float().train() for _ in range(2))
    thrifty.set_grad_checkpointing()
    for model in (plain, thrifty):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(images), torch.arange(6) % 5)
        loss.backward()
    actual, buffers = gradients(thrifty), dict(thrifty.named_buffers())
    assert all(torch.equal(gradient, actual[name]) for name, gradient in gradients(plain).items())
    assert all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers())


@pytest.mark.slow  # tests/distributed/test_combinations.py has it in a run
@pytest.mark.parametrize("half", [None, torch.bfloat16], ids=["float64", "bf16"])
def test_checkpointing_in_a_compiled_network(half: torch.dtype | None) -> None:
    """Bit for bit as in one without checkpointing, and with the drop path of the network that is not compiled."""
    eager, plain, thrifty = (tiny_network(drop_path_rate=0.5).train() for _ in range(3))
    thrifty.set_grad_checkpointing()
    images = random_tensor(6, 3, 16, 16)
    if half is not None:
        eager, plain, thrifty, images = eager.float(), plain.float(), thrifty.float(), images.float()
    torch.compiler.reset()
    for forward in (eager, *(torch.compile(network, backend="aot_eager") for network in (plain, thrifty))):
        for step in range(2):
            torch.manual_seed(step)
            with torch.autocast("cpu", half, enabled=half is not None):
                loss = F.cross_entropy(forward(images), torch.arange(6) % 5)
            loss.backward()
    actual, buffers = gradients(thrifty), dict(thrifty.named_buffers())
    assert all(torch.equal(gradient, actual[name]) for name, gradient in gradients(plain).items())
    assert all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers())
    if half is None:  # a compiled network may add up in another order
        torch.testing.assert_close(gradients(eager), actual, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(dict(eager.named_buffers()), buffers, rtol=1e-9, atol=1e-11)


def test_what_a_compiler_gives_up_on_is_not_checkpointed_without_a_word() -> None:
    """Outside of a graph, running statistics would take in a batch twice."""

    class Interrupted(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(input)

    norm = Interrupted(3)
    forward = torch.compile(lambda x: checkpointed(norm, x), backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        forward(torch.randn(2, 3, 4, 4)).sum().backward()


def test_checkpointing_is_for_training_alone_and_can_be_switched_off() -> None:
    images = random_tensor(2, 3, 16, 16)
    model = tiny_network()
    model.set_grad_checkpointing()
    calls = count_calls(model)
    backward(model.eval(), images)
    assert set(calls.values()) == {1}
    model.set_grad_checkpointing(False)
    backward(model.train(), images)
    assert set(calls.values()) == {2}


def test_drop_path_grows_with_the_depth() -> None:
    model = create_model("RepMLPNet-Digits", drop_path_rate=0.3)
    units = [unit for stage in model.stages for unit in stage]
    assert isinstance(units[0].drop_path, nn.Identity)
    assert [unit.drop_path.drop_prob for unit in units[1:]] == pytest.approx([0.1, 0.2, 0.3])


def test_drop_path_drops_whole_samples_in_training_and_nothing_in_evaluation() -> None:
    torch.manual_seed(0)
    model = tiny_network(drop_path_rate=0.5)
    seen: list[tuple[Tensor, Tensor]] = []
    last = model.stages[-1][-1].drop_path
    assert isinstance(last, DropPath)
    last.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output.detach())))
    images = random_tensor(64, 3, 16, 16)

    model.train()(images)
    kept = []
    for before, after in seen:
        zero, double = (after == 0).flatten(1).all(1), (after == 2 * before).flatten(1).all(1)
        assert (zero ^ double).all()
        kept.append(double)
    assert len(kept) == 2
    assert all(16 < sample.sum() < 48 for sample in kept)
    assert not torch.equal(*kept)

    weights = model.state_dict()
    without = RepMLPNet(TINY, num_classes=5).double().eval()
    without.load_state_dict(weights)
    assert torch.equal(model.eval()(images), without(images))


def test_drop_path_works_where_the_network_is_built_on_no_device() -> None:
    with torch.device("meta"):
        model = create_model("RepMLPNet-T224", drop_path_rate=0.2)
    assert model.stages[-1][-1].drop_path.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (8, 24), 32])
def test_image_sizes_that_are_not_square(size: int | tuple[int, int]) -> None:
    model = tiny_network(img_size=size)
    height, width = model.img_size
    assert (height, width) == (size if isinstance(size, tuple) else (size, size))
    block = model.stages[0][0].repmlp_block
    assert (block.h, block.w) == (height // 2, width // 2)
    images = random_tensor(2, 3, height, width)
    assert model.forward_features(images).shape == (2, 32, height // 4, width // 4)
    expected = model(images)
    model.locality_injection()
    assert largest_difference(expected, model(images)) < EXACT
    if height != width:
        with pytest.raises(ValueError, match=f"input of {width}x{height} .* made for {height}x{width}"):
            model(images.transpose(2, 3))


@pytest.mark.parametrize("size", [18, (16, 18), (18, 16), 0, (16, 0), -16])
def test_an_image_size_off_the_stride_is_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive multiple of the total stride 4") as error:
        RepMLPNet(TINY, img_size=size)
    height, width = size if isinstance(size, tuple) else (size, size)
    assert f"{height}x{width}" in str(error.value)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 24), (24, 16), (17, 16), (16, 15)])
def test_an_input_that_the_partitions_do_not_divide_is_refused_with_both_sizes(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"input of {height}x{width} .* made for 16x16: .*img_size=\({height}, "):
        tiny_network()(torch.zeros(1, 3, height, width, dtype=torch.float64))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48), (32, 16)])
def test_multiples_of_the_image_size_are_taken_in_partitions(height: int, width: int) -> None:
    model = tiny_network()
    images = random_tensor(2, 3, height, width)
    assert model.forward_features(images).shape == (2, 32, height // 4, width // 4)
    logits = model(images)
    assert logits.shape == (2, 5)
    model.locality_injection()
    assert largest_difference(logits, model(images)) < EXACT


def test_a_repeated_image_gives_the_logits_of_the_image() -> None:
    model = tiny_network()
    images = random_tensor(2, 3, 16, 16)
    assert largest_difference(model(images), model(images.repeat(1, 1, 2, 3))) < EXACT


@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels(in_chans: int) -> None:
    model = tiny_network(in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(random_tensor(2, in_chans, 16, 16)).shape == (2, 5)


def test_features_and_head() -> None:
    model = tiny_network()
    images = random_tensor(2, 3, 16, 16)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    logits = model.forward_head(features)
    assert (features.shape, pooled.shape, logits.shape) == ((2, 32, 4, 4), (2, 32), (2, 5))
    assert (model.num_features, model.head_hidden_size) == (32, 32)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(logits, pooled @ model.head.weight.T + model.head.bias)
    assert torch.equal(model(images), logits)


def test_no_classes_leaves_the_pooled_features() -> None:
    model, headless = tiny_network(), RepMLPNet(TINY, num_classes=0).double().eval()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    headless.load_state_dict(weights)
    images = random_tensor(2, 3, 16, 16)
    assert isinstance(headless.get_classifier(), nn.Identity)
    expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(headless(images), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_reset_classifier(dtype: torch.dtype) -> None:
    model = tiny_network().to(dtype)
    images = random_tensor(2, 3, 16, 16).to(dtype)
    old = model.get_classifier()
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.head is not old
    assert model.head.weight.dtype == dtype
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(images).shape == (2, 32)


def test_reset_classifier_keeps_the_device() -> None:
    with torch.device("meta"):
        model = RepMLPNet(TINY)
    model.reset_classifier(7)
    assert model.head.weight.device.type == "meta"


def test_specs_follow_the_paper() -> None:
    sizes = [arch for arch in SPECS if arch[10:] in ("T224", "B224", "T256", "B256", "D256", "L256")]
    assert len(sizes) == 6
    for arch in sizes:
        spec = SPECS[arch]
        assert (spec.branches, spec.gp_reduction, spec.ffn_expansion, spec.patch_size) == ((1, 3), 4, 4, 4)
        assert f"RepMLPNet-{arch[10]}{spec.image_size}" == arch
