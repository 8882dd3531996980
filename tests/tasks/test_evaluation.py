"""Weights of every task evaluate to the same figures by every script, before and after conversion."""

import json
import re

import pytest
import torch
from in_process import main_of
from task_recipes import evaluation_opts, recipe_of

from models.reparam import Reparameterizable

ONE_BY_ONE = "DATA.TEST_BATCH_SIZE 1"  # so that rounding does not depend on the process that an image is in


def figure(text: str, task) -> str:
    """The figure of the only evaluation in a text."""
    (found,) = re.findall(recipe_of(task.kind.name).log, text)
    return found


def figures_of(task, call, mode: str, weights, *flags: object) -> dict:
    """What `test.py` finds, from its JSON."""
    path = task.new_folder() / "figures.json"
    section = [] if task.kind.section is None else evaluation_opts(task)
    data = [task.images, mode, weights, "-j", 0, "--json", path]
    result = call("test.py", *data, *flags, *section)
    assert result.status == 0, result.out + result.err
    return json.loads(path.read_text())


def best(run, task, kind: str = "eval") -> float:
    return max(record[task.kind.metric] for record in run.records(kind))


@pytest.fixture(scope="session")
def alone(task, finished, start) -> str:
    """The best weights, evaluated by one process: everything that the line in the log says."""
    process = task.start(task.new_folder(), ONE_BY_ONE, flags=f"--eval --resume {finished.folder}/best_ckpt.pth")
    assert process.wait() == 0, process.err
    return process.out.splitlines()[-1].split(" * ")[1]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_counts_alike(task, finished, alone, processes):
    """The sets are of 5, 7 and 9 images; see tests/distributed for fewer images than processes."""
    flags = f"--eval --resume {finished.folder}/best_ckpt.pth"
    ranks = task.start_ranks(processes, task.new_folder(), ONE_BY_ONE, flags=flags)
    assert {process.wait() for process in ranks} == {0}, [process.err for process in ranks]
    assert ranks[0].out.splitlines()[-1].split(" * ")[1] == alone
    assert not any(" * " in process.out for process in ranks[1:])


def test_evaluating_gives_the_figure_of_the_training(task, finished, call, tmp_path):
    words = task.words(tmp_path, flags=f"--eval --resume {finished.folder}/best_ckpt.pth")
    result = call("main_repmlp.py", *words)
    assert (result.status, result.err) == (0, "")
    assert figure(result.out, task) == f"{best(finished, task):.3f}"
    assert {path.name for path in task.folder_in(tmp_path).iterdir()} == {"log_rank0.txt"}


def test_an_evaluation_needs_no_training_images(task, finished, call, tmp_path):
    images = tmp_path / "images"
    for folder in task.images.rglob("val"):
        (images / folder.relative_to(task.images)).parent.mkdir(parents=True, exist_ok=True)
        (images / folder.relative_to(task.images)).symlink_to(folder)
    words = task.words(tmp_path, flags=f"--eval --resume {finished.folder}/best_ckpt.pth", images=images)
    result = call("main_repmlp.py", *words)
    assert result.status == 0, result.err
    assert figure(result.out, task) == f"{best(finished, task):.3f}"


def test_the_scripts_agree_and_conversion_keeps_the_figures(task, finished, converted, call, tmp_path):
    train = figures_of(task, call, "train", finished.folder / "best_ckpt.pth")
    deploy = figures_of(task, call, "deploy", converted)
    assert train[task.kind.metric] == pytest.approx(best(finished, task), abs=1e-9)
    assert deploy == {name: pytest.approx(value, abs=1e-3) for name, value in train.items()}
    result = call("main_repmlp.py", *task.words(tmp_path, flags=f"--eval --resume {converted}"))
    assert result.status == 0, result.err
    assert "deploy weights" in result.out
    assert figure(result.out, task) == f"{best(finished, task):.3f}"


def test_check_compares_both_structures(task, finished, call):
    found = figures_of(task, call, "check", finished.folder / "best_ckpt.pth")
    assert found[task.kind.metric] == pytest.approx(best(finished, task), abs=1e-9)
    assert found["injected"][task.kind.metric] == pytest.approx(found[task.kind.metric])
    assert 0 < found["difference"] < 1e-4
    assert found["agreement"] is None or found["agreement"] > 99.9


def test_check_sees_a_conversion_that_is_wrong(task, finished, call, monkeypatch):
    def broken(network):
        network = deployed(network)
        with torch.no_grad():
            block = next(module for module in network.modules() if isinstance(module, Reparameterizable))
            for parameter in block.parameters():
                parameter.mul_(1.5)
        return network

    names = main_of("test.py").__globals__
    deployed = names["to_deploy"]
    monkeypatch.setitem(names, "to_deploy", broken)
    result = call("test.py", task.images, "check", finished.folder / "best_ckpt.pth", "-j", 0, *evaluation_opts(task))
    assert (result.status, result.err) == (1, "")
    assert "FAILED, beyond the tolerance" in result.out


def test_the_averaged_weights(task, finished, call):
    path = finished.folder / "best_ema.pth"
    average, raw = figures_of(task, call, "train", path), figures_of(task, call, "train", path, "--no-ema")
    assert average[task.kind.metric] == pytest.approx(best(finished, task, "eval_ema"), abs=1e-9)
    assert average != raw
    again = figures_of(task, call, "train", finished.folder / "latest.pth", "--ema")
    assert again[task.kind.metric] == pytest.approx(finished.records("eval_ema")[-1][task.kind.metric], abs=1e-9)


def test_modes_refuse_weights_in_the_other_form(task, finished, converted, refused):
    for mode, weights, remedy in (
        ("train", converted, "mode deploy"),
        ("check", converted, "training weights"),
        ("deploy", finished.folder / "best_ckpt.pth", "python convert.py"),
    ):
        assert remedy in refused("test.py", task.images, mode, weights, *evaluation_opts(task))
    assert "is converted already" in refused("convert.py", converted, converted.with_name("twice.pth"))


def test_deploy_weights_name_the_task(task, finished, converted):
    meta = torch.load(converted, weights_only=True)["meta"]
    trained = torch.load(finished.folder / "best_ckpt.pth", weights_only=True)["meta"]
    assert (meta["task"], meta["form"], meta["dataset"]) == (task.kind.name, "deploy", task.kind.default_dataset)
    assert meta.keys() == trained.keys()
    assert ("class_names" in meta) == (task.kind.labels != "identities"), "people are not to be passed on with weights"
    assert {k for k, v in meta.items() if v != trained[k]} <= {"form", "network"}


def test_throughput_looks_at_no_images(task, call, tmp_path):
    flags = f"--throughput --resume {tmp_path / 'absent.pth'}"
    result = call("main_repmlp.py", *task.words(tmp_path / "output", flags=flags, images=tmp_path / "absent"))
    assert (result.status, result.err) == (0, "")
    assert "warning: MODEL.RESUME is ignored: speed is measured with fresh weights" in result.out
    rates = re.findall(r"(training|deploy) structure, batch 4, 1 threads: [\d.]+ img/s", result.out)
    assert rates == ["training", "deploy"]


def test_a_summary_looks_at_no_images(task, call, tmp_path):
    result = call("main_repmlp.py", *task.words(tmp_path / "output", flags="--summary", images=tmp_path / "absent"))
    assert (result.status, result.err) == (0, "")
    counted = [int(number.replace(",", "")) for number in re.findall(r"^all +(.*)$", result.out, re.M)[0].split()]
    before, after, operations, operations_after = counted
    assert before != after
    assert operations >= operations_after > 0
    assert not (tmp_path / "output").exists()
