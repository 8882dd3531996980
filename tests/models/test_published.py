"""The names and arguments of the published module and of MMPretrain: they build this project's own networks."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_helpers import TINY, largest_difference, random_tensor, randomised
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import repmlpnet
from models import SPECS, RepMLPBlock, RepMLPNet, create_model, fuse_bn, get_model
from models.checkpoints import describe
from models.files import write_checkpoint
from models.published import MMPRETRAIN, PUBLISHED

EXACT = 1e-12
ARCH = "RepMLPNet-Digits"
# How the network of `model_helpers` is called elsewhere.
TINY_PUBLISHED = {
    "num_class": 5,
    "patch_size": (2, 2),
    "num_blocks": (1, 2),
    "channels": (16, 32),
    "hs": (8, 4),
    "ws": (8, 4),
    "sharesets_nums": (2, 4),
    "reparam_conv_k": (1, 3),
    "globalperceptron_reduce": 2,
}
TINY_MMPRETRAIN = {
    "arch": {"channels": [16, 32], "depths": [1, 2], "sharesets_nums": [2, 4]},
    "img_size": 16,
    "patch_size": 2,
    "out_indices": (1,),
    "reparam_conv_kernels": (1, 3),
    "globalperceptron_ratio": 2,
}


def test_the_module_of_a_clone_gives_what_the_installed_package_gives() -> None:
    assert set(repmlpnet.__all__) == {*models.__all__, "inference_model"}
    assert all(getattr(repmlpnet, name) is getattr(models, name) for name in models.__all__)
    names = {"RepMLPBlock", "RepMLPNet", "fuse_bn", "get_RepMLPNet_model", "get_model"}
    names |= {f"create_RepMLPNet_{size}" for size in ("T224", "B224", "T256", "B256", "D256", "L256")}
    assert names <= set(models.__all__)


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("arch", PUBLISHED)
def test_the_published_constructors(arch: str, deploy: bool) -> None:
    create = getattr(repmlpnet, f"create_{arch.replace('-', '_')}")
    with torch.device("meta"):
        model, same = create(deploy), repmlpnet.get_RepMLPNet_model(arch, deploy=deploy)
    assert isinstance(model, RepMLPNet)
    assert model.spec == same.spec == models.SPECS[arch]
    assert (model.num_classes, model.stages[0][0].repmlp_block.deploy) == (1000, deploy)
    assert isinstance(model.stages[0][0].repmlp_block, repmlpnet.RepMLPBlock)


def test_other_names_are_not_published() -> None:
    with pytest.raises(ValueError, match="'RepMLPNet-Digits' is none of RepMLPNet-T224, "):
        repmlpnet.get_RepMLPNet_model(ARCH)


BLOCK_CALLS = {
    "published": ((), {"in_channels": 8, "out_channels": 8, "h": 4, "w": 3, "reparam_conv_k": (1, 3)}, "num_sharesets"),
    "published, by position": ((8, 8, 4, 3, (1, 3), 4), {}, "num_sharesets"),
    "MMPretrain": (
        (),
        {"channels": 8, "path_h": 4, "path_w": 3, "reparam_conv_kernels": (1, 3), "globalperceptron_ratio": 4},
        "num_sharesets",
    ),
    "MMPretrain, by position": ((8, 4, 3, (1, 3)), {"globalperceptron_ratio": 4}, "num_sharesets"),
    "own": ((8, 4, 3), {"branches": (1, 3)}, "share_sets"),
}


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("call", BLOCK_CALLS)
def test_a_block_by_every_signature(call: str, deploy: bool) -> None:
    args, kwargs, share_sets = BLOCK_CALLS[call]
    block = RepMLPBlock(*args, **kwargs, **{share_sets: 2}, deploy=deploy)
    expected = RepMLPBlock(8, 4, 3, share_sets=2, branches=(1, 3), gp_reduction=4, deploy=deploy)
    assert type(block) is RepMLPBlock
    assert (block.h, block.w, block.share_sets, block.branches) == (4, 3, 2, expected.branches)
    x = random_tensor(2, 8, 8, 3)
    assert torch.equal(randomised(block).eval()(x), randomised(expected).eval()(x))


def test_the_defaults_are_those_of_the_signature() -> None:
    assert RepMLPBlock(8, 4, 4).branches == (1, 3)
    assert RepMLPBlock(8, 8, 4, 4).branches == ()
    assert RepMLPBlock(in_channels=8, out_channels=8, h=4, w=4).branches == ()
    assert RepMLPBlock(channels=8, path_h=4, path_w=4).branches == ()
    with torch.device("meta"):
        published, base = RepMLPNet(), RepMLPNet("base")
    assert published.spec.channels == (192, 384, 768, 1536)
    assert (published.spec.share_sets, published.spec.branches) == ((4, 8, 16, 32), (3,))
    assert published.img_size == (256, 256)
    assert (base.spec.channels, base.spec.branches, base.img_size) == ((96, 192, 384, 768), (3,), (224, 224))


def test_a_published_network() -> None:
    model = RepMLPNet(3, **TINY_PUBLISHED)
    assert type(model) is RepMLPNet
    assert model.spec == replace(TINY, image_size=(16, 16))
    assert not model.grad_checkpointing
    assert RepMLPNet(**TINY_PUBLISHED, use_checkpoint=True).grad_checkpointing
    expected, x = randomised(RepMLPNet(TINY, num_classes=5)).eval(), random_tensor(2, 3, 16, 16)
    assert torch.equal(randomised(model).eval()(x), expected(x))
    expected.locality_injection()
    deploy = RepMLPNet(**TINY_PUBLISHED, deploy=True).double().eval()
    deploy.load_state_dict(expected.state_dict())
    assert torch.equal(deploy(x), expected(x))


def test_a_backbone_of_mmpretrain() -> None:
    backbone, expected = RepMLPNet(**TINY_MMPRETRAIN), RepMLPNet(TINY, num_classes=0, global_pool="")
    x = random_tensor(2, 3, 16, 16)
    features = randomised(backbone).eval()(x)
    assert features.shape == (2, 32, 4, 4)
    assert torch.equal(features, randomised(expected).eval()(x))
    backbone.switch_to_deploy()
    assert backbone.stages[1][1].repmlp_block.deploy
    assert largest_difference(features, backbone(x)) < EXACT


def test_the_backbone_on_the_page_of_mmpretrain() -> None:
    with torch.device("meta"):
        backbone = RepMLPNet(arch="B", img_size=224, reparam_conv_kernels=(1, 3))
        backbone.switch_to_deploy()
        assert backbone(torch.rand(1, 3, 224, 224)).shape == (1, 768, 7, 7)
    assert backbone.spec == replace(models.SPECS["RepMLPNet-B224"], image_size=(224, 224))
    assert all(unit.repmlp_block.deploy for stage in backbone.stages for unit in stage)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shareset": 2, "h": 4}, "RepMLPBlock has no argument num_shareset: it takes .channels, h, w, share_sets"),
        ({"in_channels": 8, "channels": 8, "h": 4, "w": 4}, "no RepMLPBlock takes these arguments together: it takes"),
        ({"in_channels": 8, "h": 4, "w": 4}, r"RepMLP's \(in_channels, out_channels, h, w, reparam_conv_k"),
        ({"channels": 8, "h": 4, "w": 4, "num_sharesets": 2}, r"MMPretrain's \(channels, path_h, path_w, reparam_conv"),
    ],
)
def test_a_block_names_the_arguments_that_it_knows(arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        RepMLPBlock(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hs": (8, 8)}, r"half as large as those before: not hs=\(8, 8\)"),
        ({"ws": (8,)}, "need one number for each stage"),
        ({"patch_size": (2, 4)}, "patches are square, not 2x4"),
        ({"reparam_conv_k": (2,)}, "odd kernel sizes"),
    ],
)
def test_published_networks_that_there_are_not(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepMLPNet(**TINY_PUBLISHED | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "small"}, "arch is 'b', 'base' or a dict of channels, depths, sharesets_nums, not 'small'"),
        ({"arch": {"channels": [16, 32]}}, "arch is 'b', 'base' or a dict"),
        ({"out_indices": (0, 1)}, r"out_indices \(0, 1\): a RepMLPNet returns the map of its last stage, 1"),
    ],
)
def test_backbones_of_mmpretrain_that_there_are_not(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RepMLPNet(**TINY_MMPRETRAIN | arguments)


def test_contradictions_and_strangers() -> None:
    with pytest.raises(ValueError, match="keeps its channels: in_channels 8, out_channels 16"):
        RepMLPBlock(8, 16, 4, 4)
    with pytest.raises(TypeError, match="RepMLPNet has no argument norm_cfg: it takes .spec, num_classes, "):
        RepMLPNet(**TINY_MMPRETRAIN, norm_cfg={"type": "BN"})


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(4, 6, 3), nn.Conv2d(8, 6, 1, groups=2)])
def test_fuse_bn(layer: nn.Conv2d) -> None:
    bn = nn.BatchNorm2d(6)
    both = randomised(nn.Sequential(layer, bn)).eval()
    x = random_tensor(2, layer.in_channels, 5, 5)
    weight, bias = fuse_bn(layer, bn)
    assert largest_difference(both(x), nn.functional.conv2d(x, weight, bias, groups=layer.groups)) < EXACT


def test_fuse_bn_of_a_share_set_fc() -> None:
    block = randomised(RepMLPBlock(8, 3, 4, share_sets=2, branches=())).eval()
    weight, bias = fuse_bn(block.fc3, block.fc3_bn)
    expected = block.get_equivalent_fc3()
    assert largest_difference(expected[0], weight) < EXACT
    assert largest_difference(expected[1], bias) < EXACT


@pytest.mark.parametrize(
    ("name", "arch", "parameters", "multiply_adds"),
    [
        ("repmlp-base_3rdparty_8xb64_in1k", "RepMLPNet-B224", 68.24, 6.71),
        ("repmlp-base_3rdparty_8xb64_in1k-256px", "RepMLPNet-B256", 96.45, 9.69),
    ],
)
def test_the_counts_of_mmpretrain(name: str, arch: str, parameters: float, multiply_adds: float) -> None:
    assert MMPRETRAIN[name] == arch
    with torch.device("meta"):
        model = get_model(name, device="meta")
        images = torch.rand(1, 3, *models.default_image_size(arch))
    assert model.spec == models.SPECS[arch]
    assert not model.training
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters
    with FlopCounterMode(display=False) as counter:
        assert model(images).shape == (1, 1000)
    # MMPretrain also counts BatchNorm, pooling and the like.
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, rel=0.01)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_get_model_loads_weights_and_remembers_their_data_set(form: str, tmp_path: Path) -> None:
    trained = create_model(ARCH, num_classes=6, deploy=form == "deploy").eval()
    meta = describe(ARCH, trained, trained.img_size, form, dataset="digits")
    write_checkpoint(tmp_path / "a.pth", {"model": trained.state_dict(), "meta": meta})
    model = get_model(ARCH, pretrained=str(tmp_path / "a.pth"))
    images = torch.randn(2, 3, 16, 16)
    assert not model.training
    assert (model.dataset, trained.dataset) == ("digits", None)
    assert torch.equal(trained(images), model(images))
    (features,) = model.extract_feat(images)
    assert torch.equal(model.head(features), model(images))
    assert model.backbone is model
    model.backbone.switch_to_deploy()
    assert model.stages[0][0].repmlp_block.deploy
    assert torch.allclose(trained(images), model(images), rtol=1e-4, atol=1e-5)


def test_get_model_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is downloaded: .* of RepMLPNet-B224, pretrained=PATH"):
        get_model("repmlp-base_3rdparty_8xb64_in1k", pretrained=True)
    with pytest.raises(ValueError, match="unknown model 'resnet50'; known are repmlp-base_3rdparty_8xb64_in1k, "):
        get_model("resnet50")
    with pytest.raises(ValueError, match="no checkpoint at"):
        get_model(ARCH, pretrained=tmp_path / "none.pth")


def test_a_block_of_mmpretrain_by_position() -> None:
    block = RepMLPBlock(8, 3, 4, (1, 3))
    assert (block.h, block.w, block.branches) == (3, 4, (1, 3))
    with pytest.raises(TypeError, match="no RepMLPBlock takes these arguments together"):
        RepMLPBlock(8, 8, 8, None, "4", None)


def test_the_published_dictionary() -> None:
    assert list(repmlpnet.model_map) == list(PUBLISHED)
    with torch.device("meta"):
        assert all(build().spec == SPECS[name] for name, build in repmlpnet.model_map.items())
