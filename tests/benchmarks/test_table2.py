"""The comparison of the paper with tiny networks: forms are checked and timed, segmentation networks counted."""

import json

import pytest
import torch

from benchmarks import sizes, table2
from models.reported import CITYSCAPES, README, TABLE2, Reported

TINY = (
    Reported("RepMLPNet-Digits", README, "0.2", "0.003", "90.0"),
    Reported("ResMLP-Shapes", TABLE2, changes={"branches": []}),
    Reported("resnet10t", TABLE2, images_per_second="606", note="tiny"),
    Reported(
        "RepMLPNet-Digits",
        CITYSCAPES,
        "",
        "9.99",
        changes={"decoder": "pspnet", "width": 8},
        num_classes=3,
        note="tiny",
    ),
)
QUICK = ["--batch-size", "2", "--rounds", "2", "--min-seconds", "0"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setattr(table2, "ROWS", TINY)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_row_is_timed_or_counted(tmp_path, capsys) -> None:
    file = tmp_path / "result.json"
    table2.main([*QUICK, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "RepMLPNet-Digits, deploy",
        "RepMLPNet-Digits, fused",
        "ResMLP-Shapes, branches=[], as it is",
        "resnet10t, folded",
        "RepMLPNet-Digits, decoder=pspnet, width=8, UPerNet",
    ]
    for row in rows[:4]:
        assert row["images_per_second"] == 2 / row["median"] > 0
        assert 0 < row["difference"] < 1e-5
        assert len(row["seconds"]) == 2
    assert [rows[0][key] for key in ("parameters", "published_parameters", "multiply_adds", "top1", "pixels")] == [
        205_464 / 1e6,
        "0.2",
        2_616_832 / 1e9,
        "90.0",
        "16x16",
    ]
    assert rows[3]["published_images_per_second"] == "606"
    assert "seconds" not in rows[4]
    assert rows[4]["published_multiply_adds"] == "9.99"
    assert "img/s" in capsys.readouterr().out


def test_rows_are_chosen(capsys) -> None:
    table2.main([*QUICK, "--only", "resnet*"])
    out = capsys.readouterr().out
    assert "resnet10t, folded" in out
    assert "Digits" not in out


def test_a_wrong_form_stops_the_run(monkeypatch) -> None:
    def spoiled(model, size):
        copy = table2.deepcopy(model)
        with torch.no_grad():
            copy.bn1.running_mean.add_(1)
        return copy

    monkeypatch.setattr(table2, "fold_batch_norms", spoiled)
    with pytest.raises(ValueError, match="resnet10t, folded is wrong"):
        list(table2.build(TINY[2], table2.parser().parse_args(QUICK)))


def test_the_published_sizes_by_one_command(capsys) -> None:
    sizes.main(["--only", "RepMLPNet-C100*", "ResMLP-B24-P16-224*"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(("RepMLPNet-C100, ", "ResMLP-B24-P16-224, ")) and "equal" in line]
    assert len(rows) == 5
    assert rows[0].split()[-9:] == ["115.737", "115.737", "115.7", "23.021", "23.0", "-", "-", "-", "equal"]
    with pytest.raises(ValueError, match="RepMLPNet-L256"):
        sizes.main(["--only", "unheard-of"])
