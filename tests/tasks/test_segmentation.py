"""What is special about segmentation: from a pretrained classifier to a converted network that has learned."""

import re
from pathlib import Path

import pytest
import torch
from settings import settings
from task_recipes import keys_of
from training_parts import ALONE

from models import create_model
from models.checkpoints import describe, read_checkpoint
from models.files import write_checkpoint
from models.segmentation import segmentation_from
from tasks.segmentation import Segmentation

ARCH = "RepMLPNet-D256"
STRUCTURE = {"channels": [8, 16, 16, 32], "blocks": [1, 1, 1, 1], "share_sets": [1, 2, 4, 8]}
# The recipe of all tests but for its structure and size, which are those of the classifier.
KEYS = {
    key: value
    for key, value in keys_of("segmentation", "MODEL.LABEL_SMOOTHING 0 TRAIN.ACCUMULATION_STEPS 1").items()
    if key not in ("MODEL.CHANNELS", "MODEL.BLOCKS", "MODEL.SHARE_SETS", "SEG.BACKBONE_SIZE")
}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RepMLPNet-D256 made much smaller, as if pretrained on images of 32 x 32 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.pth"
    model = create_model(ARCH, num_classes=4, img_size=(32, 32), **STRUCTURE)
    write_checkpoint(path, {"model": model.state_dict(), "meta": describe(ARCH, model, model.img_size, "train")})
    return path


def words(images: Path, output: Path, flags: str = "", changes: str = "") -> list[str]:
    given = changes.split()
    keys = KEYS | dict(zip(given[::2], given[1::2], strict=True))
    pairs = [word for pair in keys.items() for word in pair]
    return ["--data-path", str(images), "--output", str(output), *flags.split(), "--opts", *pairs]


