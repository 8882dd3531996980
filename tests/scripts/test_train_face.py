"""`tools/train_face.py` as a user runs it: on people who are coloured patterns, from training to converted weights."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine.verification import verify
from PIL import Image

from engine.train import Progress
from models.checkpoints import read_checkpoint
from tools import train_face
from utils.log import MetricsWriter

ROOT = Path(__file__).parents[2]
TINY = "--channels 32 64 128 256 --blocks 1 2 2 1 --embedding 16 -b 16 -j 0 --lr 0.02 --num-pairs 200 --epochs 3"
IMAGES = 8


def draw_person(folder: Path, seed: int) -> None:
    """Writes noisy images of one person: a pattern of 4x4 colours that is theirs alone."""
    rng = np.random.default_rng(seed)
    pattern = rng.integers(40, 216, (4, 4, 3)).repeat(24, 0).repeat(24, 1)
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        noise = rng.normal(rng.normal(0, 10), 12, pattern.shape)
        Image.fromarray((pattern + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("people")
    for number in range(24):
        draw_person(root / ("train" if number < 16 else "val") / f"person {number:02}", number)
    return root


@pytest.fixture(scope="module")
def face(script, people: Path, tmp_path_factory: pytest.TempPathFactory):
    """Returns a function that runs the tool on the people, and the output folder that it writes to."""
    output = tmp_path_factory.mktemp("output")

    def run(*arguments: object, tiny: bool = True):
        return script("tools/train_face.py", people, *(TINY.split() if tiny else []), "--output", output, *arguments)

    run.output = output / "RepMLP-FaceRes"
    return run


@pytest.fixture(scope="module")
def trained(face) -> Path:
    result = face("--tag", "first")
    assert (result.status, result.err) == (0, "")
    return face.output / "first"


def evaluations(folder: Path) -> list[dict]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "eval"]


def test_it_learns_to_tell_people_apart_whom_it_has_never_seen(trained: Path) -> None:
    last = evaluations(trained)[-1]
    assert [record["epoch"] for record in evaluations(trained)] == [0, 1, 2]
    assert last["pairs"] == 200
    assert last["accuracy"] > 85
    assert last["auc"] > 0.9


def test_the_checkpoint_holds_the_network_and_apart_from_it_what_the_loss_knows(trained: Path) -> None:
    checkpoint = read_checkpoint(trained / "latest.pth")
    assert (checkpoint.meta["arch"], checkpoint.meta["num_classes"]) == ("RepMLP-FaceRes", 16)
    assert checkpoint.payload["criterion"]["W"].shape == (16, 16)
    assert not any("criterion" in name or name == "W" for name in checkpoint.state_dict)


def test_embeddings_that_are_not_finite_make_no_best_epoch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor do they end the training."""
    pairs = (torch.tensor([0, 2, 0, 1]), torch.tensor([1, 3, 2, 3]), torch.tensor([True, True, False, False]))
    torch.manual_seed(0)
    embeddings, metrics = torch.randn(4, 3).double(), MetricsWriter(tmp_path)
    progress, logger = Progress(epoch=1, update=7), logging.getLogger("tests.scripts")
    trainer = SimpleNamespace(progress=progress, logger=logger, metrics=metrics, network=None)
    best = [train_face.evaluate_epoch(trainer, lambda _: verify(embeddings, *pairs, folds=2))]
    accuracy, embeddings[3, 0] = progress.best_top1, torch.nan
    best.append(train_face.evaluate_epoch(trainer, lambda _: verify(embeddings, *pairs, folds=2)))
    metrics.close()
    assert best == [True, False]
    assert progress.best_top1 == accuracy == evaluations(tmp_path)[0]["accuracy"]
    assert evaluations(tmp_path)[1]["accuracy"] is None
    assert "Epoch 0 eval: the embeddings of 1 images are not finite numbers" in caplog.text


def test_conversion_keeps_the_accuracy(trained: Path, face, user, tmp_path: Path) -> None:
    best = trained / "best_ckpt.pth"
    converted = user("convert.py", best, tmp_path / "deploy.pth")
    assert converted.status == 0, converted.err
    figures = []
    for weights in (best, tmp_path / "deploy.pth"):
        result = face("--eval", weights, "--json", tmp_path / "a.json", "--num-pairs", 200, "-j", 0, tiny=False)
        assert (result.status, result.err) == (0, "")
        figures.append(json.loads((tmp_path / "a.json").read_text()))
    before, after = figures
    assert before["accuracy"] == after["accuracy"] == max(e["accuracy"] for e in evaluations(trained))
    assert after["auc"] == pytest.approx(before["auc"], abs=1e-6)
    assert after["threshold"] == pytest.approx(before["threshold"], abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(trained: Path, face, people: Path) -> None:
    folder = face.output / "killed"
    words = [sys.executable, "-m", "tools.train_face", people, *TINY.split(), "--output", face.output.parent]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*map(str, words), "--tag", "killed"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not (folder / "latest.pth").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = torch.load(folder / "latest.pth", weights_only=True)["progress"]["epoch"]
    assert 0 < done < 3
    assert face("--tag", "killed").status == 0
    whole, resumed = (torch.load(path / "latest.pth", weights_only=True) for path in (trained, folder))
    assert all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    assert torch.equal(whole["criterion"]["W"], resumed["criterion"]["W"])
    assert (trained / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_pairs_from_a_list(trained: Path, face, tmp_path: Path) -> None:
    people = [f"person {number}" for number in range(16, 24)]
    same = [f"{p}/0.png\t{p}/{i}.png\tsame" for p in people for i in (1, 2, 3)]
    different = [f"{p}/0.png\t{q}/0.png\tdifferent" for p, q in pairwise(people) for _ in range(3)]
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("\n".join(["# some pairs", *same, "", *different]) + "\n")
    result = face("--eval", trained / "latest.pth", "--pairs", pairs, "--folds", 3, "-j", 0, tiny=False)
    assert (result.status, result.err) == (0, "")
    assert f"on {len(same) + len(different)} pairs" in result.out

    pairs.write_text("person 16/0.png\tperson 16/99.png\tsame\n")
    result = face("--eval", trained / "latest.pth", "--pairs", pairs, tiny=False)
    assert result.status == 2
    assert "line 1: there is no image person 16/99.png" in result.err


def test_mistakes_end_in_one_line(face, people: Path, user, tmp_path: Path) -> None:
    for words, message in (
        (("--epochs", 0), "must be at least 1"),
        (("--tag", "x", "-b", 1000), "lower --batch-size"),
        (("--tag", "x", "--folds", 1), "folds"),
        (("--tag", "x", "-a", "RepMLP-FaceRez"), "did you mean RepMLP-FaceRes?"),
    ):
        result = face(*words)
        assert result.status == 2
        assert message in result.err
        assert len(result.err.splitlines()) == 1


def test_cosface_too(face) -> None:
    result = face("--loss", "cosface", "--tag", "cosface", "--epochs", 1)
    assert (result.status, result.err) == (0, "")
    assert len(evaluations(face.output / "cosface")) == 1
