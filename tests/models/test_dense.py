"""Networks as backbones: maps of several levels at any size, and embeddings that look across their patches."""

from copy import deepcopy

import pytest
import timm
import torch
from model_helpers import largest_difference, random_tensor, randomised
from torch import Tensor, nn

from models import RepMLPNet, RepMLPNetSpec, create_model, dense_backbone
from models.dense import DOWNSAMPLINGS, Downsampling
from models.layers import ConvNorm
from models.reparam import to_deploy
from models.repmlp_resnet import RepMLPResNet, RepMLPResNetSpec
from models.repmlpnet import SPECS

# Four stages of 8x8, 4x4, 2x2 and 1x1 maps.
FOUR = RepMLPNetSpec((4, 8, 8, 16), (1, 2, 1, 1), (1, 2, 4, 8), 16, patch_size=2, gp_reduction=2)
CHANNELS, STRIDES = list(FOUR.channels), [2, 4, 8, 16]


def network(seed: int = 0) -> nn.Module:
    return randomised(RepMLPNet(FOUR, num_classes=5), seed).eval()


def stages_by_hand(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Returns what each stage gives, by the layers themselves."""
    maps, x = [], model.conv_embedding(x)
    for i, stage in enumerate(model.stages):
        for unit in stage:
            x = unit(x)
        maps.append(x)
        if i < len(model.embeds):
            x = model.embeds[i](x)
    return maps


@pytest.mark.parametrize(
    ("indices", "expected"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), ([1, -1], [1, 3])]
)
def test_forward_intermediates_gives_the_stages_that_are_asked_for(
    indices: int | list[int] | None, expected: list[int]
) -> None:
    model, x = network(), random_tensor(2, 3, 16, 32)
    by_hand = stages_by_hand(model, x)
    final, maps = model.forward_intermediates(x, indices)
    assert torch.equal(final, model.forward_features(x))
    assert len(maps) == len(expected)
    assert all(torch.equal(found, by_hand[i]) for found, i in zip(maps, expected, strict=True))
    alone = model.forward_intermediates(x, indices, intermediates_only=True)
    assert all(torch.equal(one, other) for one, other in zip(alone, maps, strict=True))


@pytest.mark.parametrize("style", ["light", "bottleneck"])
def test_repmlp_resnet_gives_its_stages(style: str) -> None:
    spec = RepMLPResNetSpec(style, (0, 2, 4, 0), (1, 2, 2, 1), 2, (64, 96), (8, 16, 32, 64), (1, 2, 2, 1))
    model = randomised(RepMLPResNet(spec, num_classes=5)).eval()
    x = random_tensor(2, 3, 64, 96)
    by_hand, y = [], model.stage0(x)
    for stage in (model.stage1, model.stage2, model.stage3, model.stage4):
        y = stage(y)
        by_hand.append(y)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, y)
    assert all(torch.equal(found, expected) for found, expected in zip(maps, by_hand, strict=True))
    backbone = dense_backbone(model, out_indices=(1, 2))
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([16, 32], [8, 16])
    assert [name for name, _ in backbone.model.named_children() if name.startswith("stage")] == [
        f"stage{i}" for i in range(4)
    ]
    assert all(torch.equal(found, by_hand[i]) for found, i in zip(backbone(x), (1, 2), strict=True))


def test_norm_is_for_the_last_stage_alone() -> None:
    model, x = network(), random_tensor(2, 3, 16, 16)
    by_hand = stages_by_hand(model, x)
    final, maps = model.forward_intermediates(x, norm=True)
    assert all(torch.equal(found, expected) for found, expected in zip(maps[:3], by_hand[:3], strict=True))
    assert torch.equal(maps[3], final)
    assert largest_difference(final, by_hand[3]) > 0.01


def test_stop_early_ends_with_the_last_stage_that_is_asked_for() -> None:
    model, x = network(), random_tensor(2, 3, 16, 16)
    model.stages[2][0].register_forward_hook(lambda *_: pytest.fail("the third stage is not needed"))
    final, (level,) = model.forward_intermediates(x, [1], stop_early=True)
    assert torch.equal(final, level)


def test_the_final_norm_takes_in_a_batch_once() -> None:
    model, x = network().train(), random_tensor(4, 3, 16, 16)
    model.forward_intermediates(x, norm=True)
    assert int(model.head_norm.num_batches_tracked) == 1
    model.forward_intermediates(x, intermediates_only=True)
    assert int(model.head_norm.num_batches_tracked) == 1


def test_another_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="maps of a RepMLPNet are NCHW, not NHWC"):
        network().forward_intermediates(random_tensor(1, 3, 16, 16), output_fmt="NHWC")


def test_pruning_leaves_what_the_levels_need() -> None:
    model, x = network(), random_tensor(2, 3, 16, 16)
    expected = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -3]) == [0, 1]
    assert (len(model.stages), len(model.embeds), model.num_features) == (2, 1, 8)
    assert isinstance(model.head, nn.Identity)
    assert isinstance(model.head_norm, nn.Identity)
    found = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_pruning_can_keep_norm_and_head() -> None:
    model, x = network(), random_tensor(2, 3, 16, 16)
    expected = model(x)
    assert model.prune_intermediate_layers([0, 3], prune_head=False) == [0, 3]
    assert torch.equal(model(x), expected)


def test_pruning_keeps_the_last_stage_and_its_norm_unless_it_is_told_otherwise() -> None:
    model = network()
    assert model.prune_intermediate_layers() == [3]
    assert isinstance(model.head_norm, nn.BatchNorm2d)
    assert isinstance(model.head, nn.Identity)
    assert model.prune_intermediate_layers(prune_norm=True) == [3]
    assert isinstance(model.head_norm, nn.Identity)


@pytest.mark.parametrize("arch", SPECS)
def test_timm_builds_every_architecture_as_a_backbone(arch: str) -> None:
    spec, (height, width) = SPECS[arch], 2 * (2 * SPECS[arch].image_size,)
    with torch.device("meta"):
        backbone = timm.create_model(arch.lower().replace("-", "_"), features_only=True)
        maps = backbone(torch.empty(1, 3, height, width))
    strides = [spec.patch_size * 2**i for i in range(len(spec.channels))]
    assert backbone.feature_info.channels() == list(spec.channels)
    assert backbone.feature_info.reduction() == strides
    assert [tuple(m.shape) for m in maps] == [
        (1, c, height // s, width // s) for c, s in zip(spec.channels, strides, strict=True)
    ]


def test_timm_passes_the_options_of_a_backbone_on() -> None:
    backbone = timm.create_model(
        "repmlpnet_digits", features_only=True, out_indices=(-1,), downsample="conv5", rank=1, pad=False, in_chans=1
    )
    assert backbone.feature_info.channels() == [64]
    assert backbone.model.embeds[0].conv.kernel_size == (5, 5)
    assert backbone.model.embeds[0].expand.out_channels == 64
    with pytest.raises(ValueError, match="does not fit a network whose partitions are made for 16x16"):
        backbone(torch.zeros(1, 1, 20, 16))


def test_the_named_modules_are_those_whose_output_the_maps_are() -> None:
    model, x, seen = network(), random_tensor(2, 3, 16, 16), {}
    for info in model.feature_info:
        module = model.get_submodule(info["module"])
        module.register_forward_hook(lambda _m, _i, out, stride=info["reduction"]: seen.update({stride: out}))
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [m.shape[1] for m in maps] == CHANNELS
    assert list(seen) == STRIDES
    assert all(torch.equal(found, seen[s]) for found, s in zip(maps, STRIDES, strict=True))


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (17, 16), (1, 31), (33, 40)])
def test_any_image_size_by_zeros_to_the_right_and_below(size: tuple[int, int]) -> None:
    height, width = size
    image = random_tensor(2, 3, height, width)
    padded = torch.zeros(2, 3, -(-height // 16) * 16, -(-width // 16) * 16, dtype=torch.float64)
    padded[..., :height, :width] = image
    expected = stages_by_hand(network(), padded)
    found = dense_backbone(network())(image)
    for level, whole, stride in zip(found, expected, STRIDES, strict=True):
        h, w = -(-height // stride), -(-width // stride)
        assert level.shape[2:] == (h, w)
        assert torch.equal(level, whole[..., :h, :w])


def test_locality_injection_of_a_backbone() -> None:
    backbone, x = dense_backbone(network(), downsample="conv3"), random_tensor(2, 3, 20, 30)
    for before, after in zip(backbone(x), to_deploy(backbone)(x), strict=True):
        assert largest_difference(before, after) < 1e-13


@pytest.mark.parametrize("downsample", DOWNSAMPLINGS)
def test_a_replaced_embedding_starts_as_it_was(downsample: str) -> None:
    x = random_tensor(2, 3, 32, 48)
    expected, found = (dense_backbone(network(), downsample=d)(x) for d in (None, downsample))
    for before, after in zip(expected, found, strict=True):
        assert largest_difference(before, after) < 1e-13


def embedding(inputs: int = 6, outputs: int = 10) -> ConvNorm:
    conv = nn.Conv2d(inputs, outputs, 2, stride=2, bias=False)
    return randomised(ConvNorm(conv, nn.ReLU())).eval()


def as_one_kernel(downsampling: Downsampling) -> Tensor:
    """Returns the kernel (O, I, k, k) that equals the two convolutions of a `Downsampling`."""
    (outputs, rank, k, _), inputs = downsampling.conv.weight.shape, downsampling.expand.in_channels
    taps = downsampling.conv.weight.view(outputs, rank, 1, k, k)
    return (downsampling.expand.weight.view(outputs, rank, inputs, 1, 1) * taps).sum(1).detach()


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_start_is_the_best_approximation_of_its_rank(kernel_size: int, rank: int) -> None:
    old = embedding()
    weight = old.conv.weight.detach()
    kernel = as_one_kernel(Downsampling(old, kernel_size, rank))
    first = kernel_size // 2
    inner = kernel[..., first : first + 2, first : first + 2]
    assert float((kernel.abs().sum() - inner.abs().sum()).abs()) == pytest.approx(0, abs=1e-12)
    # Eckart and Young: what is left of each output channel is its smaller singular values.
    left = (weight - inner).flatten(1).norm(dim=1)
    smaller = torch.linalg.svdvals(weight.flatten(2))[:, rank:].norm(dim=1)
    assert left.numpy() == pytest.approx(smaller.numpy(), abs=1e-12)
    assert rank == 4 or float(left.min()) > 0.01


@pytest.mark.parametrize("inputs", [1, 2, 3])
def test_few_input_channels_leave_ranks_unused(inputs: int) -> None:
    old, x = embedding(inputs), random_tensor(2, inputs, 6, 8)
    assert largest_difference(old(x), Downsampling(old, 3, 4).eval()(x)) < 1e-13


def test_a_replaced_embedding_learns_to_look_across_its_patches() -> None:
    old, x = embedding(), random_tensor(2, 6, 8, 8)
    new = Downsampling(deepcopy(old), 3, 4)
    new(x).square().sum().backward()
    assert new.conv.weight.grad[:, :, 0, 0].abs().max() > 1e-6  # the tap above and to the left of the patch
    assert new.expand.weight.grad.abs().max() > 1e-6


def test_a_replaced_embedding_keeps_dtype_and_shapes_on_the_meta_device() -> None:
    with torch.device("meta"):
        backbone = dense_backbone(create_model("RepMLPNet-D256"), downsample="conv3", rank=1).bfloat16()
    weights = backbone.state_dict()
    assert weights["model.embeds.0.expand.weight"].shape == (160, 80, 1, 1)
    assert weights["model.embeds.0.conv.weight"].shape == (160, 1, 3, 3)
    assert {w.dtype for k, w in weights.items() if "embeds" in k and "tracked" not in k} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_indices": (0, 4)}, "this RepMLPNet has the levels 0 to 3"),
        ({"downsample": "conv4"}, "unknown downsample 'conv4': choose conv3 or conv5, or None"),
        ({"downsample": "conv3", "rank": 5}, "rank of 1 to 4, not 5"),
        ({"downsample": "conv3", "rank": 0}, "rank of 1 to 4, not 0"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dense_backbone(network(), **options)


def test_a_network_without_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="a Linear has no maps of several levels"):
        dense_backbone(nn.Linear(2, 2))


@pytest.mark.parametrize(("asked", "taken"), [((1, 0), [0, 1]), ((-1, 0), [0, 3]), (2, [2, 3]), ([2], [2])], ids=str)
def test_levels_come_in_the_order_of_the_network(asked: int | tuple[int, ...], taken: list[int]) -> None:
    backbone, x = dense_backbone(network(), out_indices=asked), random_tensor(1, 3, 17, 16)
    maps = backbone(x)
    assert backbone.feature_info.channels() == [CHANNELS[i] for i in taken]
    assert [m.shape[1:] for m in maps] == [(CHANNELS[i], -(-17 // STRIDES[i]), 16 // STRIDES[i]) for i in taken]


def test_an_image_that_is_too_large_for_the_global_perceptrons_is_refused() -> None:
    spec = RepMLPResNetSpec("light", (0, 2, 4, 0), (1, 2, 2, 1), 2, (64, 96), (8, 16, 32, 64), (1, 2, 2, 1))
    backbone = dense_backbone(RepMLPResNet(spec))
    with pytest.raises(ValueError, match="an image of 65x96 is larger than the 64x96 that the backbone is made for"):
        backbone(torch.zeros(1, 3, 65, 96))


def test_levels_are_counted_from_the_end_as_far_as_there_are_any():
    count = len(network().feature_info)
    assert dense_backbone(network(), out_indices=(-count,)).out_indices == [0]
    with pytest.raises(ValueError, match="has the levels 0 to"):
        dense_backbone(network(), out_indices=(-count - 1,))
