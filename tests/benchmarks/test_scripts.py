"""Every script runs standing alone, prints one table and writes what it promises; a wrong row stops it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import models
from benchmarks import end_to_end, inference, injection, scaling, training
from benchmarks import training_form as units
from models import training_form

ROOT = Path(__file__).parents[2]
ARCH = "RepMLPNet-Digits"
# Options for a tiny run, the rows that it must have, and the keys of each row beside those of every script.
SCRIPTS = {
    "inference": (
        ["--batch-size", "2", "--rounds", "2", "--only", "deploy*", "fused*"],
        ["naive deploy fp32", "deploy fp32", "fused fp32", "deploy bf16", "fused bf16"],
        {"flops", "bytes", "limit", "fraction", "difference", "images_per_second"},
    ),
    "training": (
        ["--batch-size", "2", "--rounds", "1", "--only", "ours*"],
        ["naive fp32", "ours fp32", "ours bf16", "ours fp32, checkpointed", "ours bf16, checkpointed"],
        {"flops", "bytes", "limit", "fraction", "moved", "difference", "images_per_second"},
    ),
    "injection": (
        ["--rounds", "1"],
        [f"{ARCH} naive", f"{ARCH} ours"],
        {"difference", "extra_bytes"},
    ),
    "end_to_end": (
        ["--batch-size", "2", "--rounds", "1", "--images", "4", "--workers", "0", "1", "--presets", "raug15"],
        [*["files to logits (fp32, fused)"] * 2, *["files to batches (raug15)"] * 2],
        {"workers", "difference", "images_per_second"},
    ),
    "scaling": (
        ["--rounds", "1", "--batch-sizes", "2", "--sizes", "--depths"],
        ["batch 2 deploy", "batch 2 fused"],
        {"axis", "value", "form", "flops", "bytes", "limit", "fraction", "difference", "peak_bytes"},
    ),
}


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# The ones that take longest, of which the other tests here show the parts.
SLOW = ("scaling", "injection")


@pytest.mark.parametrize(
    "script", [pytest.param(script, marks=pytest.mark.slow if script in SLOW else ()) for script in SCRIPTS]
)
def test_script_stands_alone(script, tmp_path) -> None:
    options, names, keys = SCRIPTS[script]
    file = tmp_path / "deep" / "result.json"
    command = [sys.executable, "-m", f"benchmarks.{script}", "--arch", ARCH, *options, "--min-seconds", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rules = [line for line in done.stdout.splitlines() if line and set(line) == {"-"}]
    assert len(rules) == 1, "one table"
    content = json.loads(file.read_text())
    assert {"machine", "versions", "device", "threads", "dtype", "clock", "settings", "roofline"} <= content.keys()
    assert (content["device"], content["threads"], content["script"]) == ("cpu", 1, script)
    assert {"torch", "timm", "python"} <= content["versions"].keys()
    assert [row["name"] for row in content["rows"]] == names
    rounds = content["settings"]["rounds"]
    for row in content["rows"]:
        assert keys | {"name", "seconds", "median", "ratio"} <= row.keys()
        assert len(row["seconds"]) == rounds
        assert min(row["seconds"]) > 0
        assert 0 < row.get("fraction", 1) <= 1.5
    if content["roofline"] is not None:
        assert min(*content["roofline"]["peak"].values(), content["roofline"]["bandwidth"]) > 0
    assert content["rows"][0]["ratio"] == 1.0


@pytest.fixture
def spoil(monkeypatch):
    """Returns a function that makes another one's network wrong in one weight."""

    def install(module, name: str) -> None:
        original = getattr(module, name)

        @torch.no_grad()
        def spoiled(*args: object) -> torch.nn.Module:
            model = original(*args)
            next(p for p in model.parameters() if p.dim() > 1).view(-1)[0].add_(10)
            return model

        monkeypatch.setattr(module, name, spoiled)

    return install


def test_a_wrong_form_stops_inference(spoil) -> None:
    spoil(inference, "fuse_batch_norms")
    args = inference.parse(["--arch", ARCH, "--batch-size", "2"])
    with pytest.raises(ValueError, match="fused fp32 is wrong"):
        list(inference.build(inference.own_family(ARCH, 2), {"naive deploy fp32", "fused fp32"}, args))


