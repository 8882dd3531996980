"""What users of timm expect of a model, of every architecture: registration, configuration, head, parameter groups."""

import re
import sys

import pytest
import timm
import torch
from model_helpers import largest_difference, random_tensor, randomised, small_options
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import models
from data.datasets import DATASETS
from models import list_models
from models.build import REGISTRY, structure_changes, timm_name
from models.fusion import fuse_batch_norms
from models.reparam import to_deploy
from models.stages import StagedNetwork

every_architecture = pytest.mark.parametrize("arch", list_models())
STAGED = [arch for arch in list_models() if issubclass(REGISTRY[arch].network, StagedNetwork)]


def small(arch: str, **options: object) -> nn.Module:
    """Returns an architecture at a size that is quick, built by timm, in float64 with every parameter random."""
    return randomised(timm.create_model(timm_name(arch), **small_options(arch) | {"num_classes": 10} | options))


# Registration and configuration


@every_architecture
def test_every_row_has_its_function_and_its_configuration(arch: str) -> None:
    module, name = sys.modules[REGISTRY[arch].network.__module__], timm_name(arch)
    function = getattr(module, name, None)
    assert function is not None, f"{arch} is a row of SPECS in {module.__file__}, which has no function {name} for timm"
    assert name in module.default_cfgs, f"{arch} is a row of SPECS in {module.__file__}; default_cfgs has no {name}"
    assert timm.models.model_entrypoint(name) is function, f"{name} is not registered: decorate it with register_model"
    with torch.device("meta"):
        assert function(num_classes=3).spec == REGISTRY[arch].specs[arch]


def test_every_function_belongs_to_a_row() -> None:
    modules = {REGISTRY[arch].network.__module__ for arch in list_models()}
    registered = {name for module in modules for name in timm.list_models(module=module.rpartition(".")[2])}
    configured = {name for module in modules for name in sys.modules[module].default_cfgs}
    assert registered == configured == {timm_name(arch) for arch in list_models()}
    assert set(timm.list_models("repmlpnet*")) == {timm_name(arch) for arch in models.SPECS}


@every_architecture
def test_the_configuration_describes_the_network(arch: str) -> None:
    with torch.device("meta"):
        network = timm.create_model(timm_name(arch))
    cfg = timm.get_pretrained_cfg(timm_name(arch))
    assert cfg.to_dict() == network.pretrained_cfg == network.default_cfg
    assert cfg.input_size == (network.in_chans, *network.img_size)
    assert network.num_classes == cfg.num_classes == network.get_submodule(cfg.classifier).out_features
    assert network.get_submodule(cfg.classifier) is network.get_classifier()
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert network.get_submodule(cfg.first_conv) is first
    assert cfg.fixed_input_size
    assert cfg.license == "mit"
    assert not cfg.has_weights
    assert re.match(r"https://github\.com/\w+/\w+$", cfg.origin_url)
    assert re.match(r"arXiv:\d{4}\.\d{5}$", cfg.paper_ids)


@every_architecture
def test_the_data_configuration_is_that_of_the_architecture(arch: str) -> None:
    with torch.device("meta"):
        by_timm, by_name = timm.create_model(timm_name(arch)), models.create_model(arch)
    cfg = timm.data.resolve_model_data_config(by_timm)
    assert cfg == timm.data.resolve_model_data_config(by_name)
    assert cfg["input_size"] == (3, *by_timm.img_size)
    by_suffix = {"C10": "cf10", "C100": "cf100", "Digits": "digits", "Shapes": "shapes"}
    dataset = None if "Face" in arch else by_suffix.get(arch.split("-")[-1], "imagenet")
    expected = (DATASETS[dataset].mean, DATASETS[dataset].std) if dataset else ((0.5,) * 3, (0.5,) * 3)
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == tuple(map(tuple, expected))


@every_architecture
def test_there_are_no_pretrained_weights(arch: str) -> None:
    for create in (timm.create_model, models.create_model):
        with pytest.raises(ValueError, match=f"^{arch} comes without weights: pretrained=True has nothing to load$"):
            create(timm_name(arch), pretrained=True)


@every_architecture
def test_timm_and_we_build_the_same(arch: str) -> None:
    torch.manual_seed(0)
    by_timm = timm.create_model(timm_name(arch), num_classes=3, **small_options(arch))
    torch.manual_seed(0)
    by_name = models.create_model(arch, 3, **small_options(arch))
    expected = by_name.state_dict()
    assert list(by_timm.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in by_timm.state_dict().items())


# The head


@every_architecture
def test_without_pooling_every_position_is_classified(arch: str) -> None:
    pooled, model = small(arch).eval(), small(arch, drop_rate=0.2, global_pool="").eval()
    images = random_tensor(2, 3, *model.img_size)
    features, logits = model.forward_features(images), model(images)
    axes = (2, 3) if arch in STAGED else (1,)
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    n, *positions = features.shape
    assert logits.shape == ((n, 10, *positions[1:]) if arch in STAGED else (n, positions[0], 10))
    # The head is linear.
    assert largest_difference(pooled(images), logits.mean(axes)) < 1e-12
    assert largest_difference(logits, to_deploy(model)(images)) < 1e-12


