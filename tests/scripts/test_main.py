"""`main_repmlp.py` on the embedded digits: what a run writes, and that it is reproducible, resumes and evaluates."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from script_runs import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import configs
import models
from configs import command_line

ARCH = "RepMLPNet-Digits"
ROOT = Path(__file__).parents[2]
SHORT = f"--cfg {ROOT}/configs/quickstart.yaml --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 SAVE_FREQ 1"
ACCURACY = re.compile(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+) on (\d+) images")


def tiny(images: Path) -> str:
    """One epoch of three updates on an image folder, without a warm-up."""
    return (
        f"--arch {ARCH} --data-path {images} --batch-size 8 --opts DATA.IMG_SIZE 16 DATA.NUM_WORKERS 0 "
        "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 AUG.PRESET weak"
    )


def figures(text: str) -> list[tuple[str, ...]]:
    return ACCURACY.findall(text)


def test_a_run_leaves_its_files(trained):
    names = {path.name for path in trained.folder.iterdir()}
    wanted = {"config.yaml", "log_rank0.txt", "metrics.jsonl", "latest.pth", "best_ckpt.pth"}
    assert wanted | {"ckpt_epoch_0.pth", "ckpt_epoch_1.pth"} <= names
    assert len([name for name in names if name.startswith("events.out.tfevents.")]) == 1
    assert not [name for name in names if name.endswith(".tmp")]
    assert [path.name for path in trained.output.iterdir()] == [ARCH]


def test_it_learns(trained):
    first, second = trained.records("eval")
    assert (first["epoch"], second["epoch"], first["images"], second["images"]) == (0, 1, 359, 359)
    assert second["top1"] > 50
    assert second["top5"] > second["top1"]
    losses = [record["loss"] for record in trained.records("train")]
    assert losses[-1] < losses[0]


def test_the_records_are_json_without_a_clock(trained):
    keys = {}
    for line in (trained.folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        keys.setdefault(record["kind"], set()).update(record)
    assert keys["train"] >= {"kind", "update", "epoch", "lr", "loss", "grad_norm"}
    assert keys["train_epoch"] == {"kind", "update", "epoch", "loss"}
    assert keys["eval"] >= {"kind", "update", "epoch", "top1", "top5", "loss", "images"}
    clocks = ("second", "time", "eta", "img", "speed", "memory")
    assert not [key for key in set.union(*keys.values()) if any(word in key for word in clocks)]


def test_the_learning_rates_in_the_records_are_those_of_the_recipe(trained):
    updates = [record["update"] for record in trained.records("train")]
    assert updates == [10, 20, 30, 40]
    first = trained.records("train")[0]
    # 22 updates an epoch, one epoch of warm-up from 0 to 0.008 * 64 / 256; the record follows update number 9.
    assert first["lr"] == pytest.approx(0.002 * 9 / 22, rel=1e-12)


def test_the_curves_are_readable(trained):
    accumulator = EventAccumulator(str(trained.folder)).Reload()
    assert {"train/loss", "train/lr", "eval/top1"} <= set(accumulator.Tags()["scalars"])
    curve = [(event.step, event.value) for event in accumulator.Scalars("eval/top1")]
    assert curve == [(r["update"], pytest.approx(r["top1"], rel=1e-6)) for r in trained.records("eval")]


def test_the_log_tells_the_accuracy(trained):
    log = (trained.folder / "log_rank0.txt").read_text()
    assert figures(log) == figures(trained.result.out)
    assert [float(found[0]) for found in figures(log)] == [
        pytest.approx(record["top1"], abs=6e-4) for record in trained.records("eval")
    ]
    assert trained.result.err == ""


def test_the_written_configuration_is_the_one_that_ran(trained):
    again = configs.load_config(trained.folder / "config.yaml")
    ran = command_line.parse(
        [*SHORT.split(), "TAG", "first", "OUTPUT", str(trained.output)],
    ).config
    assert configs.flatten(again) == configs.flatten(ran)


def test_the_checkpoints_describe_themselves(trained):
    for name in ("latest.pth", "best_ckpt.pth", "ckpt_epoch_1.pth"):
        payload = torch.load(trained.folder / name, weights_only=True)
        meta = payload["meta"]
        assert (meta["arch"], meta["num_classes"], meta["image_size"], meta["form"]) == (ARCH, 10, [16, 16], "train")
        assert set(meta["versions"]) == {"repmlpnet", "torch", "timm"}
        assert yaml.safe_load(payload["config"])["TRAIN"]["EPOCHS"] == 2
        assert payload["epoch"] == 1
    best = max(record["top1"] for record in trained.records("eval"))
    assert torch.load(trained.folder / "best_ckpt.pth", weights_only=True)["max_accuracy"] == best


def test_the_same_command_gives_the_same_run_bit_for_bit(trained, train):
    again = train(SHORT, tag="second")
    assert (again.folder / "metrics.jsonl").read_bytes() == (trained.folder / "metrics.jsonl").read_bytes()
    assert same(again.weights(), trained.weights())


def test_another_seed_gives_another_run(images, train):
    first, other = train(tiny(images)), train(tiny(images) + " SEED 1")
    assert not same(first.weights(), other.weights())
    assert first.records("eval")[0]["images"] == other.records("eval")[0]["images"] == 10


def test_a_run_goes_on_from_its_own_checkpoint_as_if_nothing_had_happened(trained, train, tmp_path):
    folder = tmp_path / ARCH / "run"
    folder.mkdir(parents=True)
    shutil.copy(trained.folder / "ckpt_epoch_0.pth", folder / "latest.pth")
    records = (trained.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    # As it was killed: one record of the second epoch is there already, and another one half.
    (folder / "metrics.jsonl").write_text("".join(records[:5]) + records[5][:20])
    resumed = train(SHORT, output=tmp_path)
    assert "latest.pth" in resumed.result.out
    assert len(figures(resumed.result.out)) == 1
    assert (folder / "metrics.jsonl").read_bytes() == (trained.folder / "metrics.jsonl").read_bytes()
    assert same(resumed.weights(), trained.weights())
    first, second = (torch.load(f / "latest.pth", weights_only=True) for f in (trained.folder, folder))
    assert first["progress"] == second["progress"]


def test_a_run_that_is_over_stays_as_it_is(trained, train, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / ARCH / "run")
    again = train(SHORT, output=tmp_path)
    assert figures(again.result.out) == []
    assert same(again.weights(), trained.weights())
    assert (folder / "metrics.jsonl").read_bytes() == (trained.folder / "metrics.jsonl").read_bytes()


def test_without_auto_resume_a_run_begins_anew(images, train):
    first = train(tiny(images))
    weights, records = first.weights(), (first.folder / "metrics.jsonl").read_bytes()
    again = train(tiny(images) + " TRAIN.AUTO_RESUME False", output=first.output)
    assert len(figures(again.result.out)) == 1
    assert (again.folder / "metrics.jsonl").read_bytes() == records
    assert same(again.weights(), weights)


def test_resume_names_the_checkpoint_to_go_on_from(trained, train):
    resumed = train(f"--resume {trained.folder}/ckpt_epoch_0.pth {SHORT}")
    assert len(figures(resumed.result.out)) == 1
    assert same(resumed.weights(), trained.weights())


def test_pretrained_weights_start_a_new_run(weights, images, train):
    still = "MODEL.NUM_CLASSES 10 TRAIN.BASE_LR 0.0"
    started = train(f"--pretrained {weights.train} {tiny(images)} {still}")
    own, given = started.weights(), torch.load(weights.train, weights_only=True)["model"]
    learnt = [name for name in own if "running" not in name and "num_batches" not in name]
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in learnt)
    payload = torch.load(started.folder / "latest.pth", weights_only=True)
    assert (payload["epoch"], payload["progress"]["update"]) == (0, 3)


def test_pretrained_weights_of_other_classes_leave_a_fresh_head(weights, images, train):
    started = train(f"--pretrained {weights.train} {tiny(images)} TRAIN.BASE_LR 0.0")
    own, given = started.weights(), torch.load(weights.train, weights_only=True)["model"]
    assert "head.weight" in started.result.out
    assert own["head.weight"].shape == (2, 64)
    assert torch.equal(own["conv_embedding.conv.weight"], given["conv_embedding.conv.weight"])


@pytest.mark.parametrize("name", ["best_ckpt.pth", "latest.pth"])
def test_evaluating_gives_the_accuracy_of_the_training(trained, call, tmp_path, name):
    result = call("main_repmlp.py", "--eval", "--resume", trained.folder / name, "--output", tmp_path, *SHORT.split())
    assert (result.status, result.err) == (0, "")
    last = trained.records("eval")[-1]
    (found,) = figures(result.out)
    assert found == (f"{last['top1']:.3f}", f"{last['top5']:.3f}", f"{last['loss']:.4f}", "359")


@pytest.mark.parametrize("batch", [1000, 7])
def test_the_batch_of_an_evaluation_does_not_matter(trained, call, tmp_path, batch):
    options = f"--eval --resume {trained.folder}/best_ckpt.pth --output {tmp_path} {SHORT} DATA.TEST_BATCH_SIZE {batch}"
    result = call("main_repmlp.py", *options.split())
    assert [found[0::3] for found in figures(result.out)] == [(figures(trained.result.out)[-1][0], "359")]


def test_deploy_weights_evaluate_alike(trained, deployed, call, tmp_path):
    result = call("main_repmlp.py", "--eval", "--resume", deployed, "--output", tmp_path, *SHORT.split())
    assert (result.status, result.err) == (0, "")
    assert [found[:2] for found in figures(result.out)] == [figures(trained.result.out)[-1][:2]]
    assert "deploy weights" in result.out


def test_an_evaluation_needs_no_training_images(trained, digits_val, call, tmp_path):
    command = (
        f"--eval --resume {trained.folder}/best_ckpt.pth --arch {ARCH} --data-path {digits_val} --batch-size 50 "
        f"--output {tmp_path} --opts DATA.NUM_WORKERS 0"
    )
    result = call("main_repmlp.py", *command.split())
    assert result.status == 0, result.err
    plain = call("test.py", digits_val, "train", trained.folder / "best_ckpt.pth", "-j", 0)
    assert plain.status == 0, plain.err
    (found,) = figures(result.out)
    assert found[3] == "359"
    assert [found] == figures(plain.out)
    assert not (digits_val / "train").exists()


def test_an_evaluation_writes_no_checkpoint(trained, call, tmp_path):
    call(
        "main_repmlp.py",
        "--eval",
        "--resume",
        trained.folder / "best_ckpt.pth",
        "--output",
        tmp_path,
        "--tag",
        "e",
        *SHORT.split(),
    )
    assert {path.name for path in (tmp_path / ARCH / "e").iterdir()} <= {"log_rank0.txt", "config.yaml", ".lock"}


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_throughput_of_both_structures(call, tmp_path, amp):
    options = f"--throughput --arch {ARCH} --batch-size 4 --output {tmp_path} --amp {amp}"
    result = call("main_repmlp.py", *options.split())
    assert result.status == 0, result.err
    rates = re.findall(
        r"(training|deploy) structure.*?: ([\d.]+) img/s \(slowest ([\d.]+), fastest ([\d.]+)\)", result.out
    )
    assert [name for name, *_ in rates] == ["training", "deploy"]
    assert all(0 < float(slowest) <= float(median) <= float(fastest) for _, median, slowest, fastest in rates)


def test_throughput_of_a_network_with_one_structure(call, tmp_path):
    options = f"--throughput --arch resnet10t --batch-size 2 --output {tmp_path} --opts DATA.IMG_SIZE 32"
    result = call("main_repmlp.py", *options.split())
    assert result.status == 0, result.err
    assert result.out.count(" img/s (slowest") == 2
    assert re.search(r"training structure, 14 of 14 BatchNorms folded, batch 2, .*: [\d.]+ img/s", result.out)


def test_throughput_of_a_network_that_cannot_be_traced(call, tmp_path, monkeypatch):
    def refuse(*_args):
        raise ValueError("a ResNet can't be traced to fold its BatchNorms")

    monkeypatch.setattr("engine.throughput.fold_verified", refuse)
    options = f"--throughput --arch resnet10t --batch-size 2 --output {tmp_path} --opts DATA.IMG_SIZE 32"
    result = call("main_repmlp.py", *options.split())
    assert result.status == 0, result.err
    assert result.out.count(" img/s (slowest") == 1
    assert "warning: a ResNet can't be traced to fold its BatchNorms; it is timed as it is" in result.out


def test_summary_of_both_structures(call, tmp_path):
    result = call("main_repmlp.py", *f"--summary --arch {ARCH} --output {tmp_path / 'absent'}".split())
    assert (result.status, result.err) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if line[-3:].isdecimal()}
    assert rows["all"] == ["205,464", "205,848", "2,678,272", "2,616,832"]
    assert rows["head"][:2] == ["65,000", "65,000"]
    assert not (tmp_path / "absent").exists()


def test_summary_of_a_changed_structure(call):
    words = f"--summary --arch {ARCH} --opts MODEL.BRANCHES [] MODEL.NUM_CLASSES 10 DATA.IMG_SIZE [32,16]".split()
    result = call("main_repmlp.py", *words)
    assert (result.status, result.err) == (0, "")
    assert f"{ARCH}, 10 outputs, images of 32x16" in result.out
    assert "local branches" not in result.out


def test_summary_beside_the_published_figures(call):
    result = call("main_repmlp.py", *["--summary", "--arch", "RepMLP-Res50-bottleneck-224"])
    assert (result.status, result.err) == (0, "")
    assert re.search(r"RepMLP-Res50-bottleneck-224 +P1 +41\.071 +40\.872 +41\.07 +3\.891 .*equal", result.out)


@pytest.mark.parametrize(("level", "amp"), [("O0", "off"), ("O1", "fp16"), ("O2", "fp16")])
def test_the_old_precision_flag_is_announced(call, tmp_path, level, amp):
    options = f"--throughput --arch {ARCH} --batch-size 4 --output {tmp_path} --amp-opt-level {level}"
    result = call("main_repmlp.py", *options.split())
    assert result.status == 0, result.err
    assert f"warning: --amp-opt-level {level} is the old name of --amp {amp}" in result.out
    assert f"amp {amp}" in result.out.split("warning", 1)[1]


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=0"])
def test_the_flag_of_old_launchers_is_accepted(trained, call, tmp_path, flag):
    options = f"{flag} --eval --resume {trained.folder}/best_ckpt.pth --output {tmp_path} {SHORT}"
    result = call("main_repmlp.py", *options.split())
    assert (result.status, result.err) == (0, "")
    assert figures(result.out) == figures(trained.result.out)[-1:]


@pytest.mark.parametrize("name", ["main_repmlp.py", "test.py", "convert.py"])
def test_help(call, name):
    result = call(name, "--help")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("usage: ")
    words = re.split(r"[\s,]+", result.out)
    assert set(models.list_models()) <= set(words)
    if name == "main_repmlp.py":
        assert "--data-path" in result.out
        assert "torchrun --nproc_per_node 8 main_repmlp.py" in result.out
