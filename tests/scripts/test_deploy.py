"""`convert.py` and `test.py`: conversion keeps the answers, says what it did, and never writes what is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import models
from models.checkpoints import read_checkpoint

ARCH = "RepMLPNet-Digits"
ACCURACY = re.compile(r"Acc@1 ([\d.]+) Acc@5 ([\d.]+) loss ([\d.]+) on (\d+) images")


def figures(text: str) -> list[tuple[str, ...]]:
    return ACCURACY.findall(text)


def one_error(result) -> str:
    """The only line on stderr, which must be an error."""
    assert result.status not in (0, 1)
    assert "Traceback" not in result.out + result.err
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_training_weights_by_a_fresh_process(trained, user):
    result = user("test.py", "digits", "train", trained.folder / "best_ckpt.pth", "-a", ARCH, "-r", 16)
    assert (result.status, result.err) == (0, "")
    assert figures(result.out) == figures(trained.result.out)[-1:]


def test_both_forms_have_the_same_accuracy(trained, deployed, call):
    train = call("test.py", "digits", "train", trained.folder / "best_ckpt.pth", "-j", 0)
    deploy = call("test.py", "digits", "deploy", deployed, "-j", 0)
    assert (train.status, deploy.status) == (0, 0)
    assert figures(train.out) == figures(deploy.out)
    assert [found[3] for found in figures(train.out)] == ["359"]


def test_check_compares_both_forms(trained, call, tmp_path):
    path = tmp_path / "check.json"
    weights = trained.folder / "best_ckpt.pth"
    result = call("test.py", "digits", "check", weights, "-a", ARCH, "-j", 0, "--json", path)
    assert (result.status, result.err) == (0, "")
    assert "passed" in result.out
    assert len(figures(result.out)) == 2
    found = json.loads(path.read_text())
    last = trained.records("eval")[-1]
    assert found["images"] == found["injected"]["images"] == 359
    assert found["top1"] == found["injected"]["top1"] == pytest.approx(last["top1"], rel=1e-12)
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["agreement"] == 100.0
    assert 0 < found["difference"] < 1e-4


def test_check_fails_beyond_the_tolerance(trained, call, tmp_path):
    path = tmp_path / "check.json"
    weights = trained.folder / "best_ckpt.pth"
    result = call("test.py", "digits", "check", weights, "-j", 0, "--tolerance", 1e-30, "--json", path)
    assert result.status == 1
    assert "FAILED" in result.out
    assert "Traceback" not in result.err
    assert json.loads(path.read_text())["difference"] > 1e-30


def test_json_of_a_plain_evaluation(trained, call, tmp_path):
    path = tmp_path / "out.json"
    call("test.py", "digits", "train", trained.folder / "best_ckpt.pth", "-j", 0, "--json", path)
    last = trained.records("eval")[-1]
    found = json.loads(path.read_text())
    assert found == {k: pytest.approx(last[k], rel=1e-6) for k in ("top1", "top5", "loss", "images")}


@pytest.fixture(scope="module")
def overflowing(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that are finite, and so large that no answer is."""
    payload = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    payload["model"]["head.weight"].fill_(3e38)
    path = tmp_path_factory.mktemp("overflowing") / "weights.pth"
    torch.save(payload, path)
    return path


def test_no_figure_for_answers_that_are_not_finite(overflowing, call, tmp_path):
    path = tmp_path / "out.json"
    line = one_error(call("test.py", "digits", "train", overflowing, "-j", 0, "--json", path))
    assert re.match(r"error: the network's outputs for \d+ of 359 images are not finite: its weights are", line)
    assert not path.exists()
    words = ("--data-path", "digits", "--arch", ARCH, "--eval", "--resume", overflowing, "--output", tmp_path)
    again = call("main_repmlp.py", *words)
    assert one_error(again) == line
    assert figures(again.out) == []


def test_a_difference_that_is_not_finite_fails_the_check(overflowing, call, tmp_path):
    path = tmp_path / "check.json"
    result = call("test.py", "digits", "check", overflowing, "-j", 0, "--tolerance", 1e30, "--json", path)
    assert result.status == 1
    assert "FAILED" in result.out
    assert "with non-finite outputs" in result.out
    found = json.loads(path.read_text())
    assert (found["difference"], found["loss"], found["injected"]["loss"]) == (None, None, None)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_batch_does_not_matter(trained, call, batch):
    result = call("test.py", "digits", "train", trained.folder / "best_ckpt.pth", "-j", 0, "-b", batch)
    assert [found[::3] for found in figures(result.out)] == [(figures(trained.result.out)[-1][0], "359")]


def test_workers_do_not_matter(trained, script):
    result = script("test.py", "digits", "train", trained.folder / "best_ckpt.pth", "-j", 2)
    assert figures(result.out) == figures(trained.result.out)[-1:]


def test_only_val_is_opened(trained, digits_val, call):
    result = call("test.py", digits_val, "check", trained.folder / "best_ckpt.pth", "-j", 0)
    assert result.status == 0, result.err
    first, second = figures(result.out)
    assert first[3] == second[3] == "359"


def test_a_published_checkpoint_evaluates_by_the_name_of_its_architecture(weights, call):
    named = call("test.py", "digits", "train", weights.bare, "-a", ARCH, "-j", 0)
    guessed = call("test.py", "digits", "train", weights.bare, "-j", 0)
    assert (named.status, guessed.status) == (0, 0)
    assert figures(named.out) == figures(guessed.out)


