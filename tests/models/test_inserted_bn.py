"""A BatchNorm behind the FC3 of a converted network: inserted, counted by every conversion, recognised, calibrated."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import largest_difference, random_tensor, randomised, small_options, tiny_network
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import RepMLP, RepMLPBlock, add_local_branches, create_model, list_models
from models.build import changeable, structure_changes
from models.checkpoints import build_from, describe, load_pretrained, read_checkpoint
from models.files import write_checkpoint
from models.fusion import fuse_batch_norms
from models.identify import fitting_architectures, form_of
from models.inserted_bn import calibrate, inserted_norms
from models.layers import PartitionBlock
from models.reparam import injection_error, is_reparameterizable, to_deploy

EXACT = 1e-12
ARCH = "RepMLPNet-Digits"
# FaceResNet is a RepMLP-ResNet without RepMLP, so without FC3.
TAKES_IT = [arch for arch in list_models() if "insert_bn" in changeable(arch) and arch != "FaceResNet"]
examples = settings(deadline=None, derandomize=True, max_examples=60)

repmlpnets = st.builds(
    lambda h, w, sets, gate: RepMLPBlock(8, h, w, share_sets=sets, gp_reduction=2 if gate else None),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    sets=st.sampled_from((1, 2, 4, 8)),
    gate=st.booleans(),
)
repmlps = st.builds(
    lambda h, w, groups, parts: RepMLP(4, (2 * h, parts * w), h, w, groups, (1, 3)),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    groups=st.sampled_from((1, 2, 4)),
    parts=st.integers(1, 2),
)
any_block = st.one_of(repmlpnets, repmlps)


def images_for(block: PartitionBlock, n: int = 3, seed: int = 0) -> Tensor:
    """Maps of a size that the block takes: of 2x2 partitions, or what the Global Perceptron is made for."""
    if isinstance(block, RepMLP) and block.fc1_fc2 is not None:
        across = block.fc1_fc2.fc1.in_features // (2 * block.channels)
        return random_tensor(n, block.channels, 2 * block.h, across * block.w, seed=seed)
    return random_tensor(n, getattr(block, "channels", 8), 2 * block.h, 2 * block.w, seed=seed)


def hand_made(block: PartitionBlock) -> None:
    """Puts a BatchNorm behind FC3 as a user does who knows nothing of `insert_bn`."""
    block.fc3_bn = nn.BatchNorm2d(block.norm_channels()).train(block.training)


# A block


@examples
@given(block=any_block, by_hand=st.booleans(), seed=st.integers(0, 99))
@torch.no_grad()
def test_a_trained_batch_norm_is_counted_exactly(block: PartitionBlock, by_hand: bool, seed: int) -> None:
    randomised(block, seed).eval().local_inject()
    (hand_made if by_hand else PartitionBlock.insert_bn)(block)
    randomised(block, seed + 1).eval()
    x = images_for(block, seed=seed)
    expected = block(x)
    assert not block.deploy
    kernel, bias = block.get_equivalent_fc3()
    for name in ("local_inject", "local_inject", "switch_to_deploy", "reparameterize"):
        getattr(block, name)()
        assert block.deploy
        assert isinstance(block.fc3_bn, nn.Identity)
        assert largest_difference(expected, block(x)) < EXACT
    assert largest_difference(block.fc3.weight, kernel) < EXACT
    assert largest_difference(block.fc3.bias, bias) < EXACT


@examples
@given(block=any_block, seed=st.integers(0, 99))
@torch.no_grad()
def test_a_new_batch_norm_is_the_identity_in_evaluation_mode(block: PartitionBlock, seed: int) -> None:
    randomised(block, seed).eval().local_inject()
    x = images_for(block, seed=seed)
    expected = block(x)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    for _ in range(2):  # the second time there is nothing to insert
        block.insert_bn()
        assert largest_difference(expected, block(x)) < EXACT
    state = block.state_dict()
    added = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert state.keys() - before.keys() == {f"fc3_bn.{name}" for name in added}
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert block.fc3_bn.weight.dtype == torch.float64
    assert block.fc3_bn.weight.requires_grad


def test_the_training_structure_takes_none() -> None:
    with pytest.raises(ValueError, match="into the deploy structure only: convert the network first"):
        RepMLPBlock(8, 4, 4).insert_bn()
    with pytest.raises(ValueError, match=r"stages\.0\.0\.repmlp_block: .* convert the network first"):
        tiny_network().insert_bn()


# What does not belong into a block


def layer_norm(block: PartitionBlock) -> None:
    block.fc3_bn = nn.LayerNorm([block.norm_channels(), 1, 1])


def too_few_channels(block: PartitionBlock) -> None:
    block.fc3_bn = nn.BatchNorm2d(block.norm_channels() + 1)


def instance_norm(block: PartitionBlock) -> None:
    block.fc3_bn = nn.InstanceNorm2d(block.norm_channels(), affine=True, track_running_stats=True)


def further_branch(block: PartitionBlock) -> None:
    block.repconv9 = nn.Conv2d(2, 2, 9, padding=4)


def bare_branch(block: PartitionBlock) -> None:
    block.branches, block.repconv3 = (3,), nn.Conv2d(2, 2, 3, padding=1)


def with_activation(block: PartitionBlock) -> None:
    block.fc3_bn = BatchNormAct2d(block.norm_channels())


def parametrized(block: PartitionBlock) -> None:
    parametrize.register_parametrization(block.fc3, "weight", nn.Tanh())


MISPLACED = {
    with_activation: r"fc3_bn is BatchNormAct2d\(.*: a BatchNorm of \d+ channels, or nothing, belongs there",
    parametrized: r"fc3 is Parametrized.*: its weight is no parameter, as under a parametrization",
    layer_norm: r"fc3_bn is LayerNorm\(.*: a BatchNorm of \d+ channels, or nothing, belongs there",
    too_few_channels: r"fc3_bn is BatchNorm2d\(.*: a BatchNorm of \d+ channels, or nothing, belongs there",
    instance_norm: r"fc3_bn is InstanceNorm2d\(.*: a BatchNorm of \d+ channels, or nothing, belongs there",
    further_branch: r"repconv9 is Conv2d\(.*: nothing of that name belongs there",
    bare_branch: r"repconv3 is Conv2d\(.*: a convolution of 3x3 that keeps the size of the map, and its BatchNorm",
}


@pytest.mark.parametrize("misplace", MISPLACED, ids=lambda function: function.__name__)
@pytest.mark.parametrize("deploy", [False, True])
def test_what_would_not_be_counted_is_refused_by_name(misplace, deploy: bool) -> None:
    message = MISPLACED[misplace]
    for block in (
        RepMLPBlock(8, 4, 4, share_sets=2, branches=(), deploy=deploy),
        RepMLP(4, (4, 4), 2, 2, 2, (), deploy=deploy),
    ):
        misplace(block)
        for act in (block.local_inject, block.switch_to_deploy, block.get_equivalent_fc3, block.insert_bn):
            with pytest.raises(ValueError, match=f"^{message}"):
                act()
    model = tiny_network(deploy=deploy)
    last = model.stages[1][1].repmlp_block
    misplace(last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    acts = [model.locality_injection, lambda: fuse_batch_norms(model)]
    for act in acts if deploy else [*acts, lambda: to_deploy(model)]:
        with pytest.raises(ValueError, match=rf"^stages\.1\.1\.repmlp_block: {message}"):
            act()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items()), "nothing is changed"


def test_another_global_perceptron_is_refused() -> None:
    block = RepMLPBlock(8, 4, 4)
    block.gp = nn.Conv2d(8, 8, 1)
    with pytest.raises(ValueError, match=r"gp is Conv2d\(.*: a GlobalPerceptron, or None, belongs there"):
        block.local_inject()
    block = RepMLP(4, (4, 4), 2, 2)
    block.fc1_fc2.act = nn.GELU()
    with pytest.raises(ValueError, match=r"fc1_fc2 is Sequential\(.*: two linear layers with ReLU belong there"):
        block.local_inject()
    block = RepMLP(4, (4, 4), 2, 2)
    block.avg.bn = nn.GroupNorm(2, 4)
    with pytest.raises(ValueError, match=r"avg\.bn is GroupNorm\(.*: a BatchNorm of 4 channels, or nothing, belongs"):
        block.get_equivalent_fc3()


def test_a_layer_in_a_folded_convolution_is_refused() -> None:
    model = create_model("FaceResNet", deploy=True)
    model.stage1[0].shortcut.bn = nn.BatchNorm2d(128)
    for act in (model.locality_injection, lambda: fuse_batch_norms(model)):
        with pytest.raises(ValueError, match=r"^stage1\.0\.shortcut: bn is BatchNorm2d\(.*: nothing of that name"):
            act()


def test_a_parametrized_token_mixing_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    add_local_branches(model, 4, names=["0"])
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())
    with pytest.raises(ValueError, match=r"^0: the layer is Parametrized.*: its weight is no parameter"):
        to_deploy(model)


def test_a_further_layer_beside_a_token_mixing_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    add_local_branches(model, 4, names=["0"])
    model[0].repconv5 = nn.Conv2d(1, 1, 5)
    with pytest.raises(ValueError, match=r"^0: repconv5 is Conv2d\(.*: nothing of that name belongs there"):
        to_deploy(model)


@torch.no_grad()
def test_a_branch_with_a_bias_is_counted_and_a_block_without_batch_norm_too() -> None:
    block = RepMLPBlock(8, 4, 3, share_sets=2)
    block.repconv3.conv = nn.Conv2d(2, 2, 3, padding=1, groups=2)
    block.repconv3.conv.forward = lambda x: nn.functional.conv2d(
        x.reshape(-1, 2, 4, 3), block.repconv3.conv.weight, block.repconv3.conv.bias, padding=1, groups=2
    )
    block.fc3_bn = nn.Identity()
    randomised(block).eval()
    x = random_tensor(2, 8, 4, 3)
    expected = block(x)
    block.local_inject()
    assert largest_difference(expected, block(x)) < EXACT


# A network


def inserted(arch: str = ARCH, seed: int = 0, **options: object) -> nn.Module:
    """A small network with inserted BatchNorms, every parameter and statistic random."""
    options = small_options(arch) | {"num_classes": 5} | options
    return randomised(create_model(arch, insert_bn=True, **options), seed).eval()


@pytest.mark.parametrize("arch", TAKES_IT)
@torch.no_grad()
def test_it_is_one_more_training_structure(arch: str) -> None:
    model, options = inserted(arch), small_options(arch) | {"num_classes": 5}
    images = random_tensor(2, 3, *model.img_size)
    assert injection_error(model, images, randomize=True) < EXACT
    deploy = to_deploy(model)
    with torch.device("meta"):
        built = [create_model(arch, deploy=True, insert_bn=flag, **options) for flag in (False, True)]
    for other in built:
        assert [(k, v.shape) for k, v in deploy.state_dict().items()] == [
            (k, v.shape) for k, v in other.state_dict().items()
        ]
        assert not is_reparameterizable(other)
    expected = deploy(images)
    deploy.insert_bn()
    assert deploy.spec == model.spec
    assert structure_changes(arch, deploy)["insert_bn"] is True
    assert [(k, v.shape) for k, v in deploy.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()
    ]
    assert [name for name, _ in deploy.named_modules()] == [name for name, _ in model.named_modules()]
    assert largest_difference(expected, deploy(images)) < EXACT
    deploy.locality_injection()
    assert largest_difference(expected, deploy(images)) < EXACT


def test_every_family_with_an_fc3_takes_it() -> None:
    assert {name.partition("-")[0] for name in TAKES_IT} == {"RepMLPNet", "RepMLP", "PureMLP", "WideConvNet"}
    with pytest.raises(ValueError, match="has no FC3 to insert a BatchNorm after"):
        create_model("FaceResNet", insert_bn=True)


@pytest.mark.parametrize("by_hand", [False, True])
@torch.no_grad()
def test_the_fused_form_counts_it(by_hand: bool) -> None:
    model = tiny_network(deploy=True)
    for stage in model.stages:
        for unit in stage:
            (hand_made if by_hand else PartitionBlock.insert_bn)(unit.repmlp_block)
    randomised(model, 3).eval()
    images = random_tensor(2, 3, 16, 32)
    assert largest_difference(model(images), fuse_batch_norms(model)(images)) < EXACT
    assert largest_difference(model(images), to_deploy(model)(images)) < EXACT


@pytest.mark.parametrize("arch", TAKES_IT)
def test_names_and_shapes_tell_it(arch: str) -> None:
    with torch.device("meta"):
        state = create_model(arch, 5, insert_bn=True).state_dict()
    assert arch in fitting_architectures(state)
    assert form_of(state) == "train"


@pytest.mark.parametrize("arch", [ARCH, "RepMLP-Res50-light-224"])
@pytest.mark.parametrize("described", [True, False])
@torch.no_grad()
def test_it_is_built_again_from_a_file(arch: str, described: bool, tmp_path: Path) -> None:
    model = inserted(arch)
    meta = describe(arch, model, model.img_size, "train")
    assert meta["structure"]["insert_bn"] is True
    if not described:  # by an older program, say
        del meta["structure"]["insert_bn"]
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta})
    checkpoint = read_checkpoint(tmp_path / "a.pth")
    assert checkpoint.form == "train"
    network = build_from(checkpoint)
    assert network.model.spec == model.spec
    images = random_tensor(1, 3, *model.img_size)
    assert torch.equal(network.model(images), model(images))


@torch.no_grad()
def test_it_is_built_again_from_names_alone(tmp_path: Path) -> None:
    model = randomised(create_model(ARCH, 5, insert_bn=True)).eval()
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict()})
    network = build_from(read_checkpoint(tmp_path / "a.pth"))
    images = random_tensor(1, 3, 16, 16)
    assert (network.arch, network.model.spec.insert_bn) == (ARCH, True)
    assert torch.equal(network.model(images), model(images))


@torch.no_grad()
def test_metadata_that_know_nothing_of_a_hand_made_one_do_not_matter(tmp_path: Path) -> None:
    model = to_deploy(create_model(ARCH, 5)).double()
    meta = describe(ARCH, model, model.img_size, "deploy")
    for block in (m for m in model.modules() if isinstance(m, PartitionBlock)):
        hand_made(block)
    randomised(model).eval()
    write_checkpoint(tmp_path / "a.pth", {"model": model.state_dict(), "meta": meta})
    images = random_tensor(1, 3, 16, 16)
    assert torch.equal(build_from(read_checkpoint(tmp_path / "a.pth")).model(images), model(images))


@torch.no_grad()
def test_converted_weights_start_a_training_with_it(tmp_path: Path) -> None:
    trained = randomised(create_model(ARCH, 5)).eval()
    model = create_model(ARCH, 5, insert_bn=True).double().eval()
    write_checkpoint(tmp_path / "deploy.pth", {"model": to_deploy(trained).state_dict()})
    fresh = load_pretrained(ARCH, model, read_checkpoint(tmp_path / "deploy.pth"))
    assert sorted(fresh) == sorted(name for name in model.state_dict() if ".fc3_bn." in name)
    images = random_tensor(2, 3, 16, 16)
    assert largest_difference(trained(images), model(images)) < 1e-6  # built in float32
    randomised(model, 1)
    write_checkpoint(tmp_path / "inserted.pth", {"model": model.state_dict()})
    again = create_model(ARCH, 5, insert_bn=True).double().eval()
    assert load_pretrained(ARCH, again, read_checkpoint(tmp_path / "inserted.pth")) == []
    assert torch.equal(model(images), again(images))


def test_a_structure_that_does_not_fit_is_told_with_its_remedy(tmp_path: Path) -> None:
    plain, other = create_model(ARCH, 5), create_model(ARCH, 5, insert_bn=True)
    for name, model in (("train", plain), ("inserted", other)):
        write_checkpoint(tmp_path / f"{name}.pth", {"model": model.state_dict()})
    with pytest.raises(ValueError, match=r"train weights with inserted BatchNorms of .*: set MODEL\.INSERT_BN to True"):
        load_pretrained(ARCH, plain, read_checkpoint(tmp_path / "inserted.pth"))
    with pytest.raises(ValueError, match=r"These are train weights of .*: convert them first \(convert\.py\)$"):
        load_pretrained(ARCH, other, read_checkpoint(tmp_path / "train.pth"))


# Calibration


@pytest.mark.parametrize("arch", [ARCH, "RepMLP-Res50-bottleneck-224", "RepMLP-FaceRes"])
@torch.no_grad()
def test_calibration_changes_what_training_computes_and_not_what_evaluation_does(arch: str) -> None:
    model = inserted(arch)
    images = [random_tensor(n, 3, *model.img_size, seed=n) for n in (3, 5)]
    expected = model(images[0])
    modules = [block for block in model.modules() if isinstance(block, PartitionBlock)]
    seen: dict[nn.Module, list[Tensor]] = {block.fc3_bn: [] for block in modules}
    for norm, inputs in seen.items():
        norm.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0]))
    calibrate(model, images)
    assert len(seen) == len(inserted_norms(model)) > 0
    for norm, inputs in seen.items():
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)
        assert largest_difference(values.mean(1), norm.running_mean) < 1e-10
        assert largest_difference(values.var(1, correction=0), norm.running_var) < 1e-10
    assert largest_difference(expected, model(images[0])) < 1e-10
    # Each block computes in training mode what it does in evaluation mode, if it sees what it was calibrated on.
    for norm, inputs in seen.items():
        x = torch.cat(inputs[:2])
        evaluated = norm.eval()(x)
        assert largest_difference(evaluated, norm.train()(x)) < 1e-9


@torch.no_grad()
def test_processes_calibrate_together() -> None:
    whole, half = inserted(), inserted()
    images = [random_tensor(4, 3, *whole.img_size, seed=n) for n in (0, 1)]
    calibrate(whole.train(), images)
    assert all(module.training for module in whole.modules())
    sums: list[Tensor] = []
    calibrate(inserted(), images[:1], lambda own: sums.append(own.clone()) or own)
    calibrate(half, images[1:], lambda own: own + sums[0])
    for first, second in zip(inserted_norms(whole), inserted_norms(half), strict=True):
        for name, value in first.state_dict().items():
            assert torch.allclose(value.double(), second.state_dict()[name].double(), rtol=1e-10), name


def test_nothing_to_calibrate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"this RepMLPNet has no inserted BatchNorm to calibrate: call insert_bn\(\)"):
        calibrate(tiny_network(), [])
    with pytest.raises(ValueError, match="there are no images, or outputs not finite"):
        calibrate(inserted(), [])
    model = inserted()
    with pytest.raises(ValueError, match="there are no images, or outputs not finite"):
        calibrate(model, [torch.full((1, 3, *model.img_size), torch.nan, dtype=torch.float64)])
