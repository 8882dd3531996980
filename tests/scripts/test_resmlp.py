"""ResMLP through the three scripts: trained, evaluated, converted, compared; timm's weights taken and given back."""

import re

import pytest
import timm
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

import models

ARCH = "ResMLP-Shapes"
SHORT = (
    f"--arch {ARCH} --batch-size 8 --opts DATA.IMG_SIZE 16 DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 "
    "AUG.PRESET weak TRAIN.BASE_LR 0.1 MODEL.BRANCHES 3,5"
)
ACCURACY = re.compile(r"Acc@1 \S+ Acc@5 \S+ loss \S+ on \d+ images")


@pytest.fixture(scope="module")
def run(images, train):
    return train(f"--data-path {images} {SHORT}", arch=ARCH)


@pytest.fixture(scope="module")
def converted(run, script, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "deploy.pth"
    result = script("convert.py", run.folder / "latest.pth", path)
    assert (result.status, result.err) == (0, "")
    return path


def test_both_forms_have_the_same_accuracy(run, converted, images, script):
    train = script("test.py", images, "train", run.folder / "latest.pth", "-j", 0)
    deploy = script("test.py", images, "deploy", converted, "-j", 0)
    assert (train.status, deploy.status) == (0, 0)
    assert ACCURACY.findall(train.out) == ACCURACY.findall(deploy.out) == ACCURACY.findall(run.result.out)
    check = script("test.py", images, "check", run.folder / "latest.pth", "-j", 0)
    assert check.status == 0
    assert "top-1 agreement 100.000 %" in check.out


@pytest.mark.parametrize("weights", ["latest.pth", "deploy.pth"])
def test_main_evaluates_both_forms(run, converted, images, script, tmp_path, weights):
    path = converted if weights == "deploy.pth" else run.folder / weights
    words = f"--eval --resume {path} --output {tmp_path} --data-path {images} {SHORT}".split()
    result = script("main_repmlp.py", *words)
    assert (result.status, result.err) == (0, "")
    assert ACCURACY.findall(result.out) == ACCURACY.findall(run.result.out)


def test_each_form_is_refused_where_the_other_belongs(run, converted, images, script, tmp_path):
    def error(*command: object) -> str:
        result = script(*command)
        assert result.status not in (0, 1)
        (line,) = result.err.splitlines()
        return line

    assert "holds deploy weights" in error("convert.py", converted, tmp_path / "again.pth")
    assert "mode train needs train weights" in error("test.py", images, "train", converted, "-j", 0)
    assert "mode deploy needs deploy weights" in error("test.py", images, "deploy", run.folder / "latest.pth", "-j", 0)
    torch.save(torch.load(converted, weights_only=True)["model"], tmp_path / "bare.pth")
    bare = ("convert.py", tmp_path / "bare.pth", tmp_path / "again.pth", "-a", ARCH)
    assert "nothing to convert: this ResMLP has no blocks with local branches" in error(*bare)
    assert not (tmp_path / "again.pth").exists()


def test_weights_of_timm_are_evaluated_and_trained_on(images, script, train, tmp_path):
    torch.manual_seed(0)
    path, arch = tmp_path / "timm.pth", "ResMLP-S12-224"
    original = timm.create_model("resmlp_12_224", num_classes=2, img_size=32)
    torch.nn.init.normal_(original.head.weight)
    torch.save(original.state_dict(), path)
    evaluated = script("test.py", images, "deploy", path, "-a", arch, "-j", 0, "-r", 32)
    assert (evaluated.status, evaluated.err) == (0, "")

    # A rate of zero changes nothing but statistics, so that the first evaluation is that of timm's weights.
    options = SHORT.replace(ARCH, arch).replace("IMG_SIZE 16", "IMG_SIZE 32").replace("BASE_LR 0.1", "BASE_LR 0.0")
    run = train(f"--pretrained {path} --data-path {images} {options}", arch=arch)
    new = "blocks.0.linear_tokens.repconv3.conv.weight ... blocks.11.linear_tokens.repconv5.bn.num_batches_tracked"
    assert f"except for 144 tensors, which are new ({new})" in run.result.out
    assert ACCURACY.findall(run.result.out) == ACCURACY.findall(evaluated.out)
    payload = torch.load(run.folder / "latest.pth", weights_only=True)
    assert payload["meta"]["form"] == "train"
    assert payload["meta"]["structure"] == {"branches": [3, 5]}


def test_converted_weights_load_in_timm(converted):
    state = torch.load(converted, weights_only=True)["model"]
    model = models.create_model(ARCH, 2, img_size=16, deploy=True)
    timms = MlpMixer(
        2, 16, patch_size=2, num_blocks=4, embed_dim=96, mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine
    )
    for network in (model, timms):
        network.eval().load_state_dict(state)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), timms(images))


def test_converted_weights_are_trained_on_in_the_structure_of_timm(converted, images, script, train):
    options = SHORT.replace("BASE_LR 0.1 MODEL.BRANCHES 3,5", "BASE_LR 0.0")
    run = train(f"--pretrained {converted} --data-path {images} {options}", arch=ARCH)
    assert f"{ARCH} in the deploy structure, since the weights in {converted} are converted" in run.result.out
    payload, given = torch.load(run.folder / "latest.pth", weights_only=True), torch.load(converted, weights_only=True)
    assert payload["meta"]["form"] == "deploy"
    assert payload["model"].keys() == given["model"].keys()
    assert all(torch.equal(value, given["model"][name]) for name, value in payload["model"].items())
    again = train(f"--data-path {images} {options.replace('EPOCHS 1', 'EPOCHS 2')}", arch=ARCH, output=run.output)
    assert (
        f"in the deploy structure, since the weights in {run.folder / 'latest.pth'} are converted" in again.result.out
    )
    assert len(again.records("eval")) == 2
