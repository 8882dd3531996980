"""Programs on a machine whose memory is too small for what they are told: one line, with what to lower."""

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_runs import one_line
from processes import Process

import models
from tools import soak

DRIVER = Path(__file__).with_name("small_system.py")
# A network without sizes of its own, on images of 3 MiB each in float32: 64 of them and their maps exceed the memory.
ARCH, SIDE, MEMORY = "resnet18", 512, 450
TRAINING = ("DATA.NUM_WORKERS", 0, "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "AUG.PRESET", "none", "TAG", "run")
FULL = r"the machine is out of memory: this process uses [\d.]+ [MG]iB of [\d.]+ GiB, asked for [\d.]+ [MG]iB more"


@pytest.fixture
def small(start) -> Callable[..., Process]:
    """Starts a script that may use so many MiB more than torch has taken."""

    def run(script: str, *words: object, memory: int = MEMORY, **how: object) -> Process:
        return start(DRIVER, json.dumps({"memory": memory}), soak.ROOT / script, *words, **how)

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": models.create_model(ARCH, 10).state_dict()}, path)
    return path


def training(output: Path, *keys: object, side: int = SIDE, batch_size: int = 64) -> tuple[object, ...]:
    sizes = ("DATA.IMG_SIZE", side, "DATA.BATCH_SIZE", batch_size)
    return ("--data-path", "digits", "--arch", ARCH, "--output", output, "--opts", *TRAINING, *sizes, *keys)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            (),
            "set DATA.BATCH_SIZE 32 with TRAIN.ACCUMULATION_STEPS 2 (the global batch stays) or TRAIN.USE_CHECKPOINT "
            "True or AMP bf16",
        ),
        (
            ("TRAIN.ACCUMULATION_STEPS", 3, "TRAIN.USE_CHECKPOINT", True, "AMP", "bf16"),
            "set DATA.BATCH_SIZE 32 with TRAIN.ACCUMULATION_STEPS 6 (the global batch stays)",
        ),
    ],
)
def test_a_training(small, tmp_path, changes, remedy):
    line = one_line(small("main_repmlp.py", *training(tmp_path, *changes)))
    assert re.fullmatch(f"error: {FULL}: {re.escape(remedy)}", line)
    log = (tmp_path / ARCH / "run" / "log_rank0.txt").read_text()
    assert log.splitlines()[-1].endswith(f" ERROR stopped: {line.removeprefix('error: ')}")
    assert "Traceback" not in log


def test_a_rank_of_two_is_named_and_the_other_ends(small, start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    words = training(tmp_path, side=64, batch_size=256)
    peer = start(soak.ROOT / "main_repmlp.py", *words, environment=common | {"RANK": "0"})
    line = one_line(small("main_repmlp.py", *words, environment=common | {"RANK": "1"}))
    assert re.match(f"error: rank 1: {FULL}: set DATA.BATCH_SIZE 128 with ", line)
    assert re.match(f"error: rank 0 lost contact: rank 1 has failed: rank 1: {FULL}: set ", one_line(peer))


def test_an_evaluation(small, tmp_path, weights):
    options = ("--eval", "--resume", weights, *training(tmp_path, "DATA.TEST_BATCH_SIZE", 100))
    line = one_line(small("main_repmlp.py", *options))
    assert re.fullmatch(rf"error: {FULL}: set a lower DATA.TEST_BATCH_SIZE \(-b\)", line)


def test_test_py(small, weights):
    line = one_line(small("test.py", "digits", "train", weights, "-a", ARCH, "-r", SIDE, "-b", 100, "-j", 0))
    assert re.fullmatch(rf"error: {FULL}: set a lower DATA.TEST_BATCH_SIZE \(-b\)", line)


def test_a_measurement_of_throughput(small, tmp_path):
    line = one_line(small("main_repmlp.py", "--throughput", *training(tmp_path)))
    assert re.fullmatch(f"error: {FULL}: lower DATA.BATCH_SIZE", line)
