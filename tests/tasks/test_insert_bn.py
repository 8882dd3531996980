"""Fine-tuning with MODEL.INSERT_BN for every task, in two processes: from converted weights to converted weights."""

import re
from pathlib import Path

import pytest
import torch
from task_recipes import keys_of, recipe_of

import models
from models.checkpoints import describe
from models.files import write_checkpoint


@pytest.fixture(scope="session")
def start_from(task, converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted weights that a training of the task can start from."""
    keys = keys_of(task.kind.name)
    if "SEG.BACKBONE_SIZE" not in keys:
        return converted
    parts = {part: [int(n) for n in keys[f"MODEL.{part.upper()}"].split(",")] for part in ("channels", "blocks")}
    parts["share_sets"] = [int(n) for n in keys["MODEL.SHARE_SETS"].split(",")]
    size, arch = int(keys["SEG.BACKBONE_SIZE"]), keys["MODEL.ARCH"]
    torch.manual_seed(0)
    classifier = models.create_model(arch, 3, img_size=size, deploy=True, **parts)
    path = tmp_path_factory.mktemp("classifier") / "deploy.pth"
    meta = describe(arch, classifier, (size, size), "deploy")
    write_checkpoint(path, {"model": classifier.state_dict(), "meta": meta})
    return path


def test_converted_weights_are_tuned_and_converted_again(task, start_from, script):
    run = task.train(f"MODEL.INSERT_BN True MODEL.PRETRAINED {start_from}", processes=2)
    assert "inserted BatchNorms calibrated on" in run.result.out
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
    words = task.words(task.new_folder(), "MODEL.INSERT_BN True", flags=f"--eval --resume {run.folder}/latest.pth")
    evaluated = script("main_repmlp.py", *words)
    assert (evaluated.status, evaluated.err) == (0, "")
    pattern = recipe_of(task.kind.name).log
    figure = run.records("eval")[-1][task.kind.metric]
    assert re.search(rf"\* .*{pattern}", evaluated.out)[1] == f"{figure:.3f}"
