"""MobileFaceNet: its layers and counts against its paper, the bottleneck, conversion, sizes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_helpers import largest_difference, random_tensor, randomised
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import MobileFaceNet, MobileFaceNetSpec, create_model
from models.checkpoints import build_from, describe, read_checkpoint
from models.files import write_checkpoint
from models.layers import ConvNorm
from models.mobilefacenet import SPECS, Bottleneck
from models.reparam import is_reparameterizable, to_deploy

EXACT = 1e-12
TINY = MobileFaceNetSpec((32, 48), 4, (4, 6, 6), (2, 1, 2), features=8)
# Table 1 of the paper, from an image of 112 x 112: channels and side of the map behind the stem, the depth-wise
# convolution and each row of bottlenecks, of which those of one size are one stage here.
TABLE = [(64, 56), (64, 56), (64, 28), (128, 14), (128, 7)]
BOTTLENECKS = [[(64, 128, 64, 2)] + [(64, 128, 64, 1)] * 4]
BOTTLENECKS += [[(64, 256, 128, 2)] + [(128, 256, 128, 1)] * 6]
BOTTLENECKS += [[(128, 512, 128, 2)] + [(128, 256, 128, 1)] * 2]


def test_the_layers_are_those_of_the_papers_table() -> None:
    with torch.device("meta"):
        model, x = create_model("MobileFaceNet", 128, img_size=112).eval(), torch.empty(1, 3, 112, 112)
    maps = []
    for layer in (*model.stage0, model.stage1, model.stage2, model.stage3):
        x = layer(x)
        maps.append((x.shape[1], x.shape[2]))
    assert maps == TABLE
    for stage, rows in enumerate(BOTTLENECKS, 1):
        blocks = model.get_submodule(f"stage{stage}")
        found = [
            (b.conv1.conv.in_channels, b.conv2.conv.groups, b.conv3.conv.out_channels, b.conv2.conv.stride[0])
            for b in blocks
        ]
        assert found == rows
    expand, spread = model.head_norm
    assert (expand.conv.in_channels, expand.conv.out_channels) == (128, 512)
    assert (spread.conv.groups, spread.conv.kernel_size) == (512, (7, 7))
    assert model.head_norm(x).shape == (1, 512, 1, 1)
    assert model.get_classifier().weight.shape == (128, 512)
    linear = [m for m in model.modules() if isinstance(m, ConvNorm) and not hasattr(m, "act")]
    assert linear == [block.conv3 for stage in (1, 2, 3) for block in model.get_submodule(f"stage{stage}")] + [spread]


def test_the_counts_are_those_of_the_paper() -> None:
    """0.99 million parameters, and 221 million multiply-adds as arXiv:1908.09124 states for it."""
    with torch.device("meta"):
        model, image = create_model("MobileFaceNet", 128, deploy=True, img_size=112), torch.empty(1, 3, 112, 112)
    assert sum(p.numel() for p in model.parameters()) == 993_344
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    assert counter.get_total_flops() / 2e6 == pytest.approx(221, abs=0.5)


def defined(unit: ConvNorm, x: Tensor, stride: int, padding: int) -> Tensor:
    """Convolution, BatchNorm and activation by their definitions."""
    groups = x.shape[1] // unit.conv.weight.shape[1]
    x = F.conv2d(x, unit.conv.weight, None, stride, padding, groups=groups)
    x = F.batch_norm(x, unit.bn.running_mean, unit.bn.running_var, unit.bn.weight, unit.bn.bias)
    return F.prelu(x, unit.act.weight) if hasattr(unit, "act") else x


@pytest.mark.parametrize(("channels", "stride", "shortcut"), [(4, 1, True), (4, 2, False), (6, 1, False)])
def test_a_bottleneck_by_its_definition(channels: int, stride: int, shortcut: bool) -> None:
    block = randomised(Bottleneck(4, channels, 8, stride, 0.0, deploy=False)).eval()
    x = random_tensor(2, 4, 6, 8)
    out = defined(block.conv3, defined(block.conv2, defined(block.conv1, x, 1, 0), stride, 1), 1, 0)
    assert largest_difference(x + out if shortcut else out, block(x)) < EXACT


def test_conversion_folds_every_batch_norm_and_is_exact() -> None:
    model = randomised(MobileFaceNet(TINY, 5)).eval()
    images = random_tensor(3, 3, 32, 48)
    deploy = to_deploy(model)
    assert largest_difference(model(images), deploy(images)) < EXACT
    assert not is_reparameterizable(deploy)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in deploy.modules())


def test_sizes_and_stages_that_can_not_be_are_refused() -> None:
    with pytest.raises(ValueError, match="img_size 32x40 must be a positive multiple of 16"):
        MobileFaceNet(TINY, img_size=(32, 40))
    with pytest.raises(ValueError, match="an input of 48x32 does not fit a network made for 32x48"):
        MobileFaceNet(TINY)(torch.zeros(1, 3, 48, 32))
    with pytest.raises(ValueError, match="a MobileFaceNet has three stages"):
        MobileFaceNetSpec(96, blocks=(1, 2))
    with pytest.raises(ValueError, match="at least one channel and block"):
        MobileFaceNetSpec(96, blocks=(1, 0, 2))


def test_the_maps_of_the_stages() -> None:
    model = randomised(MobileFaceNet(TINY, 5)).eval()
    images = random_tensor(1, 3, 32, 48)
    final, maps = model.forward_intermediates(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(4, 8, 12), (6, 4, 6), (6, 2, 3)]
    assert torch.equal(final, model.forward_features(images))
    model.prune_intermediate_layers(1)
    assert not hasattr(model, "stage4")


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_the_image_size_is_read_off_the_weights(form: str, tmp_path: Path) -> None:
    options = {"img_size": (64, 48), "blocks": [1, 1, 1], "stem": 8, "channels": [8, 16, 16], "features": 32}
    model = create_model("MobileFaceNet", 3, deploy=form == "deploy", in_chans=1, **options).eval()
    meta = describe("MobileFaceNet", model, (96, 96), form)
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta})
    network = build_from(read_checkpoint(tmp_path / "a.pth"))
    assert network.image_size == network.model.img_size == (64, 48)
    images = torch.randn(1, 1, 64, 48)
    with torch.no_grad():
        assert torch.equal(network.model(images), model(images))


def test_the_spec_of_the_paper() -> None:
    assert SPECS["MobileFaceNet"].depth == 15
    assert SPECS["MobileFaceNet"].image_size == 96
