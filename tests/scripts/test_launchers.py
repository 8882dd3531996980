"""Two processes by both launchers: the published training command, and evaluations that count every image once."""

import re
import socket
from pathlib import Path

import pytest
import torch

ARCH = "RepMLPNet-Digits"
ROOT = Path(__file__).parents[2]
ACCURACY = re.compile(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+) on (\d+) images")
QUICKSTART = f"--cfg {ROOT}/configs/quickstart.yaml"
PUBLISHED = (
    "TRAIN.EPOCHS 2 TRAIN.BASE_LR 0.001 TRAIN.WEIGHT_DECAY 0.1 TRAIN.OPTIMIZER.NAME adamw TRAIN.OPTIMIZER.MOMENTUM 0.9 "
    "TRAIN.WARMUP_LR 5e-7 TRAIN.MIN_LR 0.0 TRAIN.WARMUP_EPOCHS 1 AUG.PRESET raug15 AUG.MIXUP 0.4 AUG.CUTMIX 1.0 "
    "DATA.IMG_SIZE 16"
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def evaluated(trained, user, tmp_path_factory):
    """The shared weights, evaluated by two processes that torchrun starts."""
    options = f"--eval --resume {trained.folder}/best_ckpt.pth --output {tmp_path_factory.mktemp('eval')} {QUICKSTART}"
    words = f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()} {ROOT}/main_repmlp.py {options}"
    return user(*words.split())


def test_torchrun_evaluates_every_image_once(trained, evaluated):
    assert evaluated.status == 0, evaluated.err
    assert "2 process(es) on cpu" in evaluated.out
    (found,) = ACCURACY.findall(evaluated.out)
    last = trained.records("eval")[-1]
    assert found == (f"{last['top1']:.3f}", f"{last['top5']:.3f}", f"{last['loss']:.4f}", "359")


@pytest.fixture(scope="module")
def launched(images, user, tmp_path_factory):
    """The published training command with tiny data, started by the launcher that it names; returns folder and text."""
    output = tmp_path_factory.mktemp("launched")
    words = (
        f"-m torch.distributed.launch --nproc_per_node 2 --master_port {free_port()} {ROOT}/main_repmlp.py "
        f"--data-path {images} --arch {ARCH} --batch-size 4 --output {output} --tag my_experiment --opts {PUBLISHED} "
        "PRINT_FREQ 1 DATA.NUM_WORKERS 0"
    )
    return output / ARCH / "my_experiment", user(*words.split())


def test_the_published_training_command(launched):
    folder, result = launched
    assert result.status == 0, result.err
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.yaml", "log_rank0.txt", "log_rank1.txt", "metrics.jsonl", "latest.pth", "ckpt_epoch_1.pth"}
    assert wanted <= names
    assert len([name for name in names if name.startswith("events.")]) == 1
    assert [found[3] for found in ACCURACY.findall((folder / "log_rank0.txt").read_text())] == ["10", "10"]


def test_its_learning_rate_follows_the_global_batch(launched):
    folder, _ = launched
    rates = [float(rate) for rate in re.findall(r"  lr (\S+)  ", (folder / "log_rank0.txt").read_text())]
    low, high = 5e-7 * 8 / 256, 0.001 * 8 / 256
    assert rates[:4] == pytest.approx([low, low + (high - low) / 3, low + (high - low) * 2 / 3, high / 2], rel=1e-5)
    assert len(rates) == 6


def test_its_weights_evaluate_alone_as_they_did_together(launched, images, script):
    folder, _ = launched
    result = script("test.py", images, "train", folder / "latest.pth", "-j", 0)
    assert result.status == 0, result.err
    alone = ACCURACY.findall(result.out)
    together = ACCURACY.findall((folder / "log_rank0.txt").read_text())[-1:]
    assert [found[:2] for found in alone] == [found[:2] for found in together]
    assert float(alone[0][2]) == pytest.approx(float(together[0][2]), abs=2e-4)


def test_its_checkpoint_has_no_trace_of_the_wrapping(launched):
    folder, _ = launched
    payload = torch.load(folder / "latest.pth", weights_only=True)
    assert not [name for name in payload["model"] if name.startswith("module.")]
    assert payload["progress"]["update"] == 6


def test_a_mistake_ends_all_processes_with_one_line_each(user, tmp_path):
    words = f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()} {ROOT}/main_repmlp.py "
    result = user(*words.split(), "--data-path", tmp_path / "absent", "--arch", ARCH, "--output", tmp_path)
    assert result.status != 0
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert lines
    assert all(f"no class folders at {tmp_path}/absent/train" in line for line in lines)
