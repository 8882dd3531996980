"""What is special about verification: people never seen, pairs of a list, directions that the loss learns."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pictures import write_patterns
from script_runs import Result, Run
from settings import settings
from task_recipes import keys_of
from training_parts import ALONE

from engine.parallel import NetworkWithLoss
from engine.precision import autocast
from models.checkpoints import read_checkpoint
from tasks.verification import LOSSES, Verification

LONGER = (
    "TRAIN.EPOCHS 3 DATA.BATCH_SIZE 16 TRAIN.ACCUMULATION_STEPS 1 TRAIN.EMA_ALPHA 0 TRAIN.CLIP_GRAD 0 "
    "MODEL.CHANNELS 32,64,128,256 MODEL.BLOCKS 1,2,2,1 FACE.EMBEDDING 16 FACE.NUM_PAIRS 200 FACE.FOLDS 10 "
    "TRAIN.OPTIMIZER.NAME sgd TRAIN.WEIGHT_DECAY 0.0005 TRAIN.BASE_LR 0.32"
)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen people to train on and eight others, of eight images each."""
    root = tmp_path_factory.mktemp("people")
    for number in range(24):
        write_patterns(root / ("train" if number < 16 else "val") / f"person {number:02}", number, 8, side=96)
    return root


def words(people: Path, output: Path, changes: str = LONGER, flags: str = "") -> list[str]:
    pairs = [word for pair in keys_of("verification", changes).items() for word in pair]
    return ["--data-path", str(people), "--output", str(output), *flags.split(), "--opts", *pairs]


