"""Which of two things wins: weights or their average, the checkpoint or the flag, the old settings or the new."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ARCH = "RepMLPNet-Digits"
ROOT = Path(__file__).parents[2]
SHORT = f"--cfg {ROOT}/configs/quickstart.yaml --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 SAVE_FREQ 1"
ACCURACY = re.compile(r"Acc@1 ([\d.]+) ")


def accuracy(text: str) -> float:
    (found,) = ACCURACY.findall(text)
    return float(found)


@pytest.fixture(scope="module")
def averaged(train) -> Any:
    """A run whose average lags behind its weights, so that the two answer differently."""
    return train(f"{SHORT} TRAIN.EMA_ALPHA 0.0005 TRAIN.EMA_UPDATE_PERIOD 1")


def best(run, kind: str) -> float:
    return max(round(record["top1"], 3) for record in run.records(kind))


# The average


@pytest.fixture(scope="module")
def choices(averaged) -> dict[str, tuple[str, float]]:
    """What a user may give, with what the programs have to say of it and the accuracy that comes out."""
    raw, average = best(averaged, "eval"), best(averaged, "eval_ema")
    assert raw != average
    ema = torch.load(averaged.folder / "best_ema.pth", weights_only=True)
    last = [round(record["top1"], 3) for record in averaged.records("eval")][ema["progress"]["epoch"] - 1]
    return {
        "best_ema.pth": ("averaged training weights", average),
        "best_ema.pth --no-ema": ("training weights", last),
        "best_ckpt.pth": ("training weights", raw),
        "best_ckpt.pth --no-ema": ("training weights", raw),
    }


CHOICES = ("best_ema.pth", "best_ema.pth --no-ema", "best_ckpt.pth", "best_ckpt.pth --no-ema")


@pytest.mark.parametrize("choice", CHOICES)
def test_a_file_that_was_chosen_by_its_average_is_evaluated_by_it(call, averaged, choices, choice, tmp_path):
    name, *flags = choice.split()
    what, expected = choices[choice]
    path = averaged.folder / name
    tested = call("test.py", "digits", "train", path, "-j", 0, *flags)
    assert f"{ARCH}: {what} from {path}\n" in tested.out
    assert accuracy(tested.out) == expected
    words = ("--cfg", ROOT / "configs/quickstart.yaml", "--eval", "--resume", path, "--output", tmp_path)
    evaluated = call("main_repmlp.py", *words, *(("--opts", "TEST.EMA", "false") if flags else ()))
    assert f" {what} from {path}, 359 images" in evaluated.out
    assert accuracy(evaluated.out) == expected


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_converted_exported_and_predicted_with_is_the_same(call, averaged, choices, choice, tmp_path):
    name, *flags = choice.split()
    what, expected = choices[choice]
    path, deploy = averaged.folder / name, tmp_path / "deploy.pth"
    converted = call("convert.py", path, deploy, *flags)
    assert f"{ARCH}: {what} from {path} (" in converted.out
    tested = call("test.py", "digits", "deploy", deploy, "-j", 0)
    assert accuracy(tested.out) == expected
    exported = call("tools/export.py", path, tmp_path / "a.pt2", *flags)
    assert f"{ARCH}: {what} from {path} -> " in exported.out
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    predicted = call("tools/predict.py", path, tmp_path / "a.png", *flags)
    assert predicted.err == f"by {what} from {path}\n"


def test_a_training_starts_from_the_average_where_the_file_was_chosen_by_it(averaged, train):
    path = averaged.folder / "best_ema.pth"
    run = train(f"--pretrained {path} {SHORT}")
    assert f"starting from averaged training weights from {path}\n" in run.result.out


# Architecture, size, classes and form of an evaluation


@pytest.fixture(scope="module")
def resized(train, tmp_path_factory) -> Any:
    """A network of another size than its architecture's, by the name that timm knows it by."""
    return train(f"{SHORT} DATA.IMG_SIZE 24 MODEL.ARCH repmlpnet_digits MODEL.SHARE_SETS 2,8")


def test_a_name_of_timm_is_ours(resized):
    assert resized.folder.is_dir(), "the folder has our own name"
    meta = torch.load(resized.folder / "latest.pth", weights_only=True)["meta"]
    assert meta["arch"] == ARCH
    assert meta["image_size"] == [24, 24]


def test_a_name_of_timm_brings_the_size_along(train):
    run = train(
        "--arch repmlpnet_digits --data-path digits --batch-size 64 --opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
    )
    assert torch.load(run.folder / "latest.pth", weights_only=True)["meta"]["image_size"] == [16, 16]


