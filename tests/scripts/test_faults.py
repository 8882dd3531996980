"""A training that is stopped, killed or disturbed: what a whole process leaves, and what the next makes of it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from script_runs import same

from utils.lock import folder_lock

ARCH = "RepMLPNet-Digits"
ROOT = Path(__file__).parents[2]
SHORT = f"--cfg {ROOT}/configs/quickstart.yaml --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 SAVE_FREQ 1"


def assert_equal_runs(run, reference) -> None:
    """The same records and weights, bit for bit."""
    assert (run.folder / "metrics.jsonl").read_bytes() == (reference.folder / "metrics.jsonl").read_bytes()
    assert same(run.weights(), reference.weights())


@pytest.fixture
def started(tmp_path):
    """The short training as a process of its own, in the middle of its first epoch; ended afterwards in any case."""
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k not in ("RANK", "WORLD_SIZE")
    }
    environment |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "main_repmlp.py", "--output", tmp_path, "--tag", "run", *SHORT.split()]
    log = tmp_path / ARCH / "run" / "log_rank0.txt"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and "Train: " in log.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield process
        process.kill()


def test_a_stopped_run_saves_and_goes_on_as_if_nothing_had_happened(started, trained, train, tmp_path):
    started.send_signal(signal.SIGTERM)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    folder = tmp_path / ARCH / "run"
    progress = torch.load(folder / "latest.pth", weights_only=True)["progress"]
    assert (progress["epoch"], progress["consumed"]) == (0, 64 * progress["update"])
    assert 10 <= progress["update"] < 22
    resumed = train(SHORT, output=tmp_path)
    assert f"update {progress['update']}" in resumed.result.out
    assert_equal_runs(resumed, trained)


def test_a_damaged_latest_checkpoint_is_passed_over(trained, train, tmp_path):
    folder = tmp_path / ARCH / "run"
    folder.mkdir(parents=True)
    for name in ("ckpt_epoch_0.pth", "metrics.jsonl"):
        shutil.copy(trained.folder / name, folder)
    (folder / "latest.pth").write_bytes((trained.folder / "latest.pth").read_bytes()[:10000])
    resumed = train(SHORT, output=tmp_path)
    assert "warning: passing over a checkpoint" in resumed.result.out
    assert_equal_runs(resumed, trained)


def test_a_folder_in_use_is_left_alone(trained, script, tmp_path):
    folder = Path(shutil.copytree(trained.folder, tmp_path / ARCH / "run"))

    def contents() -> dict[str, bytes]:
        # Whoever holds the lock drops it by closing that file, so it stays closed here.
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}

    before = contents()
    with folder_lock(folder):
        result = script("main_repmlp.py", "--output", tmp_path, "--tag", "run", *SHORT.split())
    after = contents()
    assert result.status not in (0, 1)
    (line,) = result.err.splitlines()
    assert line.startswith("error: another run")
    assert "another TAG" in line
    assert after == before


def test_a_full_disk_leaves_the_older_checkpoint_whole(trained, script, tmp_path):
    # A limit on the size of a file stands for the disk: it hits while a checkpoint is being written.
    folder = Path(shutil.copytree(trained.folder, tmp_path / ARCH / "run"))
    shutil.copy(trained.folder / "ckpt_epoch_0.pth", folder / "latest.pth")
    for name in ("best_ckpt.pth", "ckpt_epoch_1.pth"):
        (folder / name).unlink()
    before = (folder / "latest.pth").read_bytes()
    command = (
        f"ulimit -f 500; exec {sys.executable} {ROOT}/main_repmlp.py --output {tmp_path} --tag run {SHORT} "
        "TRAIN.BASE_LR 0.008"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode not in (0, 1), result.stdout
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert "could not be written, is the disk full?" in result.stderr
    assert (folder / "latest.pth").read_bytes() == before
    assert not list(folder.glob(".*.tmp"))
