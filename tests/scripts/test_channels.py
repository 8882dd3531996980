"""Images of one or four channels with their own statistics, from the training to all that reads the weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from script_runs import ARCH, Run

from data import DigitsSource
from models import create_model
from models.checkpoints import build_from, read_checkpoint
from repmlpnet import inference_model

EPOCH = f"--cfg {Path(__file__).parents[2]}/configs/quickstart.yaml --opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"
OWN = "images are normalised by mean 0.3, std 0.3763, as in the training of the weights\n"


def accuracy(text: str) -> str:
    return re.findall(r"Acc@1 ([\d.]+) ", text)[-1]


@pytest.fixture(scope="module")
def grey(train: Any) -> Run:
    """A short training on grey digits with a mean of their own, with weighted classes and repeats."""
    return train(
        f"{EPOCH} DATA.CHANNELS 1 DATA.MEAN 0.3 DATA.REPEATED_AUG 3 AUG.MIXUP 0.4 TRAIN.CLASS_WEIGHTS balanced"
    )


def test_the_weights_say_how_their_images_are_normalised(grey):
    saved = torch.load(grey.folder / "latest.pth", weights_only=True)
    meta = {key: saved["meta"][key] for key in ("dataset", "in_chans", "mean", "std")}
    assert meta == {"dataset": "digits", "in_chans": 1, "mean": [0.3], "std": [pytest.approx(0.376279)]}
    assert saved["model"]["conv_embedding.conv.weight"].shape[1] == 1
    labels = torch.from_numpy(DigitsSource("train").labels)
    torch.testing.assert_close(saved["criterion"]["weight"], len(labels) / (10 * labels.bincount()))


def test_evaluations_normalise_as_the_training_did_and_say_so(grey, call, tmp_path):
    weights, expected = grey.folder / "latest.pth", accuracy(grey.result.out)
    words = (*EPOCH.split()[:2], "--eval", "--resume", weights, "--output", tmp_path)
    evaluated = call("main_repmlp.py", *words)
    assert OWN in evaluated.out
    assert accuracy(evaluated.out) == expected
    tested = call("test.py", "digits", "train", weights, "-j", 0)
    assert OWN in tested.out
    assert accuracy(tested.out) == expected
    other = call("test.py", "digits", "train", weights, "-j", 0, "--opts", "DATA.MEAN", 0.9)
    assert "normalised by mean 0.9, std 0.3763; in the training of the weights by mean 0.3, std 0.3763\n" in other.out
    assert accuracy(other.out) != expected
    refused = call("test.py", "digits", "train", weights, "-j", 0, "--opts", "DATA.CHANNELS", 3)
    assert (refused.status, refused.out) == (2, refused.out)
    assert f"{weights} takes images of 1 channel(s), DATA.CHANNELS is 3: leave it out" in refused.err


def test_converted_weights_keep_channels_and_statistics(grey, call, tmp_path):
    weights, deploy = grey.folder / "latest.pth", tmp_path / "deploy.pth"
    assert call("convert.py", weights, deploy).status == 0
    tested = call("test.py", "digits", "deploy", deploy, "-j", 0)
    assert OWN in tested.out
    assert accuracy(tested.out) == accuracy(grey.result.out)
    checked = call("test.py", "digits", "check", weights, "-j", 0)
    assert checked.status == 0, checked.out
    network = build_from(read_checkpoint(deploy))
    image, _ = DigitsSource("val").load(7)
    image.convert("RGB").save(tmp_path / "digit.png")
    pixels = torch.tensor(list(image.resize((16, 16), Image.Resampling.BILINEAR).convert("L").get_flattened_data()))
    with torch.no_grad():
        outputs = network.model((pixels.view(1, 1, 16, 16) / 255 - 0.3) / 0.376279)
    expected = outputs.softmax(1)[0]
    scores = inference_model(network.model, tmp_path / "digit.png")["pred_scores"]
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-4, atol=1e-5)
    found = call("tools/predict.py", deploy, tmp_path / "digit.png", "-k", 10, "--json", tmp_path / "figures.json")
    assert found.status == 0, found.err
    figures = dict(json.loads((tmp_path / "figures.json").read_text())[str(tmp_path / "digit.png")])
    torch.testing.assert_close(torch.tensor([figures[str(i)] for i in range(10)]), expected, rtol=1e-4, atol=1e-5)


def test_plain_weights_lose_the_statistics_and_the_user_is_told(grey, call, tmp_path):
    converted = call("convert.py", grey.folder / "latest.pth", tmp_path / "plain.pth", "--plain")
    assert re.search(r"evaluations need --opts DATA\.MEAN 0\.3 DATA\.STD 0\.37627\d+\n", converted.out)


@pytest.mark.parametrize("opts", ["", "DATA.MEAN 0.3,0.3,0.3,0.5", "DATA.MEAN 0.3,0.3,0.3 DATA.STD 0.4,0.4,0.4"])
def test_four_channels_need_statistics(call, tmp_path, opts):
    result = call("main_repmlp.py", *f"{EPOCH} DATA.CHANNELS 4 AUG.PRESET none OUTPUT {tmp_path} {opts}".split())
    assert result.status == 2
    assert "set DATA.MEAN and DATA.STD" in result.err or "images of 4 channel(s) (DATA.CHANNELS) need" in result.err
    assert not any(tmp_path.iterdir())


def test_weights_for_rgb_start_a_training_on_four_channels(call, trained, tmp_path):
    four = "DATA.CHANNELS 4 DATA.MEAN 0.3,0.3,0.3,0.5 DATA.STD 0.4,0.4,0.4,0.4 AUG.PRESET weak TRAIN.BASE_LR 0"
    source = trained.folder / "best_ckpt.pth"
    result = call("main_repmlp.py", *f"{EPOCH} {four} OUTPUT {tmp_path} MODEL.PRETRAINED {source}".split())
    assert result.status == 0, result.err
    assert "for 4 channels (conv_embedding.conv.weight is repeated from that for 3)" in result.out
    saved = torch.load(tmp_path / ARCH / "quickstart" / "latest.pth", weights_only=True)
    kernel = torch.load(source, weights_only=True)["model"]["conv_embedding.conv.weight"]
    expected = kernel[:, [0, 1, 2, 0]] * 0.75
    torch.testing.assert_close(saved["model"]["conv_embedding.conv.weight"], expected)


def test_metadata_for_other_channels_than_the_network_takes(call, trained, tmp_path):
    payload = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    payload["meta"]["mean"] = [0.5] * 4
    torch.save(payload, tmp_path / "damaged.pth")
    result = call("test.py", "digits", "train", tmp_path / "damaged.pth", "-j", 0)
    assert result.status == 2
    assert "is damaged: it normalises images of 4 and 3 channels, its network takes 3" in result.err


def test_a_summary_counts_the_channels(call):
    result = call("main_repmlp.py", *EPOCH.split()[:2], "--summary", "--opts", "DATA.CHANNELS", 1)
    assert result.status == 0, result.err
    kernel = create_model(ARCH, 10, in_chans=1).conv_embedding.conv.weight
    (row,) = re.findall(r"^conv_embedding +(\d+)", result.out, re.MULTILINE)
    assert int(row) - kernel.numel() == 64  # the BatchNorm
