"""The published README with tiny weights: its commands, and its snippets for users of the library.

Its commands for several processes are in `test_launchers.py`.
"""

import re
import shlex
import shutil
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import models
import repmlpnet
from models import layers
from models.checkpoints import read_checkpoint
from models.reparam import randomize_statistics

ARCH = "RepMLPNet-Digits"
ACCURACY = re.compile(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+) on (\d+) images")
TRAIN, DEPLOY = "RepMLPNet-D256-train-acc80.828.pth", "RepMLPNet-D256-deploy.pth"
# As published, in order, but for the data and the launcher.
COMMANDS = (
    "main_repmlp.py --data-path digits --arch RepMLPNet-D256 --batch-size 32 --tag test --eval "
    f"--resume {TRAIN} --opts DATA.IMG_SIZE 256",
    f"test.py digits train {TRAIN} -a RepMLPNet-D256 -r 256",
    f"convert.py {TRAIN} {DEPLOY} -a RepMLPNet-D256",
    f"test.py digits deploy {DEPLOY} -a RepMLPNet-D256 -r 256",
    f"test.py digits check {TRAIN} -a RepMLPNet-D256 -r 256",
)


def tiny(command: str) -> list[str]:
    """The words of a command for the smallest architecture and images; the names of the files stay."""
    small = {"RepMLPNet-D256": ARCH, "256": "16"}
    return [small.get(word, word) for word in shlex.split(command)]


def inject_all(module: nn.Module) -> None:
    """Injects every block as the README says: whatever has the method."""
    for m in module.modules():
        if hasattr(m, "local_inject"):
            m.local_inject()


def test_the_commands_in_order(trained, call, tmp_path):
    shutil.copy(trained.folder / "best_ckpt.pth", tmp_path / TRAIN)
    found = []
    for command in COMMANDS:
        result = call(*tiny(command))
        assert (result.status, result.err) == (0, ""), command
        found += ACCURACY.findall(result.out)
    assert len(found) == 5  # the check evaluates both forms
    assert {figures[:2] for figures in found} == {ACCURACY.findall(trained.result.out)[-1][:2]}
    assert {figures[3] for figures in found} == {"359"}


def test_the_equivalence(call):
    result = call("repmlpnet.py", ARCH, "repmlpnet_shapes")
    assert (result.status, result.err) == (0, "")
    lines = re.findall(r"(\S+): largest relative logit difference (\S+), equivalent\n", result.out)
    assert [arch for arch, _ in lines] == [ARCH, "RepMLPNet-Shapes"]
    assert all(float(difference) < 1e-13 for _, difference in lines)


@pytest.mark.slow
def test_the_equivalence_of_every_published_size(user):
    result = user("repmlpnet.py")
    assert (result.status, result.err) == (0, "")
    assert re.findall(r"^(\S+): .* equivalent$", result.out, re.MULTILINE) == [*models.published.PUBLISHED]
    assert "NOT" not in result.out


def test_a_wrong_conversion_is_not_equivalent(call, monkeypatch):
    right = layers.inject_
    monkeypatch.setattr(layers, "inject_", lambda fc, scale, kernel, size: right(fc, scale, None, size))
    result = call("repmlpnet.py", ARCH)
    assert result.status == 1
    assert result.out.endswith(", NOT equivalent\n")


def test_an_unknown_architecture(call):
    result = call("repmlpnet.py", "RepMLPNet-D224")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: unknown architecture 'RepMLPNet-D224'; did you mean ")


def test_a_block_in_your_model():
    class YourModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 2, stride=2)
            self.block = repmlpnet.RepMLPBlock(
                in_channels=8, out_channels=8, h=4, w=4, reparam_conv_k=(1, 3), num_sharesets=2
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.stem(x))

    your_model = YourModel().double().eval()
    randomize_statistics(your_model)
    x = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    expected = your_model(x)
    inject_all(your_model)
    assert your_model.block.deploy
    assert not [name for name, _ in your_model.named_modules() if "repconv" in name]
    torch.testing.assert_close(your_model(x), expected, rtol=1e-12, atol=1e-12)


