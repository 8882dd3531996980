"""The task that docs/extending.md adds as an example trains, resumes, evaluates and converts as the others do."""

import importlib.util
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import in_process
import pytest
import torch
from script_runs import Result, Run

import tasks
from configs import constraints
from data import Batch

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/extending.md").read_text()
RECIPE = "configs/digits_multilabel.yaml"
SHORT = ["TRAIN.WARMUP_EPOCHS", "1", "PRINT_FREQ", "10"]


def code_of(path: str) -> str:
    """Returns the code block of the document that follows the name of a file and a colon."""
    found = re.search(rf"`{re.escape(path)}`:\n\n```\w+\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/extending.md shows no {path}"
    return found[1]


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module of the document, with its class among the tasks."""
    path = tmp_path_factory.mktemp("tasks") / "multilabel.py"
    path.write_text(code_of("tasks/multilabel.py"))
    spec = importlib.util.spec_from_file_location("tasks.multilabel", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        patch.setitem(tasks.TASKS, module.MultiLabel.name, module.MultiLabel)
        # The schema reads the names once, when it is imported.
        patch.setitem(constraints.CONSTRAINTS, "TASK", constraints.one_of(tasks.TASKS))
        yield module


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of the document, beside the one that it is based on."""
    folder = tmp_path_factory.mktemp("configs")
    shutil.copy(ROOT / "configs/quickstart.yaml", folder)
    path = folder / Path(RECIPE).name
    path.write_text(code_of(RECIPE))
    return path


@pytest.fixture(scope="module")
def trained(module: ModuleType, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs, started again after the first."""
    output = tmp_path_factory.mktemp("output")
    for epochs in ("2", "3"):
        options = ["--cfg", recipe, "--output", output, "--opts", "TRAIN.EPOCHS", epochs, *SHORT]
        assert in_process.status_of("main_repmlp.py", *options, folder=output) == 0
    folder = output / "RepMLPNet-Digits" / "multilabel"
    return Run(output, folder, Result(0, (folder / "log_rank0.txt").read_text(), ""))


def test_the_row_of_the_registry_is_shown(module: ModuleType) -> None:
    shown, present = code_of("tasks/__init__.py").splitlines(), (ROOT / "tasks/__init__.py").read_text().splitlines()
    assert {line[1:] for line in shown if line.startswith("-")} <= {*present}
    changed = [line for line in present if f"-{line}" not in shown]
    source = "\n".join([*changed, *(line[1:] for line in shown if line.startswith("+"))])
    registry = {"__name__": "tasks", "__package__": "tasks"}
    exec(compile(source, "tasks/__init__.py", "exec"), registry)
    assert registry["TASKS"] == tasks.TASKS


def test_it_learns_and_records_its_metric(trained: Run) -> None:
    figures = [record["map"] for record in trained.records("eval")]
    assert len(figures) == 3
    assert figures[-1] > 95  # a random order gives the share of positives, 40 to 50


def test_its_metric_selects_the_best_checkpoint(trained: Run) -> None:
    best = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    assert best["metric"] == "map"
    assert best["meta"]["task"] == "multilabel"
    assert best["progress"]["best_metric"] == max(record["map"] for record in trained.records("eval"))


def test_it_resumes(trained: Run) -> None:
    assert trained.result.out.count("resuming from") == 1
    assert [record["epoch"] for record in trained.records("train_epoch")] == [0, 1, 2]


def test_it_evaluates_converts_and_checks(trained: Run, recipe: Path, call: Callable[..., Result]) -> None:
    weights, deploy = trained.folder / "best_ckpt.pth", trained.output / "deploy.pth"
    figure = f"mAP {max(record['map'] for record in trained.records('eval')):.3f}"
    evaluation = call("main_repmlp.py", "--cfg", recipe, "--output", trained.output, "--eval", "--resume", weights)
    assert (evaluation.status, figure in evaluation.out) == (0, True)
    assert call("convert.py", weights, deploy).status == 0
    for mode, path in (("train", weights), ("check", weights), ("deploy", deploy)):
        result = call("test.py", "digits", mode, path, "-j", "0")
        assert (result.status, figure in result.out) == (0, True), result.err


def test_a_setting_that_it_does_not_use_is_refused(
    recipe: Path, module: ModuleType, call: Callable[..., Result]
) -> None:
    result = call("main_repmlp.py", "--cfg", recipe, "--opts", "AUG.MIXUP", "0.4")
    assert result.status == 2
    assert "TASK multilabel does not use AUG.MIXUP" in result.err


def test_mean_average_precision(module: ModuleType) -> None:
    logits = torch.tensor([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0], [math.nan, 9.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    metric = module.MultiLabelMetric(torch.device("cpu"), 2)
    for part in ([3, 0], [4, 2, 1]):
        batch = Batch(torch.empty(len(part)), labels[part], torch.tensor(part), [])
        metric.update(logits[part], batch)
    result = metric.compute()
    # The first label is right at ranks 1 and 3, the second at ranks 1 and 2; the image without a finite answer is last.
    assert result.ap == pytest.approx([100 * (1 + 2 / 3) / 2, 100.0])
    assert result.map == pytest.approx(100 * 11 / 12)
    assert (result.images, result.nonfinite) == (5, 1)
