"""Finding architectures: by name, through timm, through torch.hub, and from the installed package."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import timm
import torch
from model_helpers import TINY, largest_difference, random_tensor
from torch import nn

import models
from models import SPECS, RepMLPNet, create_model, default_image_size, list_models
from models.build import REGISTRY, changeable, classifier_name, first_conv_name, structure_changes
from models.checkpoints import describe
from models.files import write_checkpoint

ROOT = Path(models.__file__).parents[1]


def timm_name(arch: str) -> str:
    return arch.lower().replace("-", "_")


def test_list_models() -> None:
    sizes = ("T224", "B224", "T256", "B256", "D256", "L256", "C100", "Digits")
    assert {f"RepMLPNet-{size}" for size in sizes} <= set(list_models())
    assert [name for name in list_models() if name.startswith("RepMLPNet-")] == list(SPECS)
    assert {f"RepMLP-Res50-{style}-224" for style in ("light", "bottleneck")} <= set(list_models())


def test_the_structure_can_be_changed_and_described() -> None:
    changes = {"branches": [3], "share_sets": [2, 8], "global_perceptron": False}
    model = create_model("RepMLPNet-Digits", num_classes=4, **changes)
    block = model.stages[1][0].repmlp_block
    assert (block.branches, block.share_sets, block.gp) == ((3,), 8, None)
    assert structure_changes("RepMLPNet-Digits", model) == changes
    assert structure_changes("RepMLPNet-Digits", create_model("RepMLPNet-Digits")) == {}
    assert structure_changes("resnet18", create_model("resnet18")) == {}


def test_a_structure_with_a_number_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one number for each stage, not .*'share_sets': \(4,\)"):
        create_model("RepMLPNet-Digits", share_sets=[4])


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("RepMLPNet-T223", "RepMLPNet-T224"),
        ("repmlpnet-l256", "RepMLPNet-L256"),
        ("RepMLPNet_D256", "repmlpnet_d256"),
        ("RepMLP-B256", "RepMLPNet-B256"),
        ("resnet1O1", "resnet101"),
        ("ResMLP-B24-224", "ResMLP-B24-P16-224 or ResMLP-B24-P8-224"),
        ("resmlp_b24_224", "ResMLP-B24-P16-224 or ResMLP-B24-P8-224"),
    ],
)
def test_an_unknown_name_suggests_the_closest(name: str, suggestion: str) -> None:
    for ask in (create_model, default_image_size):
        with pytest.raises(ValueError, match="did you mean") as error:
            ask(name)
        assert str(error.value) == f"unknown architecture {name!r}; did you mean {suggestion}?"


def test_a_name_like_no_other_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown architecture '#'; known are RepMLPNet-T224, .* and timm's"):
        create_model("#")


@pytest.mark.parametrize("arch", ["resnet18", "mixer_s32_224"])
def test_timm_architectures(arch: str) -> None:
    torch.manual_seed(0)
    model = create_model(arch, num_classes=4).eval()
    torch.manual_seed(0)
    expected = timm.create_model(arch, num_classes=4).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model(images), expected(images))
    assert default_image_size(arch) == (224, 224)


def test_the_image_size_reaches_the_timm_architectures_that_have_one() -> None:
    images = torch.randn(2, 3, 64, 64)
    assert create_model("mixer_s32_224", num_classes=4, img_size=(64, 64))(images).shape == (2, 4)
    assert create_model("resnet18", num_classes=4, img_size=(64, 64))(images).shape == (2, 4)


def test_a_timm_architecture_has_no_deploy_form() -> None:
    with pytest.raises(ValueError, match="resnet18 has no deploy form"):
        create_model("resnet18", deploy=True)


@pytest.mark.parametrize("arch", ["RepMLPNet-Digits", "RepMLP-Res50-light-224", "resnet18", "mixer_s32_224"])
def test_classifier_name(arch: str) -> None:
    with torch.device("meta"):
        model = create_model(arch, num_classes=4)
    head = model.get_submodule(classifier_name(arch))
    assert isinstance(head, nn.Linear)
    assert head is model.get_classifier()
    assert head.out_features == 4


@pytest.mark.parametrize("arch", list_models())
def test_timm_knows_every_architecture(arch: str) -> None:
    assert timm.is_model(timm_name(arch))
    assert timm_name(arch) in timm.list_models(f"{timm_name(arch)}*")
    with torch.device("meta"):
        model = timm.create_model(timm_name(arch), num_classes=7)
        expected = create_model(arch, num_classes=7)
    shapes = {name: value.shape for name, value in expected.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


def test_timm_passes_options_on() -> None:
    with torch.device("meta"):
        model = timm.create_model(
            "repmlpnet_t224", num_classes=7, in_chans=1, img_size=(64, 96), drop_path_rate=0.1, deploy=True
        )
    assert (model.num_classes, model.in_chans, model.img_size) == (7, 1, (64, 96))
    assert model.stages[0][0].repmlp_block.deploy
    assert model.stages[-1][-1].drop_path.drop_prob == pytest.approx(0.1)


def test_create_model_takes_the_timm_name_too() -> None:
    with torch.device("meta"):
        assert isinstance(create_model("repmlpnet_digits", num_classes=3), RepMLPNet)


def test_pretrained_weights_of_timm_are_refused() -> None:
    with pytest.raises(ValueError, match="RepMLPNet-T224 comes without weights"):
        timm.create_model("repmlpnet_t224", pretrained=True)


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="image_size"):
        create_model("RepMLPNet-Digits", image_size=32)


@pytest.mark.parametrize("arch", list_models())
def test_torch_hub_builds_every_architecture(arch: str) -> None:
    with torch.device("meta"):
        model = torch.hub.load(str(ROOT), timm_name(arch), source="local", trust_repo=True, num_classes=3)
    assert isinstance(model, REGISTRY[arch].network)
    assert model.num_classes == 3
    assert model.img_size == default_image_size(arch)


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_torch_hub_loads_a_checkpoint(form: str, tmp_path: Path) -> None:
    trained = create_model("RepMLPNet-Digits", num_classes=6, deploy=form == "deploy").eval()
    meta = describe("RepMLPNet-Digits", trained, trained.img_size, form)
    write_checkpoint(tmp_path / "a.pth", {"model": trained.state_dict(), "meta": meta})
    path = str(tmp_path / "a.pth")
    model = torch.hub.load(str(ROOT), "load_checkpoint", source="local", trust_repo=True, path=path)
    images = torch.randn(2, 3, 16, 16)
    assert not model.training
    assert torch.equal(trained(images), model(images))


# Run with the package alone in sight: builds, injects, writes, reads, and lets timm find it.
USE = """
import json, sys, timm, torch, repmlpnet
from repmlpnet.checkpoints import build_from, describe, read_checkpoint
from repmlpnet.files import write_checkpoint
from repmlpnet.reparam import injection_error, to_deploy
torch.manual_seed(0)
model = timm.create_model("repmlpnet_digits", num_classes=4)
deploy = to_deploy(model)
meta = describe("RepMLPNet-Digits", deploy, deploy.img_size, "deploy")
write_checkpoint("deploy.safetensors", {"model": deploy.state_dict(), "meta": meta})
network = build_from(read_checkpoint("deploy.safetensors"))
by_others = repmlpnet.RepMLPNet(num_class=4, hs=(4, 2), ws=(4, 2), channels=(8, 16), num_blocks=(1, 1),
                                sharesets_nums=(2, 4))