@pytest.fixture(scope="module")
def learned(script, people: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("learned")
    result = script("main_repmlp.py", *words(people, output))
    assert (result.status, result.err) == (0, "")
    return Run(output, output / "RepMLP-FaceRes" / "run", result)


def figures(call, people: Path, mode: str, weights: Path, *opts: object) -> dict:
    path = weights.parent / "figures.json"
    result: Result = call("test.py", people, mode, weights, "-j", 0, "--json", path, "--opts", *opts)
    assert (result.status, result.err) == (0, ""), result.out
    found = json.loads(path.read_text())
    path.unlink()
    return found


def test_it_learns_to_tell_people_apart_whom_it_has_never_seen(learned):
    records = learned.records("eval")
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert records[-1]["pairs"] == 200
    assert records[-1]["accuracy"] > 85
    assert records[-1]["auc"] > 0.9


def test_the_checkpoint_holds_the_network_and_apart_from_it_what_the_loss_knows(learned):
    checkpoint = read_checkpoint(learned.folder / "latest.pth")
    assert (checkpoint.meta["arch"], checkpoint.meta["num_classes"]) == ("RepMLP-FaceRes", 16)
    assert checkpoint.payload["criterion"]["W"].shape == (16, 16)
    assert not any("criterion" in name or name == "W" for name in checkpoint.state_dict)


def test_conversion_keeps_every_figure(learned, people, call, tmp_path):
    best, deploy = learned.folder / "best_ckpt.pth", tmp_path / "deploy.pth"
    assert call("convert.py", best, deploy).status == 0
    before, after = (
        figures(call, people, mode, weights, "FACE.NUM_PAIRS", 200)
        for mode, weights in (("train", best), ("deploy", deploy))
    )
    assert before["accuracy"] == after["accuracy"] == max(r["accuracy"] for r in learned.records("eval"))
    assert after["auc"] == pytest.approx(before["auc"], abs=1e-6)
    assert after["threshold"] == pytest.approx(before["threshold"], abs=1e-4)


def test_pairs_of_a_list(learned, people, call, tmp_path):
    names = [f"person {number}" for number in range(16, 24)]
    same = [f"{p}/0.png\t{p}/{i}.png\tsame" for p in names for i in (1, 2, 3)]
    different = [f"{p}/0.png\t{q}/0.png\tdifferent" for p, q in pairwise(names) for _ in range(3)]
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("\n".join(["# some pairs", *same, "", *different]) + "\n")
    latest = learned.folder / "latest.pth"
    found = figures(call, people, "train", latest, "FACE.PAIRS", pairs, "FACE.FOLDS", 3)
    assert found["pairs"] == len(same) + len(different)
    changes = f"{LONGER} FACE.PAIRS {pairs} FACE.FOLDS 3"
    result = call("main_repmlp.py", *words(people, tmp_path, changes, f"--eval --resume {latest}"))
    assert f"on {found['pairs']} pairs" in result.out

    pairs.write_text("person 16/0.png\tperson 16/99.png\tsame\n")
    for command in (
        ("main_repmlp.py", *words(people, tmp_path / "new", changes)),  # before a training, and not after an epoch
        ("test.py", people, "train", latest, "--opts", "FACE.PAIRS", pairs),
    ):
        result = call(*command)
        assert result.status == 2
        assert "line 1: there is no image person 16/99.png" in result.err
    assert not (tmp_path / "new").exists()


def test_pretrained_weights_have_another_embedding(learned, people, script, tmp_path):
    changes = f"{LONGER} FACE.EMBEDDING 8 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 TRAIN.BASE_LR 0"
    result = script("main_repmlp.py", *words(people, tmp_path, changes, f"--pretrained {learned.folder}/latest.pth"))
    assert result.status == 0, result.err
    assert "which are new (" in result.out
    own = torch.load(tmp_path / "RepMLP-FaceRes" / "run" / "latest.pth", weights_only=True)["model"]
    given = learned.weights()
    kernels = [name for name in own if name.endswith("fc3.weight")]
    assert kernels
    assert all(torch.equal(own[name], given[name]) for name in kernels)
    assert {name for name in own if own[name].shape != given[name].shape} == {
        name for name in own if name.startswith("linear.") and not name.endswith("num_batches_tracked")
    }


def loss_of(people: Path, changes: str, embedding: int) -> torch.nn.Module:
    opts = f"TASK verification DATA.DATASET faces DATA.DATA_PATH {people} {changes}"
    return Verification(settings(opts), ALONE).build_criterion(embedding)


def angular(cosines: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.acos(cosines) + math.radians(28.6))


@pytest.mark.parametrize(
    ("changes", "scale", "with_margin"),
    [
        ("FACE.LOSS arcface", 64, angular),
        ("FACE.LOSS cosface", 64, lambda cosines: cosines - 0.35),
        ("FACE.LOSS amsoftmax", 30, lambda cosines: cosines - 0.35),
        ("FACE.LOSS amsoftmax FACE.SCALE 20 FACE.MARGIN 0.4", 20, lambda cosines: cosines - 0.4),
        ("FACE.LOSS arcface FACE.SCALE 20", 20, angular),
    ],
)
def test_a_loss_is_that_of_its_paper(people, changes, scale, with_margin):
    """The cross entropy of the cosines times the scale, with the margin in that of the right person."""
    torch.manual_seed(0)  # an angle that exceeds 180 degrees with its margin has another formula
    criterion = loss_of(people, changes, 4).double()
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 15, 3, 7, 1])
    cosines = F.normalize(embeddings) @ F.normalize(criterion.W, dim=0)
    rows = torch.arange(6)
    logits = cosines.clone()
    logits[rows, labels] = with_margin(cosines[rows, labels])
    expected = F.cross_entropy(scale * logits, labels)
    torch.testing.assert_close(criterion(embeddings, labels), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_directions_of_people_stay_in_single_precision(people, loss, amp):
    """As the library has it, they would take over the precision of the embeddings, and keep it."""
    criterion = loss_of(people, f"FACE.LOSS {loss}", 4)
    with torch.no_grad():
        before = criterion.W.clone()
    network = torch.nn.Linear(3, 4)
    with autocast(ALONE.device, amp):
        value = NetworkWithLoss(network, criterion)(torch.randn(2, 3), torch.tensor([0, 15]))
    value.backward()
    assert value.dtype == criterion.W.dtype == criterion.W.grad.dtype == torch.float32
    assert torch.equal(criterion.W, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("FACE.FOLDS 1", "FACE.FOLDS = 1"),
        ("FACE.FOLDS 1000", "1000 folds: 2 at least are needed"),
        ("MODEL.ARCH RepMLP-FaceRez", "did you mean RepMLP-FaceRes?"),
        ("DATA.BATCH_SIZE 1000", "lower DATA.BATCH_SIZE"),
        ("AUG.MIXUP 0.4", "TASK verification does not use AUG.MIXUP"),
    ],
)
def test_mistakes(call, people, tmp_path, changes, message):
    result = call("main_repmlp.py", *words(people, tmp_path / "output", f"{LONGER} {changes}"))
    assert result.status == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_another_loss_or_other_people_are_another_run(learned, people, call):
    """Their directions would not fit."""
    before = (learned.folder / "latest.pth").read_bytes()
    fewer = people.parent / "fewer"
    if not fewer.exists():
        (fewer / "train").mkdir(parents=True)
        (fewer / "val").symlink_to(people / "val")
        for folder in sorted((people / "train").iterdir())[1:]:
            (fewer / "train" / folder.name).symlink_to(folder)
    result = call("main_repmlp.py", *words(fewer, learned.output, f"{LONGER} TRAIN.EPOCHS 4"))
    assert result.status == 2
    assert "another loss or other classes: give this run another TAG" in result.err
    assert (learned.folder / "latest.pth").read_bytes() == before


def test_cosface_too(script, people, tmp_path):
    changes = f"{LONGER} FACE.LOSS cosface TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
    result = script("main_repmlp.py", *words(people, tmp_path, changes))
    assert (result.status, result.err) == (0, "")
    assert result.out.count("eval: accuracy") == 1