def test_an_architecture_of_timm_evaluates(weights, call):
    result = call("test.py", "digits", "train", weights.resnet, "-a", "resnet10t", "-r", 32, "-j", 0)
    assert (result.status, result.err) == (0, "")
    assert figures(result.out)[0][3] == "359"


def test_the_converted_file_describes_itself(deployed):
    payload = torch.load(deployed, weights_only=True)
    assert set(payload) == {"model", "meta"}
    meta = payload["meta"]
    assert (meta["arch"], meta["num_classes"], meta["image_size"], meta["form"]) == (ARCH, 10, [16, 16], "deploy")
    reference = models.create_model(ARCH, 10, deploy=True).state_dict()
    assert {k: v.shape for k, v in payload["model"].items()} == {k: v.shape for k, v in reference.items()}


def test_conversion_says_what_it_did(trained, call, tmp_path):
    result = call("convert.py", trained.folder / "best_ckpt.pth", tmp_path / "out.pth", "-a", ARCH)
    assert (result.status, result.err) == (0, "")
    assert str(tmp_path / "out.pth") in result.out
    before, after = (int(n.replace(",", "")) for n in re.findall(r"\(([\d,]+) parameters\)", result.out))
    assert before == sum(p.numel() for p in models.create_model(ARCH, 10).parameters())
    assert after == sum(p.numel() for p in models.create_model(ARCH, 10, deploy=True).parameters())
    assert float(re.search(r"difference (\S+)", result.out)[1]) < 1e-4


def test_conversion_repeats_itself(trained, deployed, call, tmp_path):
    call("convert.py", trained.folder / "best_ckpt.pth", tmp_path / "out.pth")
    first, second = (torch.load(path, weights_only=True)["model"] for path in (deployed, tmp_path / "out.pth"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_safetensors(trained, deployed, call, tmp_path):
    path = tmp_path / "deploy.safetensors"
    result = call("convert.py", trained.folder / "best_ckpt.pth", path)
    assert (result.status, result.err) == (0, "")
    expected = torch.load(deployed, weights_only=True)["model"]
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(name), expected[name]) for name in expected)
        assert json.loads(file.metadata()["meta"])["form"] == "deploy"
    evaluated = call("test.py", "digits", "deploy", path, "-j", 0)
    assert figures(evaluated.out) == figures(trained.result.out)[-1:]


def test_a_folder_that_does_not_exist_yet_is_made(trained, call, tmp_path):
    result = call("convert.py", trained.folder / "best_ckpt.pth", tmp_path / "new" / "deploy.pth")
    assert result.status == 0
    assert read_checkpoint(tmp_path / "new" / "deploy.pth").form == "deploy"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["deploy.pth"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_converted_file_is_not_converted_again(deployed, call, tmp_path, existing):
    target = tmp_path / "again.pth"
    if existing:
        target.write_text("precious")
    line = one_error(call("convert.py", deployed, target, "-a", ARCH))
    assert "is converted already" in line
    assert "nothing was written" in line
    assert target.exists() is existing
    assert not existing or target.read_text() == "precious"


@pytest.mark.parametrize("link", [False, True])
def test_a_checkpoint_is_not_overwritten_by_its_own_conversion(trained, call, tmp_path, link):
    source = Path(shutil.copy(trained.folder / "best_ckpt.pth", tmp_path / "train.pth"))
    before = source.read_bytes()
    target = source
    if link:
        target = tmp_path / "link.pth"
        target.symlink_to(source)
    assert "give another name" in one_error(call("convert.py", source, target))
    assert source.read_bytes() == before


def test_training_weights_stay_as_they_are(trained, call, tmp_path):
    before = (trained.folder / "best_ckpt.pth").read_bytes()
    call("convert.py", trained.folder / "best_ckpt.pth", tmp_path / "out.pth")
    assert (trained.folder / "best_ckpt.pth").read_bytes() == before


def test_weights_of_broken_numbers_are_not_converted(trained, call, tmp_path):
    payload = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    payload["model"]["head.weight"][0, 0] = float("nan")
    torch.save(payload, tmp_path / "nan.pth")
    line = one_error(call("convert.py", tmp_path / "nan.pth", tmp_path / "out.pth"))
    assert "nothing was written" in line
    assert not (tmp_path / "out.pth").exists()


def test_half_precision_weights_convert(trained, call, tmp_path):
    payload = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    half = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in payload["model"].items()}
    torch.save({"model": half, "meta": payload["meta"]}, tmp_path / "half.pth")
    result = call("convert.py", tmp_path / "half.pth", tmp_path / "out.pth")
    assert result.status == 0, result.err
    converted = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert {v.dtype for v in converted.values() if v.is_floating_point()} == {torch.bfloat16}
    evaluated = call("test.py", "digits", "deploy", tmp_path / "out.pth", "-j", 0)
    assert float(figures(evaluated.out)[0][0]) == pytest.approx(float(figures(trained.result.out)[-1][0]), abs=2)


@pytest.mark.parametrize("name", ["convert.py", "test.py"])
def test_help(call, name):
    result = call(name, "--help")
    assert (result.status, result.err) == (0, "")
    assert "--arch" in result.out