print(json.dumps({
    "public": repmlpnet.__all__,
    "by_others": type(by_others) is repmlpnet.RepMLPNet and by_others.img_size == (16, 16),
    "names": repmlpnet.list_models(),
    "file": repmlpnet.__file__,
    "module": type(model).__module__,
    "logits": network.model(torch.ones(1, 3, 16, 16)).tolist(),
    "error": injection_error(model, torch.ones(1, 3, 16, 16), randomize=True),
    "strangers": [name for name in ("models", "utils", "configs", "data", "engine", "yacs")
                  if name in sys.modules],
}))
"""


def use_package(site: Path, folder: Path) -> dict:
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_package(site: Path, folder: Path) -> None:
    seen = use_package(site, folder)
    torch.manual_seed(0)
    model = create_model("RepMLPNet-Digits", num_classes=4)
    model.eval().locality_injection()
    assert seen["names"] == list_models()
    assert seen["public"] == models.__all__
    assert seen["by_others"]
    assert Path(seen["file"]).is_relative_to(site)
    assert seen["module"] == "repmlpnet.repmlpnet"
    assert largest_difference(model(torch.ones(1, 3, 16, 16)), torch.tensor(seen["logits"])) < 1e-6
    assert seen["error"] < 1e-13
    assert seen["strangers"] == []


def test_the_folder_is_a_package_under_any_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "models", tmp_path / "site" / "repmlpnet", ignore=shutil.ignore_patterns("__pycache__"))
    check_package(tmp_path / "site", tmp_path / "elsewhere")


def setuptools_version() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


@pytest.mark.skipif(setuptools_version() < 77, reason="needs setuptools 77 or newer to build a package")
def test_pip_installs_the_package(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(ROOT / "models", source / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "repmlpnet.py"):  # the module of that name stays in the clone
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("stands for the long one")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    installed = {path.name for path in site.iterdir()}
    assert installed == {"repmlpnet", f"repmlpnet-{models.__version__}.dist-info"}
    assert (site / "repmlpnet" / "py.typed").is_file()
    check_package(site, tmp_path / "elsewhere")


def test_the_public_names_are_there() -> None:
    assert all(hasattr(models, name) for name in models.__all__)
    assert models.RepMLPNet(TINY, num_classes=2)(random_tensor(1, 3, 16, 16).float().expand(2, -1, -1, -1)).shape == (
        2,
        2,
    )


def test_the_parts_of_an_unknown_architecture_are_not_asked_for() -> None:
    with pytest.raises(ValueError, match=r"'RepMLPNet-Shape'; did you mean RepMLPNet-Shapes\?"):
        changeable("RepMLPNet-Shape")


@pytest.mark.parametrize("name", [*list_models(), "resnet18", "mixer_b16_224"])
def test_every_architecture_takes_images_of_other_channels(name):
    """Only the first convolution changes; `first_conv_name` finds it."""
    with torch.device("meta"):
        shapes = {n: {k: v.shape for k, v in create_model(name, in_chans=n).state_dict().items()} for n in (1, 3, 4)}
    first = f"{first_conv_name(name)}.weight"
    for channels in (1, 4):
        other = [key for key in shapes[3] if shapes[3][key] != shapes[channels][key]]
        assert other == [first]
        assert (shapes[channels][first][1], shapes[3][first][1]) == (channels, 3)
