"""The first RepMLP and RepMLP-ResNet-50: the block against its definition, conversion, sizes, counts, options."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import largest_difference, random_tensor, randomised
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import RepMLP, RepMLPResNet, RepMLPResNetSpec, create_model
from models.checkpoints import build_from, describe, read_checkpoint
from models.files import write_checkpoint
from models.foldable import FoldableConvNorm
from models.layers import GroupedFC, PartitionConv
from models.reparam import absorb_batch_norm, is_reparameterizable, to_deploy
from models.repmlp_resnet import SPECS

EXACT = 1e-12
examples = settings(deadline=None, derandomize=True, max_examples=40)
# c2 ... c5 are 16x24, 8x12, 4x6 and 2x3 where an image is 64x96.
TINY = {
    style: RepMLPResNetSpec(style, reductions, (1, 2, 2, 1), 2, (64, 96), (8, 16, 32, 64), (1, 2, 2, 2))
    for style, reductions in {"light": (0, 2, 4, 0), "bottleneck": (0, 1, 2, 0)}.items()
}


def tiny_network(style: str = "bottleneck", seed: int = 0, **options: object) -> RepMLPResNet:
    return randomised(RepMLPResNet(TINY[style], num_classes=5, **options), seed).eval()


def defined(block: RepMLP, x: Tensor) -> Tensor:
    """Computes a block partition by partition as the paper describes it, in training or evaluation mode."""
    (n, c, height, width), h, w = x.shape, block.h, block.w
    places = [(i, j) for i in range(0, height, h) for j in range(0, width, w)]
    parts = torch.stack([x[:, :, i : i + h, j : j + w] for i, j in places], 2)  # (N, C, P, h, w)
    if block.fc1_fc2 is not None:
        means = block.avg.bn(parts.mean((3, 4))[..., None]).reshape(n, -1)
        hidden = F.relu(F.linear(means, block.fc1_fc2.fc1.weight, block.fc1_fc2.fc1.bias))
        values = F.linear(hidden, block.fc1_fc2.fc2.weight, block.fc1_fc2.fc2.bias)
        parts = parts + values.reshape(n, c, len(places), 1, 1)
    parts = parts.transpose(1, 2).reshape(-1, c, h, w)
    groups, bias = block.fc3.groups, block.fc3.bias
    if isinstance(block.fc3, PartitionConv):
        padding = block.fc3.weight.shape[-1] // 2
        out = block.fc3_bn(F.conv2d(parts, block.fc3.weight, bias, padding=padding, groups=groups))
    else:
        flat = F.conv2d(parts.reshape(len(parts), -1, 1, 1), block.fc3.weight, bias, groups=groups)
        out = block.fc3_bn(flat).reshape(parts.shape)
    for k in block.branches:
        branch = block.get_submodule(f"repconv{k}")
        out = out + branch.bn(F.conv2d(parts, branch.conv.weight, padding=k // 2, groups=block.fc3.groups))
    result = torch.empty_like(x)
    for number, (i, j) in enumerate(places):
        result[:, :, i : i + h, j : j + w] = out.reshape(n, len(places), c, h, w)[:, number]
    return result


blocks = st.fixed_dictionaries(
    {
        "h": st.integers(1, 4),
        "w": st.integers(1, 4),
        "groups": st.sampled_from((1, 2, 4)),
        "branches": st.sampled_from(((), (1,), (3,), (1, 3, 5))),
        "gp_reduction": st.sampled_from((None, 1, 2)),
        "fc3_as_conv": st.sampled_from((None, None, 5, 7)),
    }
)


@examples
@given(shape=blocks, rows=st.integers(1, 2), columns=st.integers(1, 3), training=st.booleans(), seed=st.integers(0, 99))
def test_the_block_is_what_the_paper_defines(shape: dict, rows: int, columns: int, training: bool, seed: int) -> None:
    size = shape["h"] * rows, shape["w"] * columns
    block = randomised(RepMLP(4, size, **shape), seed).train(training)
    x = random_tensor(3, 4, *size, seed=seed).requires_grad_()
    twin = deepcopy(block)
    actual, expected = block(x), defined(twin, x)
    assert largest_difference(expected, actual) < EXACT
    # Under a BatchNorm that normalises each batch, gradients of what a shift cancels are zero but for rounding.
    upstream = random_tensor(*x.shape, seed=seed + 1)
    actual.backward(upstream)
    expected.backward(upstream)
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    scale = max(float(g.abs().max()) for g in gradients.values())
    assert all((p.grad - gradients[name]).abs().max() < 1e-10 * scale for name, p in block.named_parameters())
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(block.buffers(), twin.buffers(), strict=True))


@examples
@given(shape=blocks, rows=st.integers(1, 2), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_injection_of_blocks_of_any_shape(shape: dict, rows: int, columns: int, seed: int) -> None:
    size = shape["h"] * rows, shape["w"] * columns
    block = randomised(RepMLP(4, size, **shape), seed).eval()
    x = random_tensor(2, 4, *size, seed=seed)
    with torch.no_grad():
        expected = block(x)
        block.local_inject()
        assert largest_difference(expected, block(x)) < EXACT
    assert not is_reparameterizable(block)


def test_the_global_perceptron_is_left_out_where_one_partition_is_the_map() -> None:
    assert RepMLP(4, (3, 2), 3, 2).fc1_fc2 is None
    assert RepMLP(4, (3, 4), 3, 2).fc1_fc2.fc1.weight.shape == (8, 8)
    assert RepMLP(4, (3, 4), 3, 2, gp_reduction=2).fc1_fc2.fc1.weight.shape == (4, 8)
    assert RepMLP(4, (3, 4), 3, 2, gp_reduction=None).fc1_fc2 is None


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="a 5x4 map can't be divided into 3x2 partitions"):
        RepMLP(4, (5, 4), 3, 2)
    with pytest.raises(ValueError, match=r"odd kernel sizes, not \(1, 2\)"):
        RepMLP(4, (3, 4), 3, 2, branches=(1, 2))
    with pytest.raises(ValueError, match=r"odd kernel sizes, not \(4,\)"):
        RepMLP(4, (3, 4), 3, 2, branches=(1, 3), fc3_as_conv=4)
    with pytest.raises(ValueError, match=r"branches \(1, 5\) do not fit into a 3x3 kernel"):
        RepMLP(4, (3, 4), 3, 2, branches=(1, 5), fc3_as_conv=3)


def test_what_a_block_is_unless_it_is_told_otherwise() -> None:
    block = RepMLP(4, (4, 6), 2, 3)
    assert (block.fc3.groups, block.branches, block.deploy) == (1, (1, 3, 5), False)
    assert (block.fc1_fc2.fc1.in_features, block.fc1_fc2.fc1.out_features) == (16, 16)
    unit = FoldableConvNorm(3, 4, 3)
    assert (unit.conv.stride, unit.conv.padding, unit.conv.bias, unit.deploy) == ((1, 1), (1, 1), None, False)


def test_a_convolution_keeps_its_own_bias() -> None:
    unit = FoldableConvNorm(4, 4, (3, 5), groups=4)
    unit.conv.bias = nn.Parameter(torch.randn(4))
    unit, x = randomised(unit).eval(), random_tensor(2, 4, 5, 6)
    with torch.no_grad():
        expected = unit(x)
        unit.local_inject()
        assert expected.shape == x.shape
        assert largest_difference(expected, unit(x)) < EXACT


def test_injection_twice_changes_nothing_more() -> None:
    block = randomised(RepMLP(4, (4, 6), 2, 3, groups=2)).eval()
    unit = randomised(FoldableConvNorm(3, 4, 3, 2, nn.ReLU())).eval()
    for module, x in ((block, random_tensor(2, 4, 4, 6)), (unit, random_tensor(2, 3, 5, 6))):
        with torch.no_grad():
            expected = module(x)
            module.local_inject()
            state = {name: value.clone() for name, value in module.state_dict().items()}
            module.local_inject()
            assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
            assert largest_difference(expected, module(x)) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_injection_rounds_once(dtype: torch.dtype) -> None:
    network = tiny_network().to(dtype)
    exact = deepcopy(network).double()
    exact.locality_injection()
    network.locality_injection()
    weights = exact.state_dict()
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights[name].to(dtype)), name


@pytest.mark.parametrize("trainable", [True, False])
def test_injection_keeps_requires_grad_and_training_mode(trainable: bool) -> None:
    network = tiny_network().requires_grad_(trainable).train(trainable)
    network.locality_injection()
    assert {p.requires_grad for p in network.parameters()} == {trainable}
    assert {m.training for m in network.modules()} == {trainable}


def test_the_equivalent_kernel_is_differentiable_down_to_every_branch() -> None:
    block = randomised(RepMLP(4, (4, 3), 4, 3, groups=2)).eval()
    x, upstream = random_tensor(5, 4, 4, 3), random_tensor(5, 4, 4, 3, seed=1)
    parameters = list(block.parameters())
    assert len(parameters) == 1 + 2 + 3 * 3
    weight, bias = block.get_equivalent_fc3()
    assert (weight.shape, bias.shape) == (block.fc3.weight.shape, (48,))
    fused = F.conv2d(x.reshape(5, -1, 1, 1), weight, bias, groups=2).view_as(x)
    direct = block(x)
    assert largest_difference(direct, fused) < EXACT
    wanted, got = (torch.autograd.grad(out, parameters, upstream) for out in (direct, fused))
    for a, b in zip(wanted, got, strict=True):
        assert a.abs().max() > 0
        assert largest_difference(a, b) < EXACT


@examples
@given(
    m=st.integers(0, 3), inputs=st.integers(1, 3), outputs=st.integers(1, 3), groups=st.integers(1, 3),
    h=st.integers(1, 3), w=st.integers(1, 3), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_grouped_fc_equals_the_published_grouped_convolution(
    m: int, inputs: int, outputs: int, groups: int, h: int, w: int, bias: bool, seed: int
) -> None:
    fc = randomised(GroupedFC(groups * inputs, groups * outputs, h, w, groups, bias), seed)
    x = random_tensor(m, groups * inputs, h, w, seed=seed).requires_grad_()
    actual = fc(x)
    assert actual.shape == (m, groups * outputs, h, w)
    if m:
        expected = F.conv2d(x.reshape(m, -1, 1, 1), fc.weight, fc.bias, groups=groups).reshape(actual.shape)
        assert largest_difference(expected, actual) < EXACT
        upstream, tensors = random_tensor(*actual.shape, seed=seed + 1), [x, *fc.parameters()]
        wanted, got = (torch.autograd.grad(out, tensors, upstream) for out in (expected, actual))
        assert all(largest_difference(a, b) < EXACT for a, b in zip(wanted, got, strict=True))


@examples
@given(channels=st.integers(1, 3), positions=st.integers(1, 3), seed=st.integers(0, 99))
def test_absorbing_a_batch_norm_into_the_layer_behind_it(channels: int, positions: int, seed: int) -> None:
    fc = randomised(nn.Linear(channels * positions, 4), seed)
    norm = randomised(nn.BatchNorm1d(channels), seed + 1).eval()
    x = random_tensor(5, channels, positions, seed=seed)
    weight, bias = absorb_batch_norm(fc.weight, fc.bias, norm)
    assert largest_difference(fc(norm(x).flatten(1)), F.linear(x.flatten(1), weight, bias)) < EXACT
    tensors = [fc.weight, fc.bias, norm.weight, norm.bias]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(weight.square().sum() + bias.square().sum(), tensors))


# Parameters in training and in deploy form, and multiply-adds in deploy form. The light network's parameters are those
# of the published code; the paper gives 41.07 M for the bottleneck network.
COUNTS = {
    "RepMLP-Res50-light-224": (1000, 87_038_248, 86_142_440, 3.077e9),
    "RepMLP-Res50-bottleneck-224": (1000, 41_071_144, 40_871_528, 3.891e9),
    "RepMLP-Res50-g8-16-320": (1000, 59_543_080, 59_223_144, 8.057e9),
    "RepMLP-Res50-g8-8-320": (1000, 72_450_600, 72_023_144, 8.108e9),
    "RepMLP-Res50-g4-8-320": (1000, 87_939_624, 87_383_144, 8.354e9),
    "FaceResNet": (512, 31_381_312, 31_366_400, 0.9989e9),
    "RepMLP-FaceRes": (512, 66_131_264, 65_305_344, 1.0886e9),
}


def count(arch: str, outputs: int = 1000, **structure: object) -> tuple[int, int, float]:
    """Returns the parameters in training and in deploy form, and the multiply-adds in deploy form."""
    with torch.device("meta"):
        model, deploy = (create_model(arch, outputs, deploy=deploy, **structure).eval() for deploy in (False, True))
        images = torch.empty(1, 3, *model.img_size)
    with FlopCounterMode(display=False) as counter:
        deploy(images)
    parameters = [sum(p.numel() for p in network.parameters()) for network in (model, deploy)]
    return *parameters, counter.get_total_flops() / 2


@pytest.mark.parametrize("arch", COUNTS)
def test_parameters_and_operations(arch: str) -> None:
    outputs, *parameters, multiply_adds = COUNTS[arch]
    *counted, operations = count(arch, outputs)
    assert counted == parameters
    assert operations == pytest.approx(multiply_adds, rel=5e-4)


def test_counts_that_the_paper_states_in_words() -> None:
    """Sec. 4.2: how the networks compare; the paper cuts off decimals."""
    small, large = (count(f"RepMLP-Res50-{groups}-320") for groups in ("g8-16", "g4-8"))
    assert int(100 * (large[1] / small[1] - 1)) == 47
    assert int(1000 * (large[2] / small[2] - 1)) == 36
    resnet50, fewest, c4_only, light = (
        count("RepMLP-Res50-bottleneck-224", reductions=(0, 0, 0, 0)),
        count("RepMLP-Res50-bottleneck-224", reductions=(0, 0, 8, 0)),
        count("RepMLP-Res50-bottleneck-224", reductions=(0, 0, 4, 0)),
        count("RepMLP-Res50-light-224", groups=8),
    )
    assert fewest[1] < resnet50[1]
    assert int((c4_only[1] - resnet50[1]) / 1e6) == 5
    assert light[2] / resnet50[2] == pytest.approx(0.7, abs=0.02)


def test_one_number_stands_for_every_stage() -> None:
    assert create_model("RepMLPNet-Digits", gp_reduction=[8]).spec.gp_reduction == 8
    with pytest.raises(ValueError, match="gp_reduction is a list, not an integer"):
        create_model("RepMLPNet-Digits", gp_reduction=[8, 8])
    model = create_model("RepMLP-Res50-light-224", channels=[32] * 4, blocks=2, img_size=112, groups=2, gp_reduction=4)
    assert (model.spec.groups, model.spec.gp_reduction, model.spec.blocks) == ((2,) * 4, (4,) * 4, (2,) * 4)
    assert model.stage2[1].light_repmlp.fc3.groups == 2
    assert model.stage2[1].light_repmlp.fc1_fc2.fc1.out_features == 4 * 4 // 4


def test_groups_and_reductions_are_those_of_each_stage() -> None:
    structure = {"channels": [32, 64, 128, 256], "blocks": [1, 2, 2, 1], "img_size": 112, "gp_reduction": [1, 2, 1, 1]}
    model = create_model("RepMLP-Res50-bottleneck-224", groups=[1, 4, 8, 1], **structure)
    c3, c4 = model.stage2[1].btnk_repmlp, model.stage3[1].btnk_repmlp
    assert (c3.fc3.groups, c4.fc3.groups) == (4, 8)
    assert (c3.fc1_fc2.fc1.weight.shape, c4.fc1_fc2) == ((16, 32), None)


def test_specs_follow_the_paper() -> None:
    light, bottleneck = (SPECS[f"RepMLP-Res50-{style}-224"] for style in ("light", "bottleneck"))
    assert (light.reductions, light.groups, light.partition) == ((0, 8, 8, 0), (4,) * 4, 7)
    assert (bottleneck.reductions, bottleneck.groups, bottleneck.partition) == ((0, 2, 4, 0), (8,) * 4, 7)
    for spec in (light, bottleneck):
        assert (spec.channels, spec.blocks) == ((256, 512, 1024, 2048), (3, 4, 6, 3))
        assert (spec.branches, spec.gp_reduction, spec.image_size) == ((1, 3, 5), (1,) * 4, 224)
    for groups in ((8, 8), (8, 16), (4, 8)):
        spec = SPECS[f"RepMLP-Res50-g{groups[0]}-{groups[1]}-320"]
        assert (spec.style, spec.reductions, spec.groups[1:3]) == ("bottleneck", (0, 2, 4, 0), groups)
        assert (spec.partition, spec.branches, spec.image_size) == (10, (1, 3, 5, 7), 320)
        assert (spec.channels, spec.blocks) == ((256, 512, 1024, 2048), (3, 4, 6, 3))
    plain, face = SPECS["FaceResNet"], SPECS["RepMLP-FaceRes"]
    assert (plain.reductions, replace(plain, reductions=face.reductions)) == ((0, 0, 0, 0), face)
    assert (face.style, face.reductions, face.groups, face.partition) == ("bottleneck", (2, 2, 2, 0), (4,) * 4, 6)
    assert (face.channels, face.blocks) == ((128, 256, 512, 1024), (3, 2, 2, 2))
    assert (face.image_size, face.embedding) == (96, True)


def test_the_face_networks_neither_reduce_nor_expand() -> None:
    with torch.device("meta"):
        plain, face = create_model("FaceResNet", 512), create_model("RepMLP-FaceRes", 512)
        maps = plain.forward_intermediates(torch.empty(1, 3, 96, 96), intermediates_only=True)
    assert [m.shape[1:] for m in maps] == [(128, 24, 24), (256, 12, 12), (512, 6, 6), (1024, 3, 3)]
    for stage, width in enumerate(plain.spec.channels, start=1):
        kernels = [block.conv2.conv.weight.shape for block in plain.get_submodule(f"stage{stage}")]
        assert kernels == [(width, width, 3, 3)] * len(kernels)
    assert plain.stage0[0].conv.out_channels == 64
    repmlps = [name for name, module in face.named_modules() if isinstance(module, RepMLP)]
    assert repmlps == [f"{place}.btnk_repmlp" for place in ("stage1.1", "stage1.2", "stage2.1", "stage3.1")]
    assert [face.get_submodule(name).channels for name in repmlps] == [64, 64, 128, 256]


def test_an_embedding_is_normalised_and_its_head_can_be_changed() -> None:
    model = create_model("RepMLP-FaceRes", 16, channels=[8, 16, 32, 64], blocks=[1, 1, 1, 1]).double()
    images = random_tensor(8, 3, 96, 96)
    embeddings = model.train()(images).detach()
    assert embeddings.mean(0).abs().max() < EXACT
    assert (embeddings.std(0, correction=0) - 1).abs().max() < 0.01
    model.reset_classifier(4)
    assert model.eval()(images).shape == (8, 4)
    assert isinstance(model.linear.bn, nn.BatchNorm1d)


def test_a_spec_that_makes_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown style 'heavy': choose light or bottleneck"):
        RepMLPResNetSpec("heavy", (0, 0, 0, 0), (1, 1, 1, 1), 7, 224)
    with pytest.raises(ValueError, match=r"one number for each stage, not .*'reductions': \(0, 8\)"):
        create_model("RepMLP-Res50-light-224", reductions=[0, 8])
    with pytest.raises(ValueError, match=r"only a reduction may be 0: .*'groups': \(8, 0, 8, 8\)"):
        create_model("RepMLP-Res50-light-224", groups=[8, 0, 8, 8])
    with pytest.raises(ValueError, match="64 channels can't be divided into 3 groups"):
        create_model("RepMLP-Res50-light-224", groups=3)
    with pytest.raises(ValueError, match="the 512 values of a Global Perceptron can't be reduced 513 times"):
        create_model("RepMLP-Res50-light-224", gp_reduction=[1, 1, 513, 1])
    with pytest.raises(ValueError, match="an output_stride is 8, 16, 32, not 4"):
        create_model("RepMLP-Res50-light-224", output_stride=4)


@pytest.mark.parametrize("style", TINY)
def test_maps_that_are_not_square(style: str) -> None:
    model = tiny_network(style)
    images = random_tensor(2, 3, 64, 96)
    assert model.forward_features(images).shape == (2, 64, 2, 3)
    with torch.no_grad():
        expected, actual = model(images), to_deploy(model)(images)
    assert largest_difference(expected, actual) < EXACT
    with pytest.raises(ValueError, match=r"input of 96x64 .* made for 64x96: .*img_size=\(96, 64\)"):
        model(images.transpose(2, 3))


@pytest.mark.parametrize("size", [200, (224, 200), 0, -112])
def test_an_image_size_that_the_partitions_do_not_divide_is_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive multiple of 112, so that partitions of 7x7 divide the maps"):
        create_model("RepMLP-Res50-light-224", img_size=size)


@pytest.mark.parametrize("style", TINY)
def test_checkpointing_changes_memory_alone(style: str) -> None:
    images = random_tensor(4, 3, 64, 96)
    plain, thrifty = (tiny_network(style, drop_path_rate=0.3).train() for _ in range(2))
    thrifty.set_grad_checkpointing()
    for model in (plain, thrifty):
        torch.manual_seed(0)
        F.cross_entropy(model(images), torch.arange(4)).backward()
    expected, buffers = dict(plain.named_parameters()), dict(plain.named_buffers())
    assert all(torch.equal(p.grad, expected[name].grad) for name, p in thrifty.named_parameters())
    assert all(torch.equal(value, buffers[name]) for name, value in thrifty.named_buffers())


def test_drop_path_grows_with_the_depth() -> None:
    model = RepMLPResNet(TINY["light"], drop_path_rate=0.6)
    rates = [
        getattr(block.drop_path, "drop_prob", 0) for i in range(1, 5) for block in model.get_submodule(f"stage{i}")
    ]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_features_and_head() -> None:
    model = tiny_network(in_chans=4)
    images = random_tensor(2, 4, 64, 96)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert (model.num_features, model.head_hidden_size, model.in_chans) == (64, 64, 4)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model(images), pooled @ model.linear.weight.T + model.linear.bias)
    model.reset_classifier(7)
    assert (model.num_classes, model(images).shape, model.get_classifier().weight.dtype) == (7, (2, 7), torch.float64)
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_the_image_size_is_read_off_the_weights(form: str, tmp_path: Path) -> None:
    arch = "RepMLP-Res50-bottleneck-224"
    options = {"channels": [32, 64, 128, 256], "blocks": [1, 2, 2, 1], "partition": 4}
    model = create_model(arch, num_classes=3, img_size=128, **options, deploy=form == "deploy").eval()
    meta = describe(arch, model, (192, 192), form)
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta})
    network = build_from(read_checkpoint(tmp_path / "a.pth"))
    assert network.image_size == network.model.img_size == (128, 128)
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(network.model(images), model(images))


def test_without_global_perceptrons_any_size_that_the_partitions_divide_will_do() -> None:
    spec = replace(TINY["light"], global_perceptron=False)
    model = randomised(RepMLPResNet(spec, num_classes=5)).eval()
    x = random_tensor(1, 3, 128, 64)
    assert largest_difference(model(x), to_deploy(model)(x)) < EXACT
