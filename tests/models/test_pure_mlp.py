"""The pure MLP for CIFAR-10 and its convolutional counterpart: published counts, ablations, conversion, options."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import largest_difference, random_tensor, randomised
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import PureMLP, PureMLPSpec, create_model
from models.build import structure_changes
from models.checkpoints import build_from, describe, read_checkpoint
from models.files import write_checkpoint
from models.layers import GroupedFC, PartitionConv
from models.pure_mlp import MIXERS, SPECS
from models.reparam import to_deploy

EXACT = 1e-12
CONVOLUTION: dict[str, Any] = {"branches": [], "global_perceptron": False}
# Of the paper's Table 1, as changes of the pure MLP.
ABLATIONS: dict[str, dict[str, Any]] = {
    "without Local": {"branches": []},
    "without Global": {"global_perceptron": False},
    "FC3 as conv9": {"mixer": "fc3_as_conv9"},
    "RepMLP as conv9": {"mixer": "conv9", **CONVOLUTION},
}
# Maps of 8x16 and 4x8, partitions of 4x4.
TINY = PureMLPSpec((8, 16), channels=(4, 6), blocks=(2, 1), partition=4, branches=(1, 3))


def tiny(mixer: str = "repmlp", seed: int = 0, **options: Any) -> PureMLP:
    changes = CONVOLUTION if MIXERS[mixer][1] else {}
    spec = PureMLPSpec(**(vars(TINY) | {"mixer": mixer} | {k: tuple(v) if v == [] else v for k, v in changes.items()}))
    return randomised(PureMLP(spec, num_classes=5, **options), seed).eval()


def counts(arch: str, deploy: bool, **changes: Any) -> tuple[float, float]:
    """Returns parameters and multiply-adds of a network for CIFAR-10, in millions."""
    with torch.device("meta"):
        model = create_model(arch, 10, deploy=deploy, **changes).eval()
        images = torch.empty(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2 / 1e6


@pytest.mark.parametrize(("arch", "published"), [("PureMLP-C10", 52.8), ("WideConvNet-C10", 65.1)])
def test_the_published_multiply_adds(arch: str, published: float) -> None:
    assert counts(arch, deploy=True)[1] == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize(
    ("arch", "changes", "trained", "converted"),
    [
        ("PureMLP-C10", {}, (22.845, 118.867), (22.377, 52.806)),
        ("PureMLP-C10", ABLATIONS["without Local"], (22.391, 52.806), (22.377, 52.806)),
        ("PureMLP-C10", ABLATIONS["without Global"], (22.515, 118.539), (22.047, 52.479)),
        ("PureMLP-C10", ABLATIONS["FC3 as conv9"], (1.232, 132.236), (0.778, 66.176)),
        ("PureMLP-C10", ABLATIONS["RepMLP as conv9"], (0.885, 129.549), (0.884, 129.549)),
        ("WideConvNet-C10", {}, (0.439, 65.111), (0.438, 65.111)),  # the paper gives 0.50 million parameters
    ],
)
def test_parameters_and_multiply_adds_in_millions(
    arch: str, changes: dict[str, Any], trained: tuple[float, float], converted: tuple[float, float]
) -> None:
    assert counts(arch, deploy=False, **changes) == pytest.approx(trained, abs=0.0006)
    assert counts(arch, deploy=True, **changes) == pytest.approx(converted, abs=0.0006)


def test_the_arrangement_of_the_paper() -> None:
    with torch.device("meta"):
        model = create_model("PureMLP-C10")
        maps = model.forward_intermediates(torch.empty(2, 3, 32, 32), intermediates_only=True)
    assert [tuple(m.shape) for m in maps] == [(2, 32, 32, 32), (2, 64, 16, 16), (2, 64, 8, 8)]
    assert [(info["num_chs"], info["reduction"]) for info in model.feature_info] == [(32, 1), (64, 2), (64, 4)]
    mixers = [block.mixer for stage in (1, 2, 3) for block in model.get_submodule(f"stage{stage}")]
    assert [(m.channels, m.h, m.w, m.fc3.groups, m.fc1_fc2 is None) for m in mixers] == [
        *[(16, 8, 8, 2, False)] * 2,
        *[(32, 8, 8, 2, False)] * 2,
        *[(64, 8, 8, 2, True)] * 2,  # one partition is the map
    ]


def normalised(layer: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)


def test_the_counterpart_is_a_plain_convolutional_network() -> None:
    model = tiny("conv3")
    images = random_tensor(2, 3, 8, 16)
    state = model.state_dict()

    def layer(x: Tensor, conv: str, bn: str, padding: int) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], padding=padding)
        return normalised(model.get_submodule(bn), x).relu()

    x = layer(images, "stem.conv", "stem.bn", 0)
    for name in ("stage1.0", "stage1.1", "stage2.0"):
        if name == "stage2.0":
            x = F.max_pool2d(x, 2)
        x = layer(x, f"{name}.mixer.fc3", f"{name}.mixer.fc3_bn", 1)
        x = layer(x, f"{name}.fc.conv", f"{name}.fc.bn", 0)
    expected = F.linear(x.mean((2, 3)), state["head.weight"], state["head.bias"])
    assert largest_difference(expected, model(images)) < EXACT


@pytest.mark.parametrize("mixer", MIXERS)
def test_conversion(mixer: str) -> None:
    model, images = tiny(mixer), random_tensor(2, 3, 8, 16)
    deploy = to_deploy(model)
    built = tiny(mixer, seed=1, deploy=True)
    built.load_state_dict(deploy.state_dict())
    with torch.no_grad():
        for converted in (deploy, built):
            assert largest_difference(model(images), converted(images)) < EXACT
    fc3 = PartitionConv if mixer != "repmlp" else GroupedFC
    assert all(isinstance(block.mixer.fc3, fc3) for block in deploy.stage1)
    assert not [module for module in deploy.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_equivalent_fc3_is_what_conversion_leaves(mixer: str) -> None:
    block = tiny(mixer).stage1[0].mixer
    weight, bias = block.get_equivalent_fc3()
    block.local_inject()
    torch.testing.assert_close((weight, bias), (block.fc3.weight, block.fc3.bias), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations_are_saved_and_read_again(changes: dict[str, Any], form: str, tmp_path: Path) -> None:
    options = {"channels": [4, 8, 8], "partition": 2} | changes
    model = randomised(create_model("PureMLP-C10", 3, img_size=16, deploy=form == "deploy", **options)).eval()
    assert structure_changes("PureMLP-C10", model) == options
    meta = describe("PureMLP-C10", model, (16, 16), form)
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta})
    network = build_from(read_checkpoint(tmp_path / "a.pth"))
    images = random_tensor(2, 3, 16, 16)
    assert network.image_size == (16, 16)
    assert torch.equal(network.model(images), model(images))


@pytest.mark.parametrize("arch", SPECS)
@pytest.mark.parametrize("form", ["train", "deploy"])
def test_bare_weights_are_recognised(arch: str, form: str, tmp_path: Path) -> None:
    size = 64 if arch == "PureMLP-C10" else 32  # convolutions do not show the size
    model = create_model(arch, 7, in_chans=2, img_size=size, deploy=form == "deploy").eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    network = build_from(checkpoint, arch)
    assert (checkpoint.form, network.image_size, network.model.in_chans) == (form, (size, size), 2)
    images = torch.randn(1, 2, size, size)
    assert torch.equal(network.model(images), model(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "conv5"}, r"unknown mixer 'conv5': choose repmlp, fc3_as_conv9, conv9, conv3"),
        ({"mixer": "conv3"}, r"set branches to \[\] and global_perceptron to False"),
        ({"mixer": "conv9", "branches": []}, r"set branches to \[\] and global_perceptron to False"),
        ({"mixer": "fc3_as_conv9", "branches": [11]}, r"branches \(11,\) do not fit into a 9x9 kernel"),
        ({"blocks": [2, 2]}, r"not channels \(16, 32, 64\), blocks \(2, 2\)"),
        ({"blocks": [2, 2, 0]}, r"not channels \(16, 32, 64\), blocks \(2, 2, 0\)"),
        ({"drop_path_rate": 0.1}, r"no residual branches to drop: drop_path_rate must be 0, not 0\.1"),
        ({"img_size": (32, 48)}, r"img_size 32x48 must be a positive multiple of 32"),
        ({"img_size": 0}, r"img_size 0x0 must be a positive multiple of 32"),
    ],
)
def test_what_can_not_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("PureMLP-C10", **changes)


def test_an_input_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an input of 16x16 does not fit a network made for 8x16: resize it to 8x16"):
        tiny()(random_tensor(1, 3, 16, 16))
