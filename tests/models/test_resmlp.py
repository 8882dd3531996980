"""ResMLP: timm's network with local branches, whose weights come from and go to timm's."""

from pathlib import Path

import pytest
import timm
import torch
from model_helpers import largest_difference, random_tensor, randomised
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.build import structure_changes
from models.checkpoints import build_from, describe, load_pretrained, read_checkpoint
from models.files import write_checkpoint
from models.locality import LocalityLinear, branch_names
from models.reparam import to_deploy
from models.resmlp import SPECS, ResMLP, ResMLPSpec

EXACT = 1e-12
ARCH = "ResMLP-Shapes"
TINY = ResMLPSpec(16, 4, width=12, depth=2)
OF_TIMM = {
    "ResMLP-S12-224": "resmlp_12_224",
    "ResMLP-S24-224": "resmlp_24_224",
    "ResMLP-B24-P8-224": "resmlp_big_24_224",
}


def tiny(seed: int = 0, **options: object) -> ResMLP:
    return randomised(ResMLP(TINY, num_classes=5, **options), seed).eval()


@pytest.mark.parametrize("arch", OF_TIMM)
def test_without_branches_it_is_timms(arch: str) -> None:
    with torch.device("meta"):
        expected = timm.create_model(OF_TIMM[arch])
        models = create_model(arch, deploy=True), create_model(arch, branches=[]), to_deploy(create_model(arch))
    shapes = [(name, value.shape) for name, value in expected.state_dict().items()]
    for model in models:
        assert [(name, value.shape) for name, value in model.state_dict().items()] == shapes
    spec = SPECS[arch]
    assert (spec.width, spec.depth, spec.branches) == (expected.embed_dim, len(expected.blocks), (1, 3))


@pytest.mark.parametrize(
    ("arch", "params", "operations"),
    [
        ("ResMLP-S12-224", 15.4, 3.0),
        ("ResMLP-S24-224", 30.0, 6.0),
        ("ResMLP-B24-P16-224", 115.7, 23.0),  # of Table 2 of the RepMLPNet paper
        ("ResMLP-B24-P8-224", 129.1, 100.2),
    ],
)
def test_parameters_in_millions_and_multiply_adds_in_billions(arch: str, params: float, operations: float) -> None:
    with torch.device("meta"):
        model = create_model(arch, deploy=True).eval()
        images = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.05)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert counter.get_total_flops() / 2 / 1e9 == pytest.approx(operations, abs=0.05)


@pytest.mark.parametrize("arch", OF_TIMM)
def test_fresh_weights_are_those_of_timm(arch: str) -> None:
    torch.manual_seed(0)
    expected = timm.create_model(OF_TIMM[arch], num_classes=4, img_size=32).eval()
    torch.manual_seed(0)
    model = create_model(arch, 4, img_size=32, layer_scale=expected.blocks[0].ls1[0].item()).eval()
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())
    images = torch.randn(2, 3, 32, 32)
    plain = create_model(arch, 4, img_size=32, branches=[]).eval()
    plain.load_state_dict(expected.state_dict())
    assert torch.equal(expected.forward_features(images), plain.forward_features(images))


