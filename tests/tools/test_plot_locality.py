"""`tools.plot_locality`: the values of the picture are the answers of the block to single points."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from models import RepMLPBlock
from models.layers import PartitionBlock
from models.locality import LocalityLinear
from models.reparam import randomize_statistics
from models.repmlp_resnet import RepMLP
from tools.plot_locality import Locality, draw, locality, log_magnitudes

H, W = 5, 6
BLOCKS = {
    "RepMLPNet": (partial(RepMLPBlock, 2, H, W, share_sets=2, gp_reduction=None), 2, 1),
    "RepMLP-Res50": (partial(RepMLP, 4, (H, W), H, W, groups=2), 4, 2),
    "a linear layer": (lambda: LocalityLinear(nn.Linear(H * W, H * W), (H, W), (1, 3), scale=1.0), 1, 1),
}


def answers(block, channels, channel, point, output_channel, fc_alone):
    """What a block's output at a point answers to a one at each point (H, W) of an input channel."""
    ones = torch.zeros(H * W, channels, H * W, dtype=torch.float64)
    ones[:, channel] = torch.eye(H * W)
    inputs = torch.cat((ones, torch.zeros_like(ones[:1])))
    if isinstance(block, PartitionBlock):
        maps = inputs.view(-1, channels, H, W)
        out = block(maps)
        if fc_alone:
            out = block.fc3(maps)
            out = block.fc3_bn(out.reshape(len(out), -1, 1, 1) if isinstance(block, RepMLP) else out).view_as(maps)
    else:
        out = (nn.functional.linear(inputs, block.weight, block.bias) if fc_alone else block(inputs)).view(-1, 1, H, W)
    out = out[:, output_channel, *point]
    return (out[:-1] - out[-1]).view(H, W)


def test_a_convolution_in_place_of_the_fc_is_refused():
    with pytest.raises(ValueError, match="a convolution in place of FC3"):
        locality(RepMLP(4, (8, 8), 8, 8, 2, (1, 3), fc3_as_conv=9))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("point", [None, (0, 5)], ids=str)
@torch.no_grad()
def test_values_are_the_answers_of_the_block_before_and_after(kind, point):
    build, channels, inputs = BLOCKS[kind]
    torch.manual_seed(0)
    block = build().eval()
    randomize_statistics(block)
    last, group = channels - 1, channels - inputs  # the last output channel, whose group begins here
    shown = locality(block, point, output_channel=last, input_channel=inputs - 1)
    assert shown.point == (point or (H // 2, W // 2))
    assert shown.kernel_size == (5 if kind == "RepMLP-Res50" else 3)
    assert shown.kernel == (f"share-set {last}" if inputs == 1 else "output channel 3, input channel 1 of its group")
    block = block.double()
    for fc_alone, values in ((True, shown.before), (False, shown.after)):
        expected = answers(block, channels, group + inputs - 1, shown.point, last, fc_alone)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shown.before[~shown.within], shown.after[~shown.within], rtol=0, atol=0)
    assert (shown.before[shown.within] != shown.after[shown.within]).all()


def test_points_within_the_kernel_and_large_ones_outside():
    values = torch.tensor([[1.0, -9.0, 5.0, -7.0], [2.0, 3.0, 4.0, 6.0], [0.0, 1.0, 1.0, 1.0]])
    shown = Locality(values, values, (0, 1), 3, "share-set 0")
    assert shown.within.tolist() == [[True, True, True, False]] * 2 + [[False] * 4]
    assert shown.marked(values).nonzero().tolist() == [[0, 3], [1, 3]]  # the median within is 3


def test_colours_are_natural_logarithms_over_the_smallest_magnitude():
    values = torch.tensor([1 / math.e, -1.0, math.e, 0.0], dtype=torch.float64)
    torch.testing.assert_close(log_magnitudes(values), torch.tensor([0.0, 1.0, 2.0, 0.0], dtype=torch.float64))
    for useless in (torch.zeros(3), torch.tensor([1.0, torch.nan])):
        with pytest.raises(ValueError, match="zero or not finite"):
            log_magnitudes(useless)


def test_the_picture_is_small_also_where_nothing_is_outside():
    pytest.importorskip("matplotlib")
    for size in (3, 12):
        values = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        assert draw(Locality(values, values, (1, 1), 5, "share-set 0"), "title").startswith(b"\x89PNG")


def test_a_picture_of_a_training_is_written(trained, call, tmp_path):
    pytest.importorskip("matplotlib")
    path, weights = tmp_path / "locality.png", trained.folder / "best_ckpt.pth"
    status, out, err = call("tools/plot_locality.py", weights, path, "--block", "stages.1", "--point", 0, 3)
    assert (status, err) == (0, "")
    assert out == f"stages.1.0.repmlp_block of RepMLPNet-Digits, training weights from {weights} -> {path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block", "stages.7"], "--block stages.7 has no local branches: choose one of stages.0.0.repmlp_block, "),
        (["--point", 8, 0], "--point Y is 8: the block has 8, give 0 to 7"),
        (["--output-channel", 4], "--output-channel is 4: the block has 4, give 0 to 3"),
        (["--input-channel", -1], "--input-channel is -1: the block has 1, give 0 to 0"),
    ],
    ids=str,
)
def test_what_is_not_there_is_refused(flags, message, trained, call, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "locality.png"
    status, _, err = call("tools/plot_locality.py", trained.folder / "best_ckpt.pth", path, *flags)
    assert status == 2
    assert message in err
    assert not path.exists()


def test_weights_that_are_injected_and_other_formats_are_refused(deployed, call, tmp_path):
    pytest.importorskip("matplotlib")
    for name, message in (("a.png", "has no local branches to inject"), ("a.jpg", "must end in .png")):
        status, _, err = call("tools/plot_locality.py", deployed, tmp_path / name)
        assert status == 2
        assert message in err
    assert list(tmp_path.iterdir()) == []