@pytest.mark.slow
def test_memory_of_training_by_batch_size(tmp_path) -> None:
    file = tmp_path / "result.json"
    options = ["--batch-size", "2", "--rounds", "1", "--min-seconds", "0", "--only", "ours fp32", "--memory", "1", "17"]
    training.main(["--arch", ARCH, *options, "--json", str(file)])
    for row in json.loads(file.read_text())["rows"]:
        peaks = {int(n): peak / 2**20 for n, peak in row["peak_bytes"].items()}
        assert peaks == {1: row["peak_mib_1"], 17: row["peak_mib_17"]}
        assert 0 < peaks[1] < peaks[17]


def test_a_wrong_gradient_stops_training(spoil) -> None:
    spoil(training, "naive")
    args = training.parse(["--arch", ARCH, "--batch-size", "2"])
    with pytest.raises(ValueError, match="our gradient in float64 is wrong"):
        training.check_formulations(training.build_model(ARCH), *training.batch(ARCH, 2), "cpu")
    with pytest.raises(ValueError, match="ours fp32 is wrong"):
        training.build(ARCH, {"ours fp32": training.Form()}, args)


def test_rows_of_training() -> None:
    def names(*words: str) -> list[str]:
        return list(training.forms_of(training.parse(["--arch", ARCH, *words])))

    eager = ["naive fp32", "naive bf16", "ours fp32", "ours bf16"]
    checkpointed = ["ours fp32, checkpointed", "ours bf16, checkpointed"]
    assert names() == eager + checkpointed
    assert names("--compile") == eager + checkpointed + [f"{name}, compiled" for name in eager]
    peers = ["resnet18 fp32", "resnet18 bf16"]
    assert names("--peers", "resnet18") == eager + checkpointed + peers
    added = names("--peers", "resnet18", "--compile", "--device", "cuda")[len(eager + checkpointed + peers) :]
    assert added == [f"{name}, compiled{mode}" for name in eager + peers for mode in ("", " reduce-overhead")]


def test_a_peer_is_trained_beside_ours(tmp_path) -> None:
    file = tmp_path / "result.json"
    options = ["--batch-size", "2", "--rounds", "1", "--min-seconds", "0", "--only", "resnet18*", "--peers", "resnet18"]
    training.main(["--arch", ARCH, *options, "--json", str(file)])
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["naive fp32", "resnet18 fp32", "resnet18 bf16"]
    assert rows["resnet18 bf16"]["moved"] < rows["resnet18 fp32"]["moved"]
    assert rows["resnet18 fp32"]["gflop"] == pytest.approx(2 * 3 * 2 * 1.81, rel=0.01)


def test_a_wrong_injection_stops(monkeypatch) -> None:
    monkeypatch.setattr(models.RepMLPNet, "locality_injection", lambda self: spoiled_injection(self))
    args = injection.parse(["--arch", ARCH, "--rounds", "1"])
    with pytest.raises(ValueError, match="ours is wrong"):
        injection.rows_of(ARCH, args, injection.harness.Clock("cpu"))


@torch.no_grad()
def spoiled_injection(model: models.RepMLPNet) -> None:
    for block in model.modules():
        if isinstance(block, models.RepMLPBlock):
            block.local_inject()
            block.fc3.weight[0, 0] += 0.1


def test_a_wrong_form_stops_scaling(spoil) -> None:
    spoil(scaling, "fuse_batch_norms")
    args = scaling.parse(["--arch", ARCH, "--batch-sizes", "1"])
    limits = scaling.Roofline({"fp32": 1.0}, 1.0)
    with pytest.raises(ValueError, match="fused is wrong"):
        scaling.rows_of(scaling.points(args)[0], args, scaling.harness.Clock("cpu"), limits)


def test_wrong_logits_stop_end_to_end(spoil, tmp_path) -> None:
    end_to_end.write_photos(tmp_path, 2)
    spoil(end_to_end, "fuse_batch_norms")
    args = end_to_end.parse(["--arch", ARCH, "--batch-size", "2", "--workers", "0"])
    with pytest.raises(ValueError, match="files to logits, 0 workers is wrong"):
        end_to_end.evaluation_rows(tmp_path, args)