@pytest.fixture(scope="module")
def segmenter(script, classifier: Path, cityscapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that is long enough to learn what little there is to learn."""
    output = tmp_path_factory.mktemp("segmenter")
    changes = "TRAIN.EPOCHS 24 TRAIN.BASE_LR 0.64 TRAIN.EMA_ALPHA 0 EVAL_FREQ 12 SAVE_FREQ 24 PRINT_FREQ 100"
    result = script(
        "main_repmlp.py", *words(cityscapes_folder, output, f"--pretrained {classifier}", changes), folder=output
    )
    assert result.status == 0, result.err
    assert f"starting from the classifier in {classifier}, for the backbone" in result.out
    return output / ARCH / "run"


def test_it_learns_and_keeps_what_it_has_learned_when_it_is_converted(
    call, segmenter: Path, cityscapes_folder: Path, tmp_path: Path
) -> None:
    best = read_checkpoint(segmenter / "best_ckpt.pth").payload["progress"]["best_metric"]
    assert best > 75
    deploy = tmp_path / "deploy.pth"
    assert call("convert.py", segmenter / "best_ckpt.pth", deploy).status == 0
    for mode, weights in (("train", segmenter / "best_ckpt.pth"), ("deploy", deploy)):
        result = call("test.py", cityscapes_folder, mode, weights, "-j", 0)
        assert float(re.findall(r"mIoU ([\d.]+)", result.out)[0]) == pytest.approx(best, abs=0.01)
        assert re.search(r"road +\d", result.out)
        assert re.search(r"train +absent", result.out)
    checkpoint = read_checkpoint(deploy)
    assert (checkpoint.form, checkpoint.meta["network"]["arch"]) == ("deploy", ARCH)
    backbone = segmentation_from(checkpoint).backbone.model
    assert backbone.stages[0][0].repmlp_block.deploy
    assert backbone.embeds[0].conv.kernel_size == (3, 3)


def test_a_run_starts_from_the_classifier(script, classifier: Path, cityscapes_folder: Path, tmp_path: Path) -> None:
    """With a learning rate of 0, one epoch changes running statistics alone; its structure and size are taken over."""
    changes = "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 TRAIN.BASE_LR 0"
    command = words(cityscapes_folder, tmp_path, f"--pretrained {classifier}", changes)
    result = script("main_repmlp.py", *command)
    assert result.status == 0, result.err
    checkpoint = read_checkpoint(tmp_path / ARCH / "run" / "latest.pth")
    weights = segmentation_from(checkpoint).backbone.model.state_dict()
    pretrained = read_checkpoint(classifier).state_dict
    kernels = [name for name in weights if name.endswith("fc3.weight")]
    assert len(kernels) == 4
    assert all(torch.equal(weights[name], pretrained[name]) for name in kernels)
    assert checkpoint.meta["network"]["img_size"] == [32, 32]


def test_global_perceptrons_of_another_size_are_drawn_anew(script, cityscapes_folder: Path, tmp_path: Path) -> None:
    arch = "RepMLP-Res50-g4-8-320"
    structure = {"channels": [8, 16, 32, 64], "blocks": [1, 2, 2, 1], "reductions": [0, 1, 2, 0], "partition": 2}
    model = create_model(arch, num_classes=4, img_size=64, groups=[1, 2, 2, 1], **structure)
    classifier = tmp_path / "classifier.pth"
    meta = describe(arch, model, model.img_size, "train")
    write_checkpoint(classifier, {"model": model.state_dict(), "meta": meta})
    changes = (
        f"MODEL.ARCH {arch} MODEL.GP_REDUCTION 1,4,8,1 SEG.DECODER pspnet SEG.DOWNSAMPLE null SEG.OUTPUT_STRIDE 8 "
        "SEG.BACKBONE_SIZE 48 DATA.IMG_SIZE 45 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 TRAIN.BASE_LR 0"
    )
    result = script("main_repmlp.py", *words(cityscapes_folder, tmp_path, f"--pretrained {classifier}", changes))
    assert result.status == 0, result.err
    names = "(model.stage2.1.btnk_repmlp.fc1_fc2.fc1.weight ... model.stage3.1.btnk_repmlp.fc1_fc2.fc2.bias)"
    assert f"for the backbone except for 8 tensors, which are new {names}" in result.out
    checkpoint = read_checkpoint(tmp_path / arch / "run" / "latest.pth")
    network = segmentation_from(checkpoint)
    assert (network.arguments["img_size"], network.arguments["gp_reduction"]) == ([48, 48], [1, 4, 8, 1])
    assert network.backbone.feature_info.reduction() == [4, 8, 8, 8]
    kernel = network.backbone.model.stage2[1].btnk_repmlp.fc3.weight
    assert torch.equal(kernel, model.stage2[1].btnk_repmlp.fc3.weight)


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        ("--arch RepMLPNet-D255", "MODEL.ARCH RepMLPNet-D255", "did you mean RepMLPNet-D256"),
        ("--pretrained {classifier}", "SEG.RANK 9", "from 1 to 4"),
        ("--pretrained {classifier}", "SEG.BACKBONE_SIZE 64", "leave SEG.BACKBONE_SIZE out"),
        ("--pretrained {classifier}", "SEG.OUTPUT_STRIDE 8", "no output_stride to change"),
        ("--pretrained {classifier}", "MODEL.GROUPS 1,1,1,1", "no groups to change"),
        ("", "MODEL.ARCH resnet18", "are for our own architectures, not for resnet18"),
        ("--pretrained {classifier}", "MODEL.ARCH resnet18 SEG.DOWNSAMPLE null", "resnet18 has no channels to change"),
        ("--pretrained {segmenter}/latest.pth", "TAG x", "segmentation"),
        (
            "--pretrained {deploy}",
            "MODEL.BRANCHES 1,3",
            "are converted and have no branches",
        ),
        ("--eval --resume {classifier}", "", "is no checkpoint of a segmentation network"),
        ("", "DATA.BATCH_SIZE 1", "set DATA.BATCH_SIZE higher"),
        ("", "AUG.MIXUP 0.4", "TASK segmentation does not use AUG.MIXUP"),
    ],
)
def test_mistakes(
    call, classifier: Path, segmenter: Path, cityscapes_folder: Path, tmp_path: Path, flags, changes, message
) -> None:
    deploy = tmp_path / "deploy.pth"
    if "{deploy}" in flags:
        assert call("convert.py", classifier, deploy).status == 0
    flags = flags.format(classifier=classifier, segmenter=segmenter, deploy=deploy)
    result = call("main_repmlp.py", *words(cityscapes_folder, tmp_path / "output", flags, changes))
    assert result.status == 2, result.out + result.err
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_an_empty_folder(call, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    result = call("main_repmlp.py", *words(tmp_path / "images", tmp_path / "output"))
    assert result.status == 2
    assert "no images at" in result.err


def test_a_structure_that_is_not_that_of_the_pretrained_weights_is_refused(
    refused, classifier: Path, cityscapes_folder: Path, tmp_path: Path
) -> None:
    changes = "MODEL.CHANNELS 8,16,16,64"
    error = refused("main_repmlp.py", *words(cityscapes_folder, tmp_path, f"--pretrained {classifier}", changes))
    assert f"{classifier} does not fit the network" in error


def test_settings_that_an_evaluation_does_not_use_are_named(
    call, segmenter: Path, cityscapes_folder: Path, tmp_path: Path
) -> None:
    weights = f"--eval --resume {segmenter / 'latest.pth'}"
    result = call("main_repmlp.py", *words(cityscapes_folder, tmp_path, weights, "SEG.WIDTH 99"))
    assert result.status == 0, result.err
    assert "warning: SEG.WIDTH 99 is ignored: the checkpoint has " in result.out
    assert result.out.count("is ignored") == 1


def test_a_backbone_of_one_size_names_it(refused, cityscapes_folder: Path, tmp_path: Path) -> None:
    changes = "MODEL.ARCH swin_tiny_patch4_window7_224 SEG.DOWNSAMPLE null"
    error = refused("main_repmlp.py", *words(cityscapes_folder, tmp_path, changes=changes))
    assert "swin_tiny_patch4_window7_224 takes images of 224x224 only: set DATA.IMG_SIZE and DATA.TEST_SIZE" in error


def test_a_classifier_of_timm_is_the_start_of_its_backbone(cityscapes_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, trained = tmp_path / "resnet.pth", create_model("resnet18", 3)
    torch.save(trained.state_dict(), path)
    keys = f"TASK segmentation DATA.DATASET cityscapes DATA.DATA_PATH {cityscapes_folder} SEG.WIDTH 8 DATA.IMG_SIZE 64"
    task = Segmentation(settings(f"{keys} MODEL.ARCH resnet18 MODEL.PRETRAINED {path}"), ALONE)
    weights = task.read_pretrained()
    network = task.build_network(task.num_outputs(), weights)
    assert task.load_pretrained(network, weights) == f"the classifier in {path}, for the backbone"
    levels, given = network.backbone.state_dict(), trained.state_dict()
    assert given.keys() - levels.keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, given[name]) for name, value in levels.items())
