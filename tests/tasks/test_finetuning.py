"""Converted weights as the start of a training: its structure, exact resume, evaluation, contradictions."""

import re
from pathlib import Path

import pytest
import torch
from script_runs import Run
from settings import settings
from task_recipes import evaluation_opts, keys_of
from training_parts import ALONE

from models import create_model
from models.checkpoints import describe, read_checkpoint
from models.files import write_checkpoint
from models.reparam import randomize_statistics, to_deploy
from tasks import TASKS
from tools import soak

# Parts of the structure in `task_recipes`, as `create_model` names them.
PARTS = {"MODEL.CHANNELS": "channels", "MODEL.BLOCKS": "blocks", "MODEL.SHARE_SETS": "share_sets"}
SIZE = "SEG.BACKBONE_SIZE"  # which pretrained weights tell themselves


@pytest.fixture(scope="session")
def changes(task) -> str:
    """What pretrained weights change in the recipe of a task."""
    return f"{SIZE} null" if SIZE in keys_of(task.kind.name) else ""


@pytest.fixture(scope="session")
def pretrained(task) -> Path:
    """Converted weights of the network of a task, or of its backbone, with seven outputs."""
    keys, path = keys_of(task.kind.name), task.new_folder() / "deploy.pth"
    arch, structure = keys["MODEL.ARCH"], {part: keys[key] for key, part in PARTS.items() if key in keys}
    options = {part: [int(count) for count in counts.split(",")] for part, counts in structure.items()}
    torch.manual_seed(0)
    model = create_model(arch, 7, **options, **({"img_size": int(keys[SIZE])} if SIZE in keys else {}))
    randomize_statistics(model)
    deploy = to_deploy(model)
    write_checkpoint(path, {"model": deploy.state_dict(), "meta": describe(arch, deploy, deploy.img_size, "deploy")})
    return path


@pytest.fixture(scope="session")
def tuned(task, pretrained, changes) -> Run:
    """The short training of a task from these weights."""
    return task.train(changes, flags=f"--pretrained {pretrained}")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_training_takes_the_structure_and_the_weights(task, pretrained, changes):
    pairs = {"MODEL.PRETRAINED": str(pretrained), "DATA.DATA_PATH": str(task.images)}
    words = " ".join(f"{key} {value}" for key, value in (keys_of(task.kind.name, changes) | pairs).items())
    kind = TASKS[task.kind.name](settings(words), ALONE)
    weights = kind.read_pretrained()
    network = kind.build_network(kind.num_outputs(), weights)
    kind.load_pretrained(network, weights)
    own = {name.removeprefix("model.encoder.model.model."): value for name, value in network.state_dict().items()}
    taken = [name for name, value in weights.state_dict.items() if name in own and torch.equal(own[name], value)]
    assert [name for name in taken if name.endswith(("fc3.bias", "conv.bias"))]
    left = {name.split(".")[0] for name in weights.state_dict.keys() - {*taken}}
    # SEG.DOWNSAMPLE takes the embeddings apart; the head has other outputs.
    assert left == ({"embeds", "head_norm", "head"} if task.kind.name == "segmentation" else {network.classifier})


def test_its_checkpoints_are_of_the_deploy_form(task, tuned, pretrained, call, tmp_path):
    assert f"in the deploy structure, since the weights in {pretrained} are converted" in tuned.result.out
    for name in ("latest.pth", "best_ckpt.pth", "best_ema.pth", "ckpt_epoch_0.pth"):
        checkpoint = read_checkpoint(tuned.folder / name)
        assert (checkpoint.form, checkpoint.meta["form"]) == ("deploy", "deploy")
        assert not [key for key in checkpoint.state_dict if ".repconv" in key or ".fc3_bn." in key]
    best = max(record[task.kind.metric] for record in tuned.records("eval"))
    evaluated = call("test.py", task.images, "deploy", tuned.folder / "best_ckpt.pth", "-j", 0, *evaluation_opts(task))
    flags = f"--eval --resume {tuned.folder / 'best_ckpt.pth'}"
    in_main = call("main_repmlp.py", *task.words(tmp_path, flags=flags))
    for result in (evaluated, in_main):
        assert (result.status, result.err) == (0, "")
        assert re.search(rf"{task.kind.metric_label} {best:.3f} ", result.out)
    refused = call("convert.py", tuned.folder / "best_ckpt.pth", tmp_path / "again.pth")
    assert (refused.status, "is converted already" in refused.err) == (2, True)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("again", [True, False], ids=["with the weights", "without them"])
def test_a_killed_run_goes_on_exactly_where_it_was(task, tuned, pretrained, changes, again, processes):
    flags, output = f"--pretrained {pretrained}", task.new_folder()
    whole = tuned if processes == 1 else task.train(changes, flags=flags, processes=2)
    saves = f"{changes} SAVE_STEPS 2"
    task.interrupt(output, 5, saves, processes=processes, kill=True, flags=flags)
    if again:
        resumed = task.train(changes, output=output, processes=processes, flags=flags)
        assert soak.differences(whole.folder, resumed.folder) == []
    else:  # the configuration in the files differs
        resumed = task.train(output=output, processes=processes)
        assert f"in the deploy structure, since the weights in {resumed.folder}/latest.pth" in resumed.result.out
        for key in ("model", "ema"):
            assert same(whole.weights(key=key), resumed.weights(key=key))
    assert "latest.pth, update 4" in resumed.result.out


def test_it_goes_on_from_a_numbered_checkpoint_in_a_new_folder(task, tuned):
    resumed = task.train("TAG other", flags=f"--resume {tuned.folder}/ckpt_epoch_0.pth")
    assert same(tuned.weights(), resumed.weights())


def test_a_run_of_the_other_form_does_not_go_on(task, finished, pretrained, changes, refused):
    output = task.new_folder()
    task.folder_in(output).mkdir(parents=True)
    (task.folder_in(output) / "latest.pth").hardlink_to(finished.folder / "ckpt_epoch_0.pth")
    said = refused("main_repmlp.py", *task.words(output, changes, flags=f"--pretrained {pretrained}"))
    assert "form train instead of deploy" in said


def test_branches_that_the_weights_do_not_have_are_refused(task, pretrained, changes, refused):
    words = task.words(task.new_folder(), f"{changes} MODEL.BRANCHES 3", flags=f"--pretrained {pretrained}")
    said = refused("main_repmlp.py", *words)
    assert f"MODEL.BRANCHES 3: the weights in {pretrained} are converted and have no branches" in said


def test_throughput_has_one_structure(task, pretrained, changes, call, tmp_path):
    flags = f"--throughput --pretrained {pretrained}"
    result = call("main_repmlp.py", *task.words(tmp_path, changes, flags=flags))
    assert (result.status, result.err) == (0, "")
    assert re.findall(r"(training|deploy) structure, batch 4", result.out) == ["deploy"]
