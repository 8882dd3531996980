"""Every architecture of every family: built, run forward and back, converted, counted, written and read again."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from model_helpers import largest_difference, random_tensor, randomised, small_options
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import PureMLP, create_model, default_image_size, list_models
from models.build import FAMILIES, REGISTRY, classifier_name
from models.checkpoints import build_from, describe, is_deploy, read_checkpoint
from models.files import write_checkpoint
from models.reparam import is_reparameterizable, to_deploy

EXACT = 1e-12
every_architecture = pytest.mark.parametrize("arch", list_models())
# With a head of a thousand outputs, of the training and of the deploy form. `test_network.py` and others compare
# them with the papers, which round.
PARAMETERS = {
    "RepMLPNet-T224": (38_293_608, 38_331_720),
    "RepMLPNet-B224": (68_242_712, 68_332_664),
    "RepMLPNet-T256": (58_687_848, 58_739_400),
    "RepMLPNet-B256": (96_447_512, 96_568_184),
    "RepMLPNet-D256": (86_887_648, 86_985_280),
    "RepMLPNet-L256": (117_641_560, 117_820_600),
    "RepMLPNet-C100": (8_539_944, 8_560_680),
    "RepMLPNet-Digits": (205_464, 205_848),
    "RepMLPNet-Shapes": (972_720, 976_176),
    "ResMLP-S12-224": (15_351_040, 15_350_872),
    "ResMLP-S24-224": (30_021_016, 30_020_680),
    "ResMLP-B24-P16-224": (115_737_112, 115_736_776),
    "ResMLP-B24-P8-224": (129_138_616, 129_138_280),
    "ResMLP-C100": (7_375_760, 7_375_592),
    "ResMLP-Shapes": (660_800, 660_744),
    "RepMLP-Res50-light-224": (87_038_248, 86_142_440),
    "RepMLP-Res50-bottleneck-224": (41_071_144, 40_871_528),
    "PureMLP-C10": (22_909_208, 22_441_016),
    "WideConvNet-C10": (566_344, 565_320),
    "RepMLP-Res50-g8-8-320": (72_450_600, 72_023_144),
    "RepMLP-Res50-g8-16-320": (59_543_080, 59_223_144),
    "RepMLP-Res50-g4-8-320": (87_939_624, 87_383_144),
    "FaceResNet": (31_882_488, 31_866_600),
    "RepMLP-FaceRes": (66_632_440, 65_805_544),
    "MobileFaceNet": (1_445_688, 1_434_024),
}


def small(arch: str, **options: object) -> nn.Module:
    """Returns an architecture at a size that is quick, in float64, with every parameter and statistic random."""
    return randomised(create_model(arch, num_classes=5, **small_options(arch) | options))


def test_the_families_share_no_name() -> None:
    assert list_models() == [name for family in FAMILIES for name in family.specs]
    assert len(set(list_models())) == len(list_models())


@every_architecture
def test_the_published_size(arch: str) -> None:
    with torch.device("meta"):
        model, deploy = create_model(arch, 7), create_model(arch, 7, deploy=True)
        images = torch.empty(2, 3, *default_image_size(arch))
    assert isinstance(model, REGISTRY[arch].network)
    assert model.spec == REGISTRY[arch].specs[arch]
    assert model.get_classifier() is model.get_submodule(classifier_name(arch))
    assert model.img_size == default_image_size(arch) == deploy.img_size
    assert is_reparameterizable(model)
    assert not is_reparameterizable(deploy)
    assert model(images).shape == deploy(images).shape == (2, 7)


@pytest.mark.parametrize("arch", PARAMETERS)
def test_all_parameters_are_counted(arch: str) -> None:
    family = REGISTRY[arch]
    with torch.device("meta"):
        by_name = create_model(arch), create_model(arch, deploy=True)
        by_class = family.network(family.specs[arch]), family.network(family.specs[arch], deploy=True)
    for networks in (by_name, by_class):
        assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == PARAMETERS[arch]


@every_architecture
def test_forward_and_backward(arch: str) -> None:
    residual = not issubclass(REGISTRY[arch].network, PureMLP)  # which has nothing that could be dropped
    model = small(arch, drop_path_rate=0.1 if residual else 0.0).train()
    images = random_tensor(4, 3, *model.img_size)
    loss = F.cross_entropy(model(images), torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(model.get_classifier().weight.grad.abs().sum(1) > 0)


@every_architecture
def test_injection(arch: str) -> None:
    model = small(arch).eval()
    images = random_tensor(2, 3, *model.img_size)
    with torch.no_grad():
        expected, deploy = model(images), to_deploy(model)
        actual = deploy(images)
    assert largest_difference(expected, actual) < EXACT
    assert largest_difference(expected[:1], expected[1:]) > 1e-3
    built = create_model(arch, num_classes=5, deploy=True, **small_options(arch))
    assert [(k, v.shape) for k, v in deploy.state_dict().items()] == [
        (k, v.shape) for k, v in built.state_dict().items()
    ]
    assert [name for name, _ in deploy.named_modules()] == [name for name, _ in built.named_modules()]


def operations(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


@every_architecture
def test_conversion_saves_the_operations_of_the_branches(arch: str) -> None:
    with torch.device("meta"):
        model, deploy = (create_model(arch, deploy=deploy).eval() for deploy in (False, True))
        images = torch.empty(1, 3, *default_image_size(arch))
    saved = operations(model, images) - operations(deploy, images)  # BatchNorms are not counted
    assert saved > 0 if any(".repconv" in name for name, _ in model.named_modules()) else saved == 0


@pytest.mark.parametrize("form", ["train", "deploy"])
@every_architecture
def test_saving_and_loading(arch: str, form: str, tmp_path: Path) -> None:
    model = small(arch, in_chans=4).float().eval()
    model = to_deploy(model) if form == "deploy" else model
    write_checkpoint(
        tmp_path / "a.pth", {"model": model.state_dict(), "meta": describe(arch, model, model.img_size, form)}
    )
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert is_deploy(arch, checkpoint.form) == (form == "deploy")
    network = build_from(checkpoint)
    assert (network.arch, network.num_classes, network.image_size) == (arch, 5, model.img_size)
    images = random_tensor(1, 4, *model.img_size).float()
    with torch.no_grad():
        assert torch.equal(network.model(images), model(images))