@pytest.mark.parametrize("form", ["train", "deploy"])
def test_an_evaluation_needs_the_weights_and_the_data_alone(call, resized, form, tmp_path):
    path = resized.folder / "best_ckpt.pth"
    if form == "deploy":
        converted = call("convert.py", path, tmp_path / "deploy.pth")
        assert converted.status == 0, converted.err
        path = tmp_path / "deploy.pth"
    words = ("--eval", "--resume", path, "--data-path", "digits", "--output", tmp_path, "--opts", "DATA.NUM_WORKERS", 0)
    result = call("main_repmlp.py", *words)
    assert result.status == 0, result.err
    assert accuracy(result.out) == best(resized, "eval")
    assert accuracy(call("test.py", "digits", form, path, "-j", 0).out) == best(resized, "eval")
    assert (tmp_path / ARCH / "default" / "log_rank0.txt").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--opts DATA.IMG_SIZE 16", ["at 24x24", "at 16x16", "set DATA.IMG_SIZE to 24"]),
        ("--arch RepMLPNet-C100", ["does not fit", "set MODEL.ARCH to RepMLPNet-Digits"]),
        ("--opts MODEL.SHARE_SETS 4,16", ["of another shape"]),
        ("--opts MODEL.SHARE_SETS 3,8", ["can't be built"]),
    ],
)
def test_a_flag_wins_over_the_checkpoint(call, resized, flags, expected, tmp_path):
    words = f"--eval --resume {resized.folder}/best_ckpt.pth --data-path digits --output {tmp_path}/new {flags}"
    result = call("main_repmlp.py", *words.split())
    assert result.status == 2
    assert len(result.err.splitlines()) == 1
    assert all(words in result.err for words in expected), result.err
    assert not (tmp_path / "new").exists()


def test_an_evaluation_on_other_classes_is_refused(call, resized, images, tmp_path):
    words = ("--eval", "--resume", resized.folder / "best_ckpt.pth", "--data-path", images, "--output", tmp_path)
    result = call("main_repmlp.py", *words, "--opts", "DATA.NUM_WORKERS", 0)
    assert result.status == 2
    assert re.search(rf"best_ckpt\.pth is for 10 classes, {re.escape(str(images))} has 2", result.err)


# Settings that have changed


@pytest.fixture
def half(trained, tmp_path) -> Path:
    """A folder of runs in which one has done its first epoch."""
    folder = tmp_path / ARCH / "run"
    folder.mkdir(parents=True)
    shutil.copy(trained.folder / "ckpt_epoch_0.pth", folder / "latest.pth")
    return tmp_path


def test_a_resumed_run_names_the_settings_that_have_changed(half, train):
    run = train(f"{SHORT} TRAIN.BASE_LR 0.004 AUG.MIXUP 0.2", output=half)
    log = (run.folder / "log_rank0.txt").read_text()
    assert "WARNING settings that have changed since: TRAIN.BASE_LR 0.008 -> 0.004, AUG.MIXUP 0.0 -> 0.2\n" in log, log


def test_settings_that_have_not_changed_are_not_named(half, train):
    assert "have changed" not in train(SHORT, output=half).result.out


ANOTHER = {
    "MODEL.SHARE_SETS 2,8": "structure {} instead of {'share_sets': [2, 8]}",
    "MODEL.NUM_CLASSES 12": "num_classes 10 instead of 12",
    "DATA.IMG_SIZE 24": "image_size [16, 16] instead of [24, 24]",
    "TRAIN.OPTIMIZER.NAME sgd": "does not fit this SGD",
}


@pytest.mark.parametrize("options", ANOTHER)
@pytest.mark.parametrize("how", ["by itself", "--resume"])
def test_another_experiment_is_refused(call, half, tmp_path, options, how):
    checkpoint, words = half / ARCH / "run" / "latest.pth", SHORT.split()
    before = checkpoint.read_bytes()
    flags = ["--output", half, "--tag", "run"]
    if how == "--resume":
        flags = ["--output", tmp_path / "new", "--resume", checkpoint]
    result = call("main_repmlp.py", *words[:2], *flags, *words[2:], *options.split())
    assert result.status == 2
    assert len(result.err.splitlines()) == 1
    assert f"{checkpoint}" in result.err
    assert ANOTHER[options] in result.err
    assert "another TAG" in result.err or "with MODEL.PRETRAINED" in result.err
    assert checkpoint.read_bytes() == before


def test_a_run_that_is_complete_says_so(trained, train, tmp_path):
    shutil.copytree(trained.folder, tmp_path / ARCH / "run")
    before = (trained.folder / "metrics.jsonl").read_bytes()
    again = train(SHORT, output=tmp_path)
    assert "already complete: 2 of 2 epochs are done" in again.result.out
    assert (again.folder / "metrics.jsonl").read_bytes() == before


def test_pretrained_weights_are_not_replaced_by_the_run_itself(call, trained, tmp_path):
    folder = Path(shutil.copytree(trained.folder, tmp_path / ARCH / "run"))
    words = SHORT.split()
    flags = ["--pretrained", folder / "best_ckpt.pth", "--output", tmp_path, "--tag", "run"]
    result = call("main_repmlp.py", *words[:2], *flags, *words[2:], "TRAIN.AUTO_RESUME", "False")
    assert result.status == 2
    assert "best_ckpt.pth would be replaced by this run's own: give the run another TAG" in result.err
    assert (folder / "best_ckpt.pth").read_bytes() == (trained.folder / "best_ckpt.pth").read_bytes()


