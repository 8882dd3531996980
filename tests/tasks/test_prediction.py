"""`inference_model`: MMPretrain's page with our own weights, and the answers of the network itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from models import create_model
from models.checkpoints import build_from, read_checkpoint
from repmlpnet import get_model, inference_model

ARCH = "RepMLPNet-Digits"


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a held-out digit."""
    path = tmp_path_factory.mktemp("scan") / "digit.png"
    data.DigitsSource("val").load(100)[0].save(path)
    return path


@torch.no_grad()
def expected(weights: Path, image: Image.Image, dataset: str = "digits", crop: bool = False) -> torch.Tensor:
    """The probabilities (10,) of the network itself."""
    network, spec = build_from(read_checkpoint(weights)), data.DATASETS[dataset]
    pixels = data.eval_transform(network.image_size, crop=crop)(image)
    return network.model(data.Normalize(spec.mean, spec.std)(pixels[None])).softmax(1)[0]


@pytest.mark.parametrize("converted", [False, True])
def test_predict_image_as_on_the_page_of_mmpretrain(trained, scan, converted):
    model = get_model(ARCH, pretrained=trained.folder / "best_ckpt.pth")
    if converted:
        model.backbone.switch_to_deploy()
    predict = inference_model(model, str(scan))
    scores = expected(trained.folder / "best_ckpt.pth", Image.open(scan).convert("RGB"))
    assert list(predict) == ["pred_scores", "pred_label", "pred_score", "pred_class"]
    torch.testing.assert_close(torch.from_numpy(predict["pred_scores"]), scores, rtol=1e-4, atol=1e-6)
    assert predict["pred_label"] == int(scores.argmax())
    assert predict["pred_class"] == str(int(scores.argmax()))
    assert predict["pred_score"] == pytest.approx(float(scores.max()), rel=1e-4)
    model.class_names = [f"digit {label}" for label in range(10)]
    assert inference_model(model, str(scan))["pred_class"] == f"digit {predict['pred_label']}"


def test_use_the_model_as_on_the_page_of_mmpretrain():
    model = get_model("repmlp-base_3rdparty_8xb64_in1k", device="meta")
    inputs = torch.rand(1, 3, 224, 224, device="meta")
    assert model(inputs).shape == (1, 1000)
    feats = model.extract_feat(inputs)
    assert [feat.shape for feat in feats] == [(1, 768)]


def test_an_image_is_a_file_an_array_or_an_image(deployed, scan):
    model = get_model(ARCH, pretrained=deployed)
    image = Image.open(scan).convert("RGB")
    colourful = Image.fromarray(np.asarray(image) // np.array([1, 2, 3], dtype=np.uint8))
    colourful.save(scan.parent / "colourful.png")
    answers = [
        inference_model(model, of)["pred_scores"]
        for of in (scan.parent / "colourful.png", np.asarray(colourful), colourful)
    ]
    torch.testing.assert_close(torch.from_numpy(answers[0]), expected(deployed, colourful), rtol=1e-4, atol=1e-6)
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])
    assert not np.array_equal(answers[0], inference_model(model, np.asarray(colourful)[..., ::-1])["pred_scores"])


def test_a_model_by_its_name_and_names_of_the_classes(deployed, scan):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    predict = inference_model(ARCH, scan, pretrained=deployed, device="cpu", classes=names)
    assert predict["pred_class"] == names[predict["pred_label"]]
    with pytest.raises(ValueError, match="nothing is downloaded: give the file"):
        inference_model(ARCH, scan)
    with pytest.raises(ValueError, match="classes has 2 names, the network has 10 classes"):
        inference_model(ARCH, scan, pretrained=deployed, classes=names[:2])


def test_cropping_and_the_normalisation_of_imagenet(deployed, scan, tmp_path):
    bare = torch.load(deployed, weights_only=True)["model"]
    torch.save(bare, tmp_path / "bare.pth")
    image = Image.open(scan).convert("RGB").resize((40, 30))
    found = inference_model(get_model(ARCH, pretrained=tmp_path / "bare.pth"), image, crop=True)
    scores = expected(deployed, image, "imagenet", crop=True)
    torch.testing.assert_close(torch.from_numpy(found["pred_scores"]), scores, rtol=1e-4, atol=1e-6)


def test_a_network_in_training_mode_and_half_precision(deployed, scan):
    model = get_model(ARCH, pretrained=deployed).train().to(torch.bfloat16)
    predict = inference_model(model, scan)
    assert not model.training
    assert next(model.parameters()).dtype == torch.bfloat16
    scores = expected(deployed, Image.open(scan).convert("RGB")).numpy()
    assert np.abs(predict["pred_scores"] - scores).max() < 0.05


def test_an_image_of_16_bits(deployed, tmp_path):
    image = Image.fromarray(np.arange(0, 64000, 250, dtype=np.uint16).reshape(16, 16))
    image.save(tmp_path / "grey.png")
    model = get_model(ARCH, pretrained=deployed)
    scores = [inference_model(model, of)["pred_scores"] for of in (image, tmp_path / "grey.png")]
    assert np.array_equal(*scores)


def test_what_can_not_be_classified(deployed, scan, tmp_path):
    model = get_model(ARCH, pretrained=deployed)
    with pytest.raises(ValueError, match=r"an array of an image is \(H, W, 3\) of uint8, not \(4, 4\) of float64"):
        inference_model(model, np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"of uint8, not \(0, 5, 3\) of uint8"):
        inference_model(model, np.zeros((0, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="an image is a file, an array or an image of Pillow, not a NoneType"):
        inference_model(model, None)
    with pytest.raises(ValueError, match="pretrained is for a model given by its name"):
        inference_model(model, scan, pretrained=deployed)
    with pytest.raises(FileNotFoundError):
        inference_model(model, tmp_path / "none.png")
    with pytest.raises(ValueError, match="takes a network of get_model, with a head, not a Linear"):
        inference_model(torch.nn.Linear(2, 2), scan)
    with pytest.raises(ValueError, match="with a head"):
        inference_model(create_model(ARCH, num_classes=0), scan)
    with pytest.raises(ValueError, match="pools its last map"):
        inference_model(create_model(ARCH, global_pool=""), scan)
    with pytest.raises(ValueError, match="32-bit float pixels have no known range"):
        inference_model(model, Image.open(scan).convert("F"))
    model.dataset = "faces"
    with pytest.raises(ValueError, match="trained on 'faces': its outputs are not those of classes"):
        inference_model(model, scan)
    model.dataset, model.statistics = "birds", None
    with pytest.raises(ValueError, match="trained on 'birds', which is unknown here"):
        inference_model(model, scan)
