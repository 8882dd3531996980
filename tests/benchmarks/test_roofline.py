"""The roofline of GPUs: of a tiny network, by hand."""

import json
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.limits import PRECISIONS, Roofline
from utils.accelerators import ACCELERATORS

ARCH = "RepMLPNet-Digits"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    file: Path = tmp_path_factory.mktemp("roofline") / "deep" / "result.json"
    roofline.main(["--arch", ARCH, "--batch-size", "8", "16", "--gpu", "H200", "L40S", "--json", str(file)])
    return json.loads(file.read_text())["rows"]


def test_every_step_batch_and_precision_has_a_row(rows) -> None:
    found = [(row["step"], row["batch_size"], row["dtype"]) for row in rows]
    assert found == [(s, n, p) for s in roofline.STEPS[:2] for n in (8, 16) for p in PRECISIONS]


def test_seconds_follow_the_data_sheet(rows) -> None:
    h200 = next(accelerator for accelerator in ACCELERATORS if accelerator.name == "H200")
    for row in rows:
        seconds, peak = row["seconds"]["H200"], 1e12 * h200.peak(row["dtype"])
        assert seconds["flops"] == pytest.approx(row["flops"] / peak)
        assert seconds["fused"] == pytest.approx(row["bytes_fused"] / h200.bandwidth)
        assert seconds["eager"] == pytest.approx(row["bytes_eager"] / h200.bandwidth)
        assert 0 < seconds["fused"] < seconds["eager"]
        assert row["seconds"].keys() == {"H200", "L40S"}


def test_precisions_differ_in_what_they_change(rows) -> None:
    for fp32, tf32, bf16 in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert fp32["flops"] == tf32["flops"] == bf16["flops"]
        assert fp32["bytes_eager"] == tf32["bytes_eager"] > bf16["bytes_eager"]
        assert fp32["seconds"]["H200"]["flops"] > tf32["seconds"]["H200"]["flops"] > bf16["seconds"]["H200"]["flops"]


def test_training_costs_three_passes(rows) -> None:
    inference, training = (row for row in rows if (row["batch_size"], row["dtype"]) == (8, "fp32"))
    assert 3 * inference["flops"] < training["flops"] < 3.5 * inference["flops"]  # the branches are in training alone
    assert training["bytes_eager"] > 3 * inference["bytes_eager"]


def test_the_published_formulation_beside_ours(tmp_path) -> None:
    words = ["--arch", ARCH, "--batch-size", "8", "--precision", "bf16", "--step", "training", "naive-training"]
    roofline.main([*words, "--json", str(tmp_path / "result.json")])
    ours, naive = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (naive["step"], naive["flops"]) == ("naive-training", ours["flops"])
    assert naive["bytes_eager"] != ours["bytes_eager"]


def test_limits_of_a_data_sheet() -> None:
    a100 = next(accelerator for accelerator in ACCELERATORS if accelerator.name == "A100-SXM4-80GB")
    limits = Roofline.from_data_sheet(a100)
    assert limits.peak == {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}
    assert limits.limit(312e12, 0, "bf16") == 1.0
    assert limits.limit(0, a100.bandwidth, "fp32") == 1.0
