"""The tables of a summary: rows that add up, and a verdict for every published figure."""

import sys

import torch

from engine.summary import part_table, reported_table
from models import create_model
from models.reported import CIFAR, CITYSCAPES, REPORTED, Reported


def rows_of(text: str) -> dict[str, list[int]]:
    """Returns the numbers of a table by the name of their part."""
    lines = [line.rsplit(maxsplit=4 if "deploy" in text else 2) for line in text.splitlines()[2:]]
    return {name.strip(): [int(number.replace(",", "")) for number in numbers] for name, *numbers in lines}


def test_places_add_up() -> None:
    with torch.device("meta"):
        model = create_model("RepMLPNet-Digits", 10)
    text = part_table(model, (1, 3, 16, 16))
    places = {line.split()[0]: line for line in text.splitlines()[2:] if not line.startswith(" ")}
    numbers = rows_of(text)
    assert list(places) == ["conv_embedding", "stages.0", "stages.1", "embeds.0", "head_norm", "head", "all"]
    sums = [sum(column) for column in zip(*(numbers[place] for place in places if place != "all"), strict=True)]
    assert numbers["all"] == sums
    assert numbers["head"] == [650, 650, 640, 640]


def test_a_network_of_one_structure_has_one_column_of_each() -> None:
    with torch.device("meta"):
        model = create_model("resnet18", 10)
    text = part_table(model, (1, 3, 224, 224))
    assert "deploy" not in text
    assert rows_of(text)["all"] == [11_181_642, 1_813_566_464 // 1 + 0]


def test_verdicts() -> None:
    rows = [row for row in REPORTED if row.source == CIFAR and row.arch == "RepMLPNet-C100"]
    wrong = Reported(
        "RepMLPNet-C100", CIFAR, "8.2", added="719", changes={"branches": [1]}, num_classes=100, note="why"
    )
    lines = reported_table([*rows, wrong]).splitlines()
    assert [line.split()[-1] for line in lines[2:7]] == ["equal", "equal", "equal", "equal", "differs"]
    assert lines[-2] == "RepMLPNet-C100, branches=[1] (P2, CIFAR-100): why"
    assert lines[3].split()[-4:] == ["720", "720", "60.73", "equal"]


def test_a_missing_library_leaves_out_a_row(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    text = reported_table(row for row in REPORTED if row.source == CITYSCAPES and row.arch == "resnet101c")
    assert "resnet101c (P2, Cityscapes): not counted, segmentation needs" in text
    assert "2049.82" not in text