def test_a_backbone_in_your_segmentation_network(trained):
    backbone = models.create_model(ARCH, 10)
    backbone.load_state_dict(torch.load(trained.folder / "best_ckpt.pth", weights_only=True)["model"])
    your_upernet = nn.Sequential(models.dense_backbone(backbone, (1,))).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    (expected,) = your_upernet(x)
    inject_all(your_upernet)
    assert not any(".repconv" in name for name in your_upernet.state_dict())
    torch.testing.assert_close(your_upernet(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_converted_network_is_finetuned(deployed):
    model = models.get_model(ARCH, pretrained=deployed).train()
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
    loss.backward()
    fc3 = model.stages[0][0].repmlp_block.fc3
    assert fc3.weight.grad.abs().max() > 0
    assert fc3.bias.grad.abs().max() > 0


def test_the_equivalent_kernel_can_be_constrained():
    block = repmlpnet.RepMLPBlock(8, 8, 4, 4, (1, 3), num_sharesets=2)
    kernel, bias = block.get_equivalent_fc3()
    assert kernel.shape == block.fc3.weight.shape
    (kernel.round() - kernel).square().sum().add(bias.square().sum()).backward()
    parts = (block.fc3.weight, block.fc3_bn.weight, block.repconv1.conv.weight, block.repconv3.conv.weight)
    assert all(part.grad.abs().max() > 0 for part in parts)
    block.local_inject()
    torch.testing.assert_close(block.fc3.weight, kernel, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def plain(trained, user, tmp_path_factory):
    """The shared weights, converted to a dict of names and values, as the published `convert.py` does."""
    path = tmp_path_factory.mktemp("plain") / "deploy.pth"
    result = user("convert.py", trained.folder / "best_ckpt.pth", path, "-a", ARCH, "--plain")
    assert result.status == 0, result.err
    return path


def test_weights_for_several_gpus(one_process, plain, deployed):
    checkpoint = torch.load(plain, weights_only=True)
    expected, x = models.get_model(ARCH, pretrained=deployed), torch.randn(2, 3, 16, 16)
    before = DistributedDataParallel(models.create_model(ARCH, 10, deploy=True)).eval()
    before.load_state_dict({("module." + k): v for k, v in checkpoint.items()})
    within = DistributedDataParallel(models.create_model(ARCH, 10, deploy=True)).eval()
    within.module.load_state_dict(checkpoint)
    with torch.no_grad():
        assert torch.equal(before(x), expected(x))
        assert torch.equal(within(x), expected(x))


def test_a_plain_file_holds_names_and_tensors(plain, deployed):
    found, expected = torch.load(plain, weights_only=True), torch.load(deployed, weights_only=True)["model"]
    assert type(found) is dict
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_every_reader_takes_a_plain_file(ending, trained, deployed, call, tmp_path):
    path = tmp_path / f"plain{ending}"
    result = call("convert.py", trained.folder / "best_ckpt.pth", path, "--plain")
    assert (result.status, result.err) == (0, "")
    assert "need --dataset digits\n" in result.out
    if ending == ".safetensors":
        expected = torch.load(deployed, weights_only=True)["model"]
        found = load_file(path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (read_checkpoint(path).form, read_checkpoint(path).meta) == ("deploy", {})
    accuracy = ACCURACY.findall(trained.result.out)[-1][:2]
    evaluated = call("test.py", "digits", "deploy", path, "-a", ARCH, "-j", 0)
    assert [figures[:2] for figures in ACCURACY.findall(evaluated.out)] == [accuracy]
    words = ("--data-path", "digits", "--arch", ARCH, "--eval", "--resume", path, "--opts", "DATA.NUM_WORKERS", 0)
    evaluated = call("main_repmlp.py", *words)
    assert [figures[:2] for figures in ACCURACY.findall(evaluated.out)] == [accuracy]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": (32, 8)}, r"weights alone say images of \(16, 16\), not \(32, 8\): leave out --plain"),
        ({"gp_reduction": 2}, "does not fit the network: .* leave out --plain"),
    ],
)
def test_weights_that_need_their_metadata_are_not_written_plainly(options, message, call, tmp_path):
    torch.manual_seed(0)
    model = models.create_model(ARCH, 10, **options)
    meta = models.checkpoints.describe(ARCH, model, model.img_size, "train")
    torch.save({"model": model.state_dict(), "meta": meta}, tmp_path / "train.pth")
    result = call("convert.py", tmp_path / "train.pth", tmp_path / "plain.pth", "--plain")
    assert result.status == 2
    assert re.search(message, result.err)
    assert not (tmp_path / "plain.pth").exists()
    assert call("convert.py", tmp_path / "train.pth", tmp_path / "full.pth").status == 0


def test_weights_of_another_task_are_not_written_plainly(trained, call, tmp_path):
    payload = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    payload["meta"]["task"] = "verification"
    torch.save({"model": payload["model"], "meta": payload["meta"]}, tmp_path / "train.pth")
    result = call("convert.py", tmp_path / "train.pth", tmp_path / "plain.pth", "--plain")
    assert result.status == 2
    assert "weights alone do not say that they are of the task verification" in result.err
    assert not (tmp_path / "plain.pth").exists()
