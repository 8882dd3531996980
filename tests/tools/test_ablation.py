"""`tools.ablation` at its smallest: it trains, does nothing twice, tells settings apart, reports what runs recorded."""

import json
import re
from pathlib import Path

import pytest
import torch
from training_parts import ALONE

from tasks import TASKS
from tools import ablation
from tools.ablation import VARIANTS, Row, Variant, run_of

ROOT = Path(__file__).parents[2]
ROWS = ("RepMLPNet-Shapes none", "RepMLPNet-Shapes 1x1 and 3x3")
TINY = "DATA.IMG_SIZE 8 DATA.BATCH_SIZE 500 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"


def table(text: str) -> list[list[str]]:
    """The cells of every line of a Markdown table in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def ablate(script, tmp_path_factory):
    """Returns a function that runs the tool on two rows with one seed, always in the same output folder."""
    output = tmp_path_factory.mktemp("ablation")

    def run(*arguments: str, opts: str = TINY):
        rows = ("--only", *ROWS, "--seeds", 3, "--output", output)
        return output, script("tools/ablation.py", *rows, *arguments, "--opts", *opts.split(), folder=ROOT)

    return run


@pytest.fixture(scope="module")
def finished(ablate):
    """The output folder after a first call, and what that printed."""
    output, result = ablate()
    assert result.status == 0, result.err
    return output, result


def test_the_table_holds_what_the_runs_recorded(finished):
    output, result = finished
    assert "0 of 2 trainings are finished" in result.out
    for name in ("none", "1x1_and_3x3"):
        lines = (output / "RepMLPNet-Shapes" / f"{name}-seed3" / "metrics.jsonl").read_text().splitlines()
        (record,) = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
        assert record["images"] == 2000
        cells = ["branches", "RepMLPNet-Shapes", name.replace("_", " "), "1", *[f"{record['top1']:.2f}"] * 3]
        assert cells in [row[:-1] for row in table(result.out)]


@pytest.mark.slow
def test_conversion_keeps_the_accuracy(finished):
    line = re.search(
        r"seed 3, in float32: ([\d.]+) % before conversion, ([\d.]+) % after, .* difference (\S+)", finished[1].out
    )
    before, after, difference = map(float, line.groups())
    assert before == after
    assert difference < 1e-4


@pytest.mark.slow
def test_what_has_ended_is_not_trained_again(finished, ablate, tmp_path):
    output, first = finished
    checkpoints = {path: path.stat().st_mtime_ns for path in output.rglob("ckpt_*.pth")}
    again = ablate("--json", str(tmp_path / "figures.json"))[1]
    assert again.status == 0, again.err
    assert "2 of 2 trainings are finished" in again.out
    assert again.out.split("\n\n", 1)[1] == first.out.split("\n\n", 1)[1]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("ckpt_*.pth")} == checkpoints
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in figures["rows"]] == ["none", "1x1 and 3x3"]
    assert figures["rows"][1]["top1"] == {"3": figures["rows"][1]["mean"]}
    (check,) = figures["conversions"]
    assert check["agreement"] == 100
    assert check["top1"] == pytest.approx(figures["rows"][1]["mean"], abs=1)  # in float32, and recorded in bfloat16


@pytest.mark.slow
def test_trainings_with_other_settings_are_not_taken_for_these(finished, ablate):
    result = ablate(opts=TINY + " TRAIN.BASE_LR 0.5")[1]
    assert result.status == 2
    assert re.fullmatch(
        r"error: .*none-seed3 holds a training with other settings: give another --output\n", result.err
    )


def test_a_report_trains_nothing(script, tmp_path):
    result = script("tools/ablation.py", "--report", "--output", tmp_path, folder=ROOT)
    assert result.status == 0, result.err
    assert [row[1:3] for row in table(result.out)[2:]] == [[variant.arch, variant.name] for variant in VARIANTS]
    assert all(row[3:7] == ["0", "-", "-", "-"] for row in table(result.out)[2:])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.title)
def test_a_variant_is_built_as_its_row_says(variant, monkeypatch):
    monkeypatch.chdir(ROOT)
    cfg = run_of(variant, 1, Path("output"), []).cfg
    assert cfg.SEED == 1
    with torch.device("meta"):
        model = TASKS[cfg.TASK](cfg, ALONE).build_network(10)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 10)
    branches = {"none": (), "1x1": (1,), "3x3": (3,)}.get(variant.name, (1, 3))
    assert tuple(model.spec.branches) == branches


def test_rows_and_runs_have_names_of_their_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len({variant.title for variant in VARIANTS}) == len(VARIANTS)
    runs = [run_of(variant, seed, Path("output"), []) for variant in VARIANTS for seed in (0, 1)]
    assert len({run.checkpoint for run in runs}) == len(runs)


def test_a_row_gives_mean_least_and_most():
    row = Row(Variant("branches", "Net", "none", published=50.0), {0: 10.0, 1: 20.0, 2: 60.0})
    assert table(str(row)) == [["branches", "Net", "none", "3", "30.00", "10.00", "60.00", "50.00"]]
    assert row.as_dict()["mean"] == 30
    nothing = Row(Variant("branches", "Net", "none"), {})
    assert table(str(nothing)) == [["branches", "Net", "none", "0", "-", "-", "-", "-"]]
    assert nothing.as_dict()["mean"] is None


def test_the_figure_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row(variant, {0: 40.0 + i, 1: 50.0}) for i, variant in enumerate(VARIANTS)]
    for drawn in (rows, rows[-1:]):
        ablation.draw(drawn, tmp_path / "figure.png")
        assert 1000 < (tmp_path / "figure.png").stat().st_size < 100_000
    with pytest.raises(ValueError, match="nothing to draw"):
        ablation.draw([Row(VARIANTS[0], {})], tmp_path / "nothing.png")


def test_a_failed_training_is_named_in_one_line(script, tmp_path):
    options = ("--only", ROWS[0], "--seeds", 3, "--output", tmp_path, "--opts", "DATA.BATCH_SIZE", 5000)
    result = script("tools/ablation.py", *options, folder=ROOT)
    assert result.status == 2
    assert re.fullmatch(r"error: main_repmlp.py .* ended with status 2: error: 4000 training images .*\n", result.err)