@pytest.mark.parametrize("size", [16, (8, 20)])
def test_injection_of_a_whole_network(size: int | tuple[int, int]) -> None:
    model = tiny(img_size=size, in_chans=2)
    height, width = model.img_size
    images = random_tensor(3, 2, height, width)
    expected = model(images)
    assert model.blocks[0].linear_tokens.size == (height // 4, width // 4)
    built = ResMLP(TINY, num_classes=5, img_size=size, in_chans=2, deploy=True).double().eval()
    built.load_state_dict(to_deploy(model).state_dict())
    model.locality_injection()
    for network in (model, built):
        assert largest_difference(expected, network(images)) < EXACT


def test_branches_are_chosen_by_name_and_remembered() -> None:
    model = create_model(ARCH, 4, branches=[3, 5])
    layers = [module for module in model.modules() if isinstance(module, LocalityLinear)]
    assert [layer.branches for layer in layers] == [(3, 5)] * 4
    assert structure_changes(ARCH, model) == {"branches": [3, 5]}


def test_checkpointing_changes_memory_alone() -> None:
    plain, thrifty = (tiny().train() for _ in range(2))
    thrifty.set_grad_checkpointing()
    images = random_tensor(4, 3, 16, 16)
    for model in (plain, thrifty):
        model(images).square().sum().backward()
    expected, actual = dict(plain.named_parameters()), dict(thrifty.named_parameters())
    assert all(torch.equal(p.grad, actual[name].grad) for name, p in expected.items())
    buffers = dict(thrifty.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in plain.named_buffers())
    assert buffers["blocks.0.linear_tokens.repconv3.bn.num_batches_tracked"] == 1


def test_every_parameter_learns() -> None:
    model = tiny().train()
    model(random_tensor(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_what_does_not_decay() -> None:
    model = tiny()
    names = model.no_weight_decay()
    assert names == {f"{norm}.{leaf}" for norm in affine_names(2) for leaf in ("alpha", "beta")}
    assert names < {name for name, _ in model.named_parameters()}


def affine_names(depth: int) -> list[str]:
    return [*(f"blocks.{i}.norm{j}" for i in range(depth) for j in (1, 2)), "norm"]


@pytest.mark.parametrize("size", [18, (16, 6), 0])
def test_an_image_size_off_the_patch_is_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive multiple of the patch size 4"):
        ResMLP(TINY, img_size=size)


@pytest.mark.parametrize("size", [(32, 32), (16, 12)])
def test_an_input_of_another_size_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"input of {size[0]}x{size[1]} does not fit a network made for 16x16"):
        tiny()(random_tensor(1, 3, *size))


def test_features_and_head() -> None:
    model = tiny()
    images = random_tensor(2, 3, 16, 16)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert (features.shape, pooled.shape, model.num_features) == ((2, 16, 12), (2, 12), 12)
    assert torch.equal(model.get_classifier()(pooled), model(images))
    model.reset_classifier(0)
    assert torch.equal(pooled, model(images))


# Checkpoints


def test_weights_of_timm_are_evaluated_with_its_logits(tmp_path: Path) -> None:
    original = randomised(timm.create_model("resmlp_12_224", num_classes=7)).float().eval()
    torch.save(original.state_dict(), tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.form is None
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for arch in ("ResMLP-S12-224", None):  # it is recognised, too
        network = build_from(checkpoint, arch)
        assert (network.arch, network.num_classes) == ("ResMLP-S12-224", 7)
        assert torch.equal(original(images), network.model(images))
    with pytest.raises(ValueError, match="nothing to convert: this ResMLP has no blocks with local branches"):
        to_deploy(network.model)


def test_training_starts_from_weights_of_timm_and_answers_as_they_do(tmp_path: Path) -> None:
    original = randomised(timm.create_model("resmlp_12_224", num_classes=7, img_size=32)).float().eval()
    torch.save(original.state_dict(), tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    model = create_model("ResMLP-S12-224", 7, img_size=32).eval()
    branches = branch_names(model)
    assert len(branches) == 12 * 2 * 6
    assert load_pretrained("ResMLP-S12-224", model, checkpoint) == branches
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(original(images), model(images))

    other = create_model("ResMLP-S12-224", 3, img_size=32)
    assert load_pretrained("ResMLP-S12-224", other, checkpoint) == ["head.weight", "head.bias", *branches]


def test_branches_are_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    state = randomised(create_model(ARCH, 4)).float().state_dict()
    torch.save(state, tmp_path / "whole.pth")
    model = create_model(ARCH, 4)
    assert load_pretrained(ARCH, model, read_checkpoint(tmp_path / "whole.pth")) == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    del state["blocks.0.linear_tokens.repconv1.conv.weight"]
    torch.save(state, tmp_path / "holey.pth")
    with pytest.raises(ValueError, match=r"1 tensors missing \(blocks\.0\.linear_tokens\.repconv1\.conv\.weight\)"):
        load_pretrained(ARCH, create_model(ARCH, 4), read_checkpoint(tmp_path / "holey.pth"))


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_the_metadata_tells_the_form_where_the_names_do_not(form: str, tmp_path: Path) -> None:
    trained = randomised(create_model(ARCH, 4)).eval()
    network: nn.Module = trained if form == "train" else to_deploy(trained)
    write_checkpoint(
        tmp_path / "a.pth", {"model": network.state_dict(), "meta": describe(ARCH, network, (32, 32), form)}
    )
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    assert read_checkpoint(tmp_path / "a.pth").form == form
    assert read_checkpoint(tmp_path / "bare.pth").form == ("train" if form == "train" else None)
    images = random_tensor(2, 3, 32, 32)
    for name in ("a.pth", "bare.pth"):
        assert torch.equal(network(images), build_from(read_checkpoint(tmp_path / name)).model(images))


def test_a_file_may_name_an_architecture_as_it_was_once_called(tmp_path: Path) -> None:
    structure = {"width": 8, "depth": 1}
    model = randomised(create_model("ResMLP-B24-P8-224", 4, **structure)).eval()
    meta = describe("ResMLP-B24-P8-224", model, (224, 224), "train") | {"arch": "ResMLP-B24-224"}
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta})
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    network = build_from(checkpoint)
    assert (checkpoint.meta["arch"], network.arch, network.model.spec.patch_size) == (*("ResMLP-B24-P8-224",) * 2, 8)
    images = random_tensor(1, 3, 224, 224)
    assert torch.equal(network.model(images), model(images))


def test_weights_of_another_size_name_the_one_that_fits(tmp_path: Path) -> None:
    torch.save(create_model(ARCH, 4, deploy=True).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"does not fit .*\. These are weights of {ARCH} with 4 classes"):
        build_from(read_checkpoint(tmp_path / "a.pth"), "ResMLP-C100")
