"""Fine-tuning with MODEL.INSERT_BN for every task, in two processes: from converted weights to converted weights."""

import re
from pathlib import Path

import pytest
import torch
from task_recipes import keys_of, recipe_of

from models import create_model, default_image_size
from models.checkpoints import describe
from models.files import write_checkpoint

# What the recipes need to have an FC3, and to start from weights.
CHANGES = {"segmentation": "SEG.BACKBONE_SIZE None", "verification": "MODEL.BLOCKS 2,1,1,1"}
SIZES = {"segmentation": (32, 32)}
PARTS = ("channels", "blocks", "share_sets")


@pytest.fixture
def start_from(task, tmp_path: Path) -> Path:
    """Converted weights that a training of the task can start from."""
    name = task.kind.name
    keys = keys_of(name, CHANGES.get(name, ""))
    arch = keys["MODEL.ARCH"]
    given = {part: keys[f"MODEL.{part.upper()}"] for part in PARTS if f"MODEL.{part.upper()}" in keys}
    parts = {part: [int(number) for number in text.split(",")] for part, text in given.items()}
    size = SIZES.get(name, default_image_size(arch))
    torch.manual_seed(0)
    outputs = int(keys.get("FACE.EMBEDDING", 2))
    network = create_model(arch, outputs, img_size=size, deploy=True, **parts)
    meta = describe(arch, network, size, "deploy")
    write_checkpoint(tmp_path / "deploy.pth", {"model": network.state_dict(), "meta": meta})
    return tmp_path / "deploy.pth"


def test_converted_weights_are_tuned_and_converted_again(task, start_from, script):
    changes = f"MODEL.INSERT_BN True {CHANGES.get(task.kind.name, '')}"
    run = task.train(f"{changes} MODEL.PRETRAINED {start_from}", processes=2)
    assert "inserted BatchNorms calibrated on 6 batches of each process" in run.result.out
    state = torch.load(run.folder / "latest.pth", weights_only=True)
    inserted = [name for name in state["model"] if ".fc3_bn." in name]
    assert inserted
    assert not any(".repconv" in name for name in state["model"])
    assert all((state["model"][name] != 0).any() for name in inserted)
    assert state["meta"]["form"] == "train"
    target = task.new_folder() / "deploy.pth"
    result = script("convert.py", run.folder / "latest.pth", target)
    assert (result.status, result.err) == (0, "")
    assert not any(".fc3_bn." in name for name in torch.load(target, weights_only=True)["model"])
    again = script("convert.py", target, target.with_name("inserted.pth"), "--insert-bn")
    assert (again.status, again.err) == (0, "")
    words = task.words(task.new_folder(), changes, flags=f"--eval --resume {run.folder}/latest.pth")
    evaluated = script("main_repmlp.py", *words)
    assert (evaluated.status, evaluated.err) == (0, "")
    pattern = recipe_of(task.kind.name).log
    figure = run.records("eval")[-1][task.kind.metric]
    assert re.search(rf"\* .*{pattern}", evaluated.out)[1] == f"{figure:.3f}"