@every_architecture
def test_the_head_is_replaced(arch: str) -> None:
    model = small(arch)
    images = random_tensor(2, 3, *model.img_size)
    features = model.forward_features(images)
    model.reset_classifier(7)
    assert (model.num_classes, model.global_pool, model(images).shape) == (7, "avg", (2, 7))
    model.reset_classifier(0, "")
    assert (model.num_classes, model.global_pool, model(images).shape) == (0, "", features.shape)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(4, "avg")
    assert (model.num_classes, model.global_pool, model(images).shape) == (4, "avg", (2, 4))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.eval().reset_classifier(4)
    assert not any(module.training for module in model.modules())


@every_architecture
def test_an_unknown_pooling_is_refused(arch: str) -> None:
    with pytest.raises(ValueError, match="unknown global_pool 'max': choose 'avg', or '' for no pooling"):
        small(arch, global_pool="max")


@every_architecture
def test_dropout_acts_before_the_head_in_training_alone(arch: str) -> None:
    plain, model = small(arch), small(arch, drop_rate=0.5)
    images = random_tensor(2, 3, *model.img_size)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert structure_changes(arch, model) == structure_changes(arch, plain)
    torch.manual_seed(0)
    features = model.train().forward_head(torch.ones_like(plain.eval().forward_features(images)), pre_logits=True)
    assert features.unique().tolist() == [0, 2]
    assert torch.equal(plain(images), model.eval()(images))


@pytest.mark.parametrize("arch", STAGED)
def test_no_dropout_is_no_operation(arch: str) -> None:
    model = small(arch).train()
    graph = torch.export.export(model, (random_tensor(2, 3, *model.img_size),)).graph
    assert not [node for node in graph.nodes if "dropout" in str(node.target)]


def test_a_fused_network_is_pooled_as_the_network_is() -> None:
    for arch in models.SPECS:
        for options in ({"global_pool": ""}, {"global_pool": "", "num_classes": 0}, {"drop_rate": 0.5}):
            model = small(arch, **options).eval()
            height, width = model.img_size
            images = random_tensor(2, 3, 2 * height, width)
            assert largest_difference(model(images), fuse_batch_norms(model)(images)) < 1e-12


# Parameters


def depths(model: nn.Module, coarse: bool = False) -> dict[str, int]:
    return group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)


@every_architecture
def test_every_parameter_has_its_depth(arch: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(timm_name(arch))
    fine, coarse = depths(model), depths(model, coarse=True)
    head = timm.get_pretrained_cfg(timm_name(arch)).classifier
    stages = len(model.feature_info) if arch in STAGED else model.spec.depth
    assert set(fine.values()) == set(range(model.spec.depth + 2))  # the stem, the blocks, the head
    assert set(coarse.values()) == set(range(stages + 2))
    assert fine.keys() == coarse.keys() == {name for name, _ in model.named_parameters()}
    for found in (fine, coarse):
        last = max(found.values())
        assert {name for name, depth in found.items() if depth == last} == {f"{head}.{leaf}" for leaf in leaves(model)}
        assert found[f"{timm.get_pretrained_cfg(timm_name(arch)).first_conv}.weight"] == 0


def leaves(model: nn.Module) -> list[str]:
    return [name for name, _ in model.get_classifier().named_parameters()]


@every_architecture
def test_depth_is_the_number_of_the_first_block_that_a_parameter_acts_on(arch: str) -> None:
    model, found = small(arch), depths(small(arch))
    pattern = r"stages\.\d+\.\d+|stage[1-9]\.\d+|blocks\.\d+"
    outputs: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if re.fullmatch(pattern, name):
            module.register_forward_hook(lambda _, __, out: outputs.append(out))
    model(random_tensor(2, 3, *model.img_size))
    assert len(outputs) == model.spec.depth
    for depth, out in enumerate(outputs, 1):
        model.zero_grad()
        out.sum().backward(retain_graph=True)
        reached = {name for name, p in model.named_parameters() if p.grad is not None}
        final_norm = {name for name in found if name.startswith(("head_norm.", "norm."))}
        assert reached == {name for name in found if found[name] <= depth} - final_norm


@every_architecture
def test_learning_rates_decay_by_layers(arch: str) -> None:
    model = small(arch)
    groups = param_groups_layer_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    assert sorted({group["lr_scale"] for group in groups}) == [0.5**i for i in range(model.spec.depth + 2)][::-1]
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scales) == len(list(model.parameters()))
    assert all(scales[p] == 1 for p in model.get_classifier().parameters())
    decays = {p: group["weight_decay"] for group in groups for p in group["params"]}
    exempt = {name for name, p in model.named_parameters() if decays[p] == 0}
    assert exempt == {name for name, p in model.named_parameters() if p.ndim <= 1} | model.no_weight_decay()


@every_architecture
def test_checkpointing_changes_no_gradient(arch: str) -> None:
    plain, model = small(arch).train(), small(arch).train()
    model.set_grad_checkpointing()
    images = random_tensor(2, 3, *model.img_size)
    for network in (plain, model):
        network(images).square().sum().backward()
    assert model.grad_checkpointing
    assert all(
        largest_difference(a.grad, b.grad) < 1e-12 for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )
