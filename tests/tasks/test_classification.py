"""What is special about classification: the loss that belongs to the labels, by the definition of cross-entropy."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from settings import settings
from training_parts import ALONE

import data
from models.checkpoints import build_from, read_checkpoint
from models.reparam import to_deploy
from tasks.classification import Classification, WeightedCrossEntropy, balanced_weights
from utils.log import NAME

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
EPOCH = "--opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]], dtype=torch.float64)


def log_probabilities() -> torch.Tensor:
    return LOGITS - LOGITS.exp().sum(1, keepdim=True).log()


def loss(opts: str, targets: torch.Tensor) -> torch.Tensor:
    """Of the task with these settings; digits have 10 classes, which a loss does not need to know."""
    task = Classification(settings(f"DATA.DATA_PATH digits DATA.BATCH_SIZE 2 {opts}"), ALONE)
    return task.build_criterion(task.num_outputs())(LOGITS, targets)


@pytest.mark.parametrize("erasing", [0, 0.25])
def test_class_numbers(erasing):
    expected = -(log_probabilities()[0, 1] + log_probabilities()[1, 2]) / 2
    found = loss(f"MODEL.LABEL_SMOOTHING 0 AUG.REPROB {erasing}", torch.tensor([1, 2]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("smoothing", [0.1, 0.6])
def test_smoothed_class_numbers(smoothing):
    targets = torch.full((2, 3), smoothing / 3, dtype=torch.float64)
    targets[0, 1] += 1 - smoothing
    targets[1, 2] += 1 - smoothing
    expected = -(targets * log_probabilities()).sum(1).mean()
    torch.testing.assert_close(loss(f"MODEL.LABEL_SMOOTHING {smoothing}", torch.tensor([1, 2])), expected)


@pytest.mark.parametrize("mixing", ["AUG.MIXUP 0.4", "AUG.CUTMIX 1.0", "AUG.CUTMIX_MINMAX 0.2,0.4"])
def test_distributions_are_not_smoothed_again(mixing):
    targets = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], dtype=torch.float64)
    expected = -(targets * log_probabilities()).sum(1).mean()
    torch.testing.assert_close(loss(f"MODEL.LABEL_SMOOTHING 0.1 {mixing}", targets), expected)


WEIGHTS = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)
LABELS = np.array([0, 0, 0, 0, 1, 1, 3])


def test_balanced_weights():
    weights = balanced_weights(LABELS, 5)
    torch.testing.assert_close(weights, torch.tensor([7 / 12, 7 / 6, 0, 7 / 3, 0]))
    assert float(weights[LABELS].mean()) == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [0, 0.3])
def test_weighted_class_numbers(smoothing):
    targets = torch.full((2, 3), smoothing / 3, dtype=torch.float64)
    targets[0, 1] += 1 - smoothing
    targets[1, 2] += 1 - smoothing
    expected = -(WEIGHTS * targets * log_probabilities()).sum() / 2
    found = WeightedCrossEntropy(WEIGHTS, smoothing)(LOGITS, torch.tensor([1, 2]))
    torch.testing.assert_close(found, expected)


def test_weighted_distributions_are_not_smoothed_again():
    targets = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], dtype=torch.float64)
    expected = -(WEIGHTS * targets * log_probabilities()).sum() / 2
    torch.testing.assert_close(WeightedCrossEntropy(WEIGHTS, 0.3)(LOGITS, targets), expected)


@pytest.mark.parametrize("mixing", ["", "AUG.MIXUP 0.4"])
def test_the_weights_are_those_of_the_training_images(mixing):
    task = Classification(
        settings(f"DATA.DATA_PATH digits DATA.BATCH_SIZE 2 TRAIN.CLASS_WEIGHTS balanced MODEL.NUM_CLASSES 12 {mixing}"),
        ALONE,
    )
    criterion = task.build_criterion(task.num_outputs())
    counts = torch.tensor([list(task.train_source.labels).count(label) for label in range(10)])
    expected = torch.cat((len(task.train_source) / (10 * counts), torch.zeros(2)))
    torch.testing.assert_close(criterion.state_dict(), {"weight": expected})


@pytest.mark.parametrize("soft", [False, True])
def test_the_mean_of_equal_parts_of_a_batch_is_the_loss_of_the_batch(soft):
    """So it is with several processes and accumulated batches, whatever classes each of them has."""
    torch.manual_seed(0)
    criterion = WeightedCrossEntropy(torch.tensor([0.1, 1.0, 30.0]), 0.1)
    logits, labels = torch.randn(12, 3), torch.tensor([0] * 6 + [1] * 4 + [2, 0])
    targets = torch.nn.functional.one_hot(labels, 3).float() if soft else labels
    parts = [criterion(*part) for part in zip(logits.split(4), targets.split(4), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), criterion(logits, targets))


@pytest.fixture(scope="module")
def teacher(script, tmp_path_factory):
    """A network for the digits, trained for an epoch."""
    output = tmp_path_factory.mktemp("teacher")
    result = script("main_repmlp.py", *f"--cfg {RECIPE} --output {output} {EPOCH}".split())
    assert result.status == 0, result.err
    return output / "RepMLPNet-Digits" / "quickstart" / "latest.pth"


@pytest.mark.parametrize("mixing", ["", "AUG.MIXUP 0.4"])
def test_distillation(teacher, script, tmp_path, mixing):
    """With all the weight a student that starts as its teacher has only to become surer, whatever the labels say."""
    opts = f"{EPOCH} DISTILL.TEACHER {teacher} DISTILL.WEIGHT 1 {mixing}"
    words = f"--cfg {RECIPE} --output {tmp_path} --pretrained {teacher} {opts}"
    result = script("main_repmlp.py", *words.split())
    assert result.status == 0, result.err
    records = (tmp_path / "RepMLPNet-Digits" / "quickstart" / "metrics.jsonl").read_text().splitlines()
    loss = next(record["loss"] for record in map(json.loads, records) if record["kind"] == "train")
    apart = script("main_repmlp.py", *f"{words.replace('WEIGHT 1', 'WEIGHT 0')} TAG apart".split())
    assert apart.status == 0, apart.err
    records = (tmp_path / "RepMLPNet-Digits" / "apart" / "metrics.jsonl").read_text().splitlines()
    assert loss != next(record["loss"] for record in map(json.loads, records) if record["kind"] == "train")
    saved = torch.load(tmp_path / "RepMLPNet-Digits" / "quickstart" / "latest.pth", weights_only=True)
    assert saved["model"].keys() == torch.load(teacher, weights_only=True)["model"].keys()


def digit_folders(root: Path, *digits: int) -> Path:
    """Folders of a few digits, each named by its number."""
    source = data.DigitsSource("val")
    for split in ("train", "val"):
        for digit in digits:
            path = root / split / str(digit) / "0.png"
            path.parent.mkdir(parents=True)
            source.load(source.labels.tolist().index(digit))[0].save(path)
    return root


def test_a_teacher_is_asked_for_the_classes_of_the_training(teacher, tmp_path, monkeypatch):
    """Its outputs are found by name, and those of other classes left out."""
    said = []
    monkeypatch.setattr(logging.getLogger(NAME), "info", said.append)
    root = digit_folders(tmp_path / "images", 7, 3)
    keys = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 16 MODEL.ARCH RepMLPNet-Digits DISTILL.TEACHER"
    payload = torch.load(teacher, weights_only=True)
    payload["meta"]["dataset"] = "imagenet"  # whose normalization folders have
    del payload["meta"]["mean"], payload["meta"]["std"]
    torch.save(payload, tmp_path / "teacher.pth")
    images = torch.randn(2, 3, 16, 16)
    whole = to_deploy(build_from(read_checkpoint(teacher)).model)(images)
    task = Classification(settings(f"{keys} {tmp_path / 'teacher.pth'}"), ALONE)
    assert torch.equal(task.teacher(images), whole[:, [3, 7]])
    assert [line.split(": ")[1] for line in said] == ["2 of the 10 classes of the weights are matched by name"]

    payload["meta"]["class_names"] = [f"digit {digit}" for digit in range(10)]
    torch.save(payload, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=f"does not know 2 of the 2 classes in {root}: '3', '7'; it knows 'digit 0', 'd"
    ):
        _ = Classification(settings(f"{keys} {tmp_path / 'other.pth'}"), ALONE).teacher


def test_teachers_that_do_not_fit(teacher, call, tmp_path):
    def refused(opts: str) -> str:
        result = call("main_repmlp.py", *f"--cfg {RECIPE} --output {tmp_path} {EPOCH} {opts}".split())
        assert result.status == 2
        return result.err

    assert "DISTILL.ARCH" in refused("DISTILL.ARCH resnet18")
    assert "is for 10 classes, the training for 12" in refused(f"MODEL.NUM_CLASSES 12 DISTILL.TEACHER {teacher}")
    assert f"DISTILL.TEACHER {teacher} can't see the training images" in refused(
        f"DATA.IMG_SIZE 24 DISTILL.TEACHER {teacher}"
    )
    assert "nowhere.pth" in refused("DISTILL.TEACHER nowhere.pth")
    payload = torch.load(teacher, weights_only=True)
    payload["meta"]["mean"] = [0.5, 0.6, 0.7]
    torch.save(payload, tmp_path / "other.pth")
    assert "was trained on images normalized by mean 0.5, 0.6, 0.7, std 0.3763, 0.3763, 0.3763, these are by mean " in (
        refused(f"DISTILL.TEACHER {tmp_path / 'other.pth'}")
    )
    del payload["meta"]["mean"], payload["meta"]["std"]  # as older files are
    payload["meta"]["dataset"] = "cf10"
    torch.save(payload, tmp_path / "older.pth")
    assert "was trained on images normalized by mean 0.4914, 0.4822, 0.4465, " in refused(
        f"DISTILL.TEACHER {tmp_path / 'older.pth'}"
    )
    own = tmp_path / "RepMLPNet-Digits" / "quickstart" / "best_ckpt.pth"
    own.parent.mkdir(parents=True, exist_ok=True)
    own.hardlink_to(teacher)
    assert "would be replaced by this run's own: give the run another TAG" in refused(f"DISTILL.TEACHER {own}")
    payload = torch.load(teacher, weights_only=True)
    payload["meta"]["task"] = "verification"
    torch.save(payload, tmp_path / "face.pth")
    assert "is of TASK verification: a teacher is a classifier" in refused(f"DISTILL.TEACHER {tmp_path / 'face.pth'}")
