"""A BatchNorm behind the FC3 of a converted network, by the scripts: inserted, trained, resumed, converted again."""

import re

import pytest
import torch
from script_runs import ROOT, same

from models import create_model
from models.checkpoints import read_checkpoint

ARCH = "RepMLPNet-Digits"
ACCURACY = re.compile(r"Acc@1 \S+ Acc@5 \S+ loss \S+ on \d+ images")
# Rates so low that the accuracy of the trained network stays.
FINE_TUNING = (
    f"--cfg {ROOT}/configs/quickstart.yaml --pretrained {{weights}} --opts MODEL.INSERT_BN True TRAIN.EPOCHS 2 "
    "TRAIN.WARMUP_EPOCHS 0 TRAIN.BASE_LR 1e-4 TRAIN.WEIGHT_DECAY 0.0 TRAIN.EMA_ALPHA 1e-3 AUG.PRESET none SAVE_FREQ 1"
)


@pytest.fixture(scope="module")
def tuned(deployed, train):
    return train(FINE_TUNING.format(weights=deployed))


@pytest.fixture(scope="module")
def converted(tuned, script, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "deploy.pth"
    result = script("convert.py", tuned.folder / "latest.pth", path)
    assert (result.status, result.err) == (0, "")
    return path


@pytest.mark.parametrize("form", ["training", "deploy"])
def test_the_conversion_option_inserts_it_into_weights_of_either_form(form, trained, deployed, call, tmp_path):
    source = trained.folder / "best_ckpt.pth" if form == "training" else deployed
    target = tmp_path / "inserted.pth"
    result = call("convert.py", source, target, "--insert-bn")
    assert (result.status, result.err) == (0, "")
    assert f" {form} weights from " in result.out
    assert float(re.search(r"largest relative logit difference (\S+)", result.out)[1]) < 1e-6
    plain, inserted = read_checkpoint(deployed).state_dict, read_checkpoint(target)
    assert (inserted.form, inserted.meta["structure"]) == ("train", {"insert_bn": True})
    assert same({k: v for k, v in inserted.state_dict.items() if ".fc3_bn." not in k}, plain)
    evaluated = [call("test.py", "digits", *words, "-j", 0) for words in (("train", target), ("deploy", deployed))]
    assert ACCURACY.findall(evaluated[0].out) == ACCURACY.findall(evaluated[1].out) != []
    check = call("test.py", "digits", "check", target, "-j", 0)
    assert check.status == 0
    assert "top-1 agreement 100.000 %" in check.out


def test_the_option_is_refused_for_a_network_without_fc3(call, tmp_path):
    torch.save({"model": create_model("ResMLP-Shapes", 10, deploy=True).state_dict()}, tmp_path / "resmlp.pth")
    result = call("convert.py", tmp_path / "resmlp.pth", tmp_path / "out.pth", "-a", "ResMLP-Shapes", "--insert-bn")
    assert result.status == 2
    assert "--insert-bn: ResMLP-Shapes has no insert_bn to change; leave it out; nothing was written" in result.err
    assert not (tmp_path / "out.pth").exists()


def test_fine_tuning_goes_on_from_the_trained_function(tuned, trained, deployed):
    payload = torch.load(tuned.folder / "latest.pth", weights_only=True)
    assert (payload["meta"]["form"], payload["meta"]["structure"]) == ("train", {"insert_bn": True})
    added = payload["model"].keys() - read_checkpoint(deployed).state_dict.keys()
    assert len(added) == 4 * 5  # blocks, tensors of a BatchNorm
    assert all(".fc3_bn." in name for name in added)
    assert "except for 20 tensors, which are new (stages.0.0.repmlp_block.fc3_bn.weight" in tuned.result.out
    assert len(re.findall(r"inserted BatchNorms calibrated on \d+ batches of each process", tuned.result.out)) == 1
    before, first = trained.records("eval")[-1], tuned.records("eval")[0]
    assert first["top1"] > before["top1"] - 2
    assert first["loss"] < before["loss"] + 0.1
    assert tuned.records("train_epoch")[-1]["loss"] < 1.1 * trained.records("train_epoch")[-1]["loss"]


def test_a_resumed_fine_tuning_is_not_calibrated_again_and_ends_the_same(tuned, deployed, train, tmp_path):
    folder = tmp_path / ARCH / "run"
    folder.mkdir(parents=True)
    (folder / "latest.pth").write_bytes((tuned.folder / "ckpt_epoch_0.pth").read_bytes())
    resumed = train(FINE_TUNING.format(weights=deployed), output=tmp_path)
    assert "resuming from" in resumed.result.out
    assert "calibrated" not in resumed.result.out
    assert same(resumed.weights(), tuned.weights())
    assert same(resumed.weights(key="ema"), tuned.weights(key="ema"))


def test_the_tuned_network_is_converted_to_the_plain_deploy_structure(tuned, converted, deployed, call):
    weights = read_checkpoint(converted)
    assert weights.form == "deploy"
    assert weights.state_dict.keys() == read_checkpoint(deployed).state_dict.keys()
    results = [
        call("test.py", "digits", *words, "-j", 0)
        for words in (("train", tuned.folder / "latest.pth"), ("deploy", converted), ("deploy", converted, "--fuse"))
    ]
    assert [result.status for result in results] == [0, 0, 0]
    figures = [ACCURACY.findall(result.out) for result in results]
    assert figures[0] == figures[1] == figures[2] != []


def test_main_evaluates_it(tuned, call, tmp_path):
    words = ("--data-path", "digits", "--arch", ARCH, "--eval", "--resume", tuned.folder / "latest.pth")
    result = call("main_repmlp.py", *words, "--output", tmp_path)
    assert (result.status, result.err) == (0, "")
    last = tuned.records("eval")[-1]
    assert f"Acc@1 {last['top1']:.3f}" in result.out


@pytest.mark.filterwarnings("default")  # the exporters of some versions of torch warn of themselves
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_it_is_exported(suffix, fuse, tuned, call, tmp_path):
    result = call("tools/export.py", tuned.folder / "latest.pth", tmp_path / f"a{suffix}", *["--fuse"] * fuse)
    assert result.status == 0, result.err
    assert float(re.search(r"largest relative logit difference (\S+)", result.out)[1]) < 1e-5


def test_weights_with_it_need_the_key_and_training_weights_need_conversion(tuned, trained, script, tmp_path):
    def error(weights: object, *opts: object) -> str:
        words = ("--cfg", ROOT / "configs" / "quickstart.yaml", "--pretrained", weights, "--output", tmp_path)
        result = script("main_repmlp.py", *words, *(["--opts", *opts] if opts else []))
        assert result.status == 2
        return result.err

    assert "set MODEL.INSERT_BN to True" in error(tuned.folder / "latest.pth")
    assert "convert them first (convert.py)" in error(trained.folder / "best_ckpt.pth", "MODEL.INSERT_BN", True)