def test_peers_are_compared_with_our_best() -> None:
    rows = [
        {"name": "deploy fp32", "dtype": "fp32", "seconds": [2.0, 2.0]},
        {"name": "fused fp32", "dtype": "fp32", "seconds": [1.0, 1.0]},
        {"name": "fused bf16", "dtype": "bf16", "seconds": [0.5, 0.5]},
        {"name": "resnet101, folded fp32", "dtype": "fp32", "seconds": [2.0, 4.0]},
    ]
    inference.compare_with_best(rows, {"deploy fp32", "fused fp32", "fused bf16"})
    assert rows[3]["ours"] == 3.0
    assert "ours" not in rows[0]


def test_rows_of_inference() -> None:
    family = inference.Family(ARCH, "a", dict.fromkeys(["naive deploy", "fused"]), ("fused",), (16, 16), {})
    args = inference.parse(["--arch", ARCH, "--dtype", "bf16", "--compile"])
    assert [name for name, *_ in inference.rows_of(family, args)] == [
        "naive deploy fp32",
        "naive deploy bf16",
        "fused bf16",
        "fused bf16, compiled",
    ]
    args = inference.parse(["--arch", ARCH, "--dtype", "fp32", "--compile", "--device", "cuda"])
    assert [name for name, *_ in inference.rows_of(family, args)][2:] == [
        "fused fp32, compiled",
        "fused fp32, compiled max-autotune-no-cudagraphs",
        "fused fp32, compiled reduce-overhead",
    ]


@pytest.mark.parametrize("script", [inference, training, injection, scaling, end_to_end])
def test_an_unknown_architecture_is_named(script, capsys) -> None:
    with pytest.raises(SystemExit):
        script.main(["--arch", "RepMLPNet-X"])
    assert "RepMLPNet-X" in capsys.readouterr().err


def test_an_unknown_peer_is_named() -> None:
    with pytest.raises(ValueError, match="did you mean resnet101"):
        inference.main(["--arch", ARCH, "--peers", "resnet1011"])


def test_an_unknown_row_is_named() -> None:
    with pytest.raises(ValueError, match="naive deploy fp32"):
        inference.main(["--arch", ARCH, "--only", "fuse"])


def test_a_figure_needs_matplotlib(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        scaling.main(["--arch", ARCH, "--plot", str(tmp_path / "figure.png")])


def test_a_figure_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, which only draws the figure, is not installed")
    rows = [
        {"axis": axis, "form": form, "value": value, "milliseconds_per_image": value * 2.0, "peak_mib": value + 1.0}
        for axis in scaling.AXES
        for form in scaling.FORMS
        for value in (1, 2, 4)
    ]
    scaling.plot(rows, "title", tmp_path / "deep" / "figure.png")
    assert (tmp_path / "deep" / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_compiled_rows() -> None:
    options = ["--arch", ARCH, "--batch-size", "2", "--rounds", "1", "--min-seconds", "0", "--dtype", "fp32"]
    command = [sys.executable, "-m", "benchmarks.inference", *options, "--compile", "--only", "fused*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fused fp32, compiled" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("script", ["inference", "training", "injection"])
def test_script_runs_on_a_gpu(script, tmp_path) -> None:
    options, names, _ = SCRIPTS[script]
    file = tmp_path / "result.json"
    command = [sys.executable, "-m", f"benchmarks.{script}", "--arch", ARCH, *options, "--device", "cuda"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row["name"] for row in json.loads(file.read_text())["rows"]] == names


def test_where_the_training_form_gains(tmp_path, monkeypatch) -> None:
    for limit in ("MANY_ON_CPUS", "LARGE_ON_GPUS"):  # which the script changes
        monkeypatch.setattr(training_form, limit, getattr(training_form, limit))
    file = tmp_path / "result.json"
    options = ["--batch-sizes", "2", "3", "--rounds", "1", "--min-seconds", "0", "--dtype", "fp32"]
    units.main(["--arch", ARCH, *options, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["positions"] for row in rows] == [2 * 64, 3 * 64, 2 * 16, 3 * 16]
    assert all(row["ratio"] == pytest.approx(row["layers"] / row["form"]) for row in rows)
