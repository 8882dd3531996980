"""From a pretrained classifier to a converted segmentation network, by the commands that a user types."""

import json
import re
from pathlib import Path

import pytest
import torch

from models import create_model
from models.checkpoints import describe, read_checkpoint, write_checkpoint
from models.segmentation import segmentation_from

ROOT = Path(__file__).parents[2]
SCRIPT = "tools/train_segmentation.py"
STRUCTURE = {"channels": [8, 16, 16, 32], "blocks": [1, 1, 1, 1], "share_sets": [1, 2, 4, 8]}
SHORT = "--epochs 24 --warmup-epochs 1 --eval-epochs 12 --lr 0.01 --batch-size 4 --crop 64 64 --width 16 -j 0"
CONV3 = "--downsample conv3"


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RepMLPNet-D256 made much smaller, as if pretrained on images of 32 x 32 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("classifier") / "classifier.pth"
    model = create_model("RepMLPNet-D256", num_classes=4, img_size=(32, 32), **STRUCTURE)
    write_checkpoint(
        path, {"model": model.state_dict(), "meta": describe("RepMLPNet-D256", model, model.img_size, "train")}
    )
    return path


@pytest.fixture(scope="session")
def segmenter(user, classifier: Path, cityscapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short training that all tests share; nobody writes to it."""
    folder = tmp_path_factory.mktemp("segmenter")
    words = f"{SHORT} {CONV3} --pretrained {classifier} --output {folder}".split()
    result = user("-m", "tools.train_segmentation", "train", cityscapes_folder, *words, folder=ROOT)
    assert result.status == 0, result.err
    return folder


def miou(result, what: str = "") -> float:
    assert result.status == 0, result.err
    found = re.search(rf"{what}.*mIoU ([\d.]+)", result.out)
    assert found is not None, result.out
    return float(found[1])


@pytest.mark.slow
def test_training_converting_and_evaluating(script, segmenter: Path, cityscapes_folder: Path, tmp_path: Path) -> None:
    records = [json.loads(line) for line in (segmenter / "metrics.jsonl").read_text().splitlines()]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["epoch"] for r in evaluations] == [11, 23]
    best = max(r["miou"] for r in evaluations)
    assert best > 75

    deploy = tmp_path / "deploy.pth"
    converted = script(SCRIPT, "convert", cityscapes_folder, segmenter / "best_ckpt.pth", deploy, "-j", 0)
    assert miou(converted, "training structure") == pytest.approx(best, abs=0.01)
    assert miou(converted, "deploy structure") == pytest.approx(best, abs=0.01)

    evaluated = script(SCRIPT, "eval", cityscapes_folder, deploy, "-j", 0)
    assert miou(evaluated) == miou(converted, "deploy structure")
    assert re.search(r"road +\d", evaluated.out)
    assert re.search(r"train +absent", evaluated.out)

    checkpoint = read_checkpoint(deploy)
    assert (checkpoint.form, checkpoint.meta["network"]["arch"]) == ("deploy", "RepMLPNet-D256")
    backbone = segmentation_from(checkpoint).backbone.model
    assert backbone.stages[0][0].repmlp_block.deploy
    assert backbone.embeds[0].conv.kernel_size == (3, 3)
    again = script(SCRIPT, "convert", cityscapes_folder, deploy, tmp_path / "twice.pth", "-j", 0)
    assert again.status == 2
    assert "nothing to convert" in again.err


@pytest.mark.slow
def test_two_processes_train_and_count_as_one(
    script, user, classifier: Path, segmenter: Path, cityscapes_folder: Path, tmp_path: Path
) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "tools.train_segmentation")
    best = (cityscapes_folder, segmenter / "best_ckpt.pth", "-j", 0)
    alone, together = script(SCRIPT, "eval", *best), user(*launcher, "eval", *best, folder=ROOT)
    assert together.out.count("mIoU") == 1
    assert miou(together) == miou(alone)
    words = (
        SHORT.replace("--epochs 24 --warmup-epochs 1", "--epochs 1 --warmup-epochs 0")
        .replace("--batch-size 4", "--batch-size 2 --sync-bn")
        .split()
    )
    trained = user(
        *launcher, "train", cityscapes_folder, *words, "--pretrained", classifier, "--output", tmp_path, folder=ROOT
    )
    assert trained.status == 0, trained.err
    payload = read_checkpoint(tmp_path / "latest.pth").payload
    assert (payload["run"]["world_size"], payload["progress"]["update"]) == (2, 3)


@pytest.mark.slow
def test_a_run_starts_from_the_classifier_and_goes_on_where_it_was(
    script, classifier: Path, segmenter: Path, cityscapes_folder: Path, tmp_path: Path
) -> None:
    """With a learning rate of 0, one epoch changes running statistics alone."""
    words = (
        SHORT.replace("--lr 0.01", "--lr 0")
        .replace("--epochs 24 --warmup-epochs 1", "--epochs 1 --warmup-epochs 0")
        .split()
    )
    command = (SCRIPT, "train", cityscapes_folder, *words, "--pretrained", classifier, "--output", tmp_path)
    assert script(*command).status == 0
    weights = segmentation_from(read_checkpoint(tmp_path / "latest.pth")).backbone.model.state_dict()
    pretrained = read_checkpoint(classifier).state_dict
    kernels = [name for name in weights if name.endswith("fc3.weight")]
    assert len(kernels) == 4
    assert all(torch.equal(weights[name], pretrained[name]) for name in kernels)
    assert "3 of 3 updates done" in script(*command).out


def test_mistakes_end_in_one_line(script, classifier: Path, cityscapes_folder: Path, tmp_path: Path) -> None:
    for words, message in (
        (("train", tmp_path), "no images at"),
        (("train", cityscapes_folder, "--batch-size", 1), "--batch-size must be at least 2"),
        (
            ("train", cityscapes_folder, "--pretrained", classifier, "--rank", 9, "--downsample", "conv3"),
            "rank of 1 to 4",
        ),
        (("train", cityscapes_folder, "--arch", "RepMLPNet-D255"), "did you mean RepMLPNet-D256"),
        (("eval", cityscapes_folder, classifier), "is no checkpoint of a segmentation network"),
        (("convert", cityscapes_folder, classifier, classifier), "would be overwritten by its own conversion"),
        (("train", cityscapes_folder, "--epoch", 3), "unknown argument --epoch "),
    ):
        result = script(SCRIPT, *words, folder=tmp_path)
        assert result.status == 2
        assert message in result.err
        assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 0", "must be at least 1"),
        ("--eval-epochs 0", "must be at least 1"),
        ("--crop 0 64", "must be at least 1"),
        ("--epochs 2 --warmup-epochs 2", "--warmup-epochs must be at least 0 and below --epochs"),
        ("--drop-path 2", "--drop-path at least 0 and below 1"),
        ("--rank 1", "--rank belongs to --downsample"),
        ("-a resnet18 --downsample conv3", "are for our own architectures, not for resnet18"),
    ],
)
def test_options_that_make_no_sense(
    script, cityscapes_folder: Path, tmp_path: Path, options: str, message: str
) -> None:
    result = script(SCRIPT, "train", cityscapes_folder, *options.split(), "-j", 0, "--output", tmp_path)
    assert result.status == 2, result.err
    assert message in result.err
    assert "Traceback" not in result.err