def test_labels_of_val_that_train_does_not_have(call, zipped, tmp_path):
    root = Path(shutil.copytree(zipped, tmp_path / "zipped"))
    lines = (root / "val_map.txt").read_text().splitlines()
    (root / "val_map.txt").write_text("\n".join([*lines[:-1], lines[-1].replace("\t1", "\t7")]) + "\n")
    words = f"--zip --data-path {root} --arch {ARCH} --batch-size 8 --output {tmp_path}/new --opts DATA.NUM_WORKERS 0"
    result = call("main_repmlp.py", *words.split(), "TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0)
    assert result.status == 2
    assert result.err == "error: val has 8 classes, train 2: they need the same labels\n"


BAD = {
    "statistics": lambda d: d | {"rank_statistics": [d["rank_statistics"][0] * torch.nan]},
    "configuration": lambda d: d | {"config": "\0"},
    "weights": lambda d: d | {"model": {k: v * torch.nan for k, v in d["model"].items() if v.is_floating_point()}},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_state_that_does_not_resume_replaces_no_other_file(call, trained, tmp_path, kind):
    """It claims to be the newest, the best and a numbered one."""
    folder = Path(shutil.copytree(trained.folder, tmp_path / ARCH / "run"))
    latest = torch.load(folder / "latest.pth", weights_only=True)
    (folder / "latest.pth").unlink()
    latest["progress"] |= {"update": latest["progress"]["update"] + 1, "best_metric": 99.0}
    latest["saved_as"] = {"numbered": True, "best": True, "best_ema": True}
    torch.save(BAD[kind](latest), folder / "latest.pth")
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    words = SHORT.split()
    result = call("main_repmlp.py", *words[:2], "--output", tmp_path, "--tag", "run", *words[2:])
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before


def test_a_size_that_the_network_does_not_take_is_found_before_the_training(call, tmp_path):
    words = SHORT.split()
    result = call("main_repmlp.py", *words[:2], "--output", tmp_path / "new", *words[2:], "DATA.TEST_SIZE", 24)
    assert result.status == 2
    assert "24x24" in result.err
    assert "Train:" not in result.out
    assert not (tmp_path / "new").exists()


# Weights that are not finite


@pytest.fixture(scope="module")
def poisoned(trained, tmp_path_factory) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        payload = torch.load(trained.folder / "latest.pth", weights_only=True)
        payload["model"]["head.bias"] = payload["model"]["head.bias"].clone().fill_(torch.nan)
        path = tmp_path_factory.mktemp("poisoned") / name
        torch.save(payload, path)
        return path

    return write


@pytest.mark.parametrize(
    "command",
    [
        "test.py digits train {path} -j 0 --json {out}",
        "test.py digits check {path} -j 0 --json {out}",
        "convert.py {path} {out}",
        "tools/export.py {path} {out}.pt2",
        "main_repmlp.py --cfg {root}/configs/quickstart.yaml --eval --resume {path} --output {out}",
        "main_repmlp.py --cfg {root}/configs/quickstart.yaml --pretrained {path} --output {out}",
        "main_repmlp.py --cfg {root}/configs/quickstart.yaml --resume {path} --output {out}",
    ],
)
def test_weights_that_are_not_finite_are_refused(call, poisoned, command, tmp_path):
    path, out = poisoned("nan.pth"), tmp_path / "out"
    result = call(*command.format(path=path, out=out, root=ROOT).split())
    assert result.status == 2, result.out
    reason = f"error: {path} can't be used: 1 tensors hold NaN or infinite values (head.bias, ...)"
    assert result.err == f"{reason}{'; nothing was written' * command.startswith('convert')}\n"
    assert not out.is_file()
    assert not list(tmp_path.rglob("*.p*"))


def test_every_record_is_json(averaged):
    def refuse(word: str) -> None:
        raise AssertionError(word)

    for line in (averaged.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("change", ["DATA.SAMPLING sqrt", "DATA.REPEATED_AUG 3", "DATA.FORMAT folder"])
def test_an_epoch_is_not_finished_in_another_order(call, trained, tmp_path, change):
    payload = torch.load(trained.folder / "ckpt_epoch_0.pth", weights_only=True)
    payload["progress"]["consumed"] = 64
    torch.save(payload, tmp_path / "middle.pth")
    words = f"{SHORT} MODEL.RESUME {tmp_path / 'middle.pth'} OUTPUT {tmp_path / 'output'} {change}".split()
    result = call("main_repmlp.py", *words)
    assert result.status == 2
    key, value = change.split()
    expected = f"from the middle of an epoch, whose order of images changes with {key} "
    assert expected in result.err
    assert f"-> {value!r}" in result.err or f"-> {value}" in result.err


@pytest.mark.parametrize("change", ["DATA.VAL_FRACTION 0.2", "DATA.FOLDS 5"])
def test_a_run_never_trains_on_images_that_it_has_held_out(call, trained, tmp_path, change):
    words = f"{SHORT} MODEL.RESUME {trained.folder / 'ckpt_epoch_0.pth'} OUTPUT {tmp_path / 'output'} {change}".split()
    result = call("main_repmlp.py", *words)
    assert result.status == 2
    assert f"was trained on images that would be test images now ({change.split()[0]} " in result.err
