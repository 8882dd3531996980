"""`tools.predict`: the answers of the network, for every image that can be read."""

import json
import os

import pytest
import torch
from PIL import Image

import data
from models.checkpoints import build_from, read_checkpoint


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Files of three held-out digits, and their labels."""
    source, folder = data.DigitsSource("val"), tmp_path_factory.mktemp("scans")
    labels = {}
    for index in (0, 100, 200):
        image, label = source.load(index)
        image.save(folder / f"{index}.png")
        labels[folder / f"{index}.png"] = label
    return labels


@torch.no_grad()
def expected(weights, paths, dataset="digits"):
    """The probabilities (N, 10) of the network itself, the images normalised as those of a data set."""
    network = build_from(read_checkpoint(weights))
    spec = data.DATASETS[dataset]
    images = torch.stack([data.eval_transform(network.image_size)(Image.open(path).convert("RGB")) for path in paths])
    return network.model(data.Normalize(spec.mean, spec.std)(images)).softmax(1)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("form", ["trained", "deployed"])
def test_predict_gives_the_probabilities_of_the_network(form, fuse, trained, deployed, scans, call, tmp_path):
    weights = trained.folder / "best_ckpt.pth" if form == "trained" else deployed
    flags = ["-k", 10, "-b", 2, "--json", tmp_path / "p.json", *["--fuse"] * fuse]
    status, out, err = call("tools/predict.py", weights, *scans, *flags)
    assert (status, err) == (0, f"by {'training' if form == 'trained' else 'deploy'} weights from {weights}\n")
    found = json.loads((tmp_path / "p.json").read_text())
    assert list(found) == list(map(str, scans))
    rows = torch.tensor([[dict(found[str(path)])[str(label)] for label in range(10)] for path in scans])
    torch.testing.assert_close(rows, expected(weights, scans), rtol=1e-4, atol=1e-6)
    assert len(out.splitlines()) == len(scans)


def test_predict_names_the_likeliest_classes_first(trained, scans, call, tmp_path):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    weights, path = trained.folder / "best_ckpt.pth", next(iter(scans))
    options = ["-k", 2, "--classes", tmp_path / "names.txt"]
    status, out, _ = call("tools/predict.py", weights, path, *options)
    best = expected(weights, [path])[0].topk(2)
    shown = ", ".join(f"{names[i]} {100 * p:.1f} %" for p, i in zip(best.values.tolist(), best.indices, strict=True))
    assert (status, out) == (0, f"{path}: {shown}\n")


@pytest.mark.parametrize("dataset", [None, "cf100"])
def test_predict_normalises_as_the_user_says_else_as_the_checkpoint_else_for_imagenet(
    dataset, trained, scans, call, tmp_path
):
    checkpoint = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    assert checkpoint["meta"].pop("dataset") == "digits"
    del checkpoint["meta"]["mean"], checkpoint["meta"]["std"]  # older files have none
    torch.save({"model": checkpoint["model"], "meta": checkpoint["meta"]}, tmp_path / "untold.pth")
    for weights, otherwise in ((trained.folder / "best_ckpt.pth", "digits"), (tmp_path / "untold.pth", "imagenet")):
        options = ["--dataset", dataset] * (dataset is not None)
        status, _, _ = call("tools/predict.py", weights, *scans, "-k", 10, "--json", tmp_path / "p.json", *options)
        assert status == 0
        found = json.loads((tmp_path / "p.json").read_text())
        rows = torch.tensor([[dict(found[str(path)])[str(label)] for label in range(10)] for path in scans])
        torch.testing.assert_close(rows, expected(weights, scans, dataset or otherwise), rtol=1e-4, atol=1e-6)


def test_predict_refuses_a_data_set_that_only_the_checkpoint_knows(trained, scans, call, tmp_path):
    checkpoint = torch.load(trained.folder / "best_ckpt.pth", weights_only=True)
    meta = checkpoint["meta"] | {"dataset": "birds", "mean": [], "std": []}
    torch.save({"model": checkpoint["model"], "meta": meta}, tmp_path / "birds.pth")
    status, out, err = call("tools/predict.py", tmp_path / "birds.pth", *scans)
    assert (status, out) == (2, "")
    assert "trained on 'birds', which is unknown here: say --dataset" in err


def test_predict_says_what_is_wrong(trained, scans, call, tmp_path):
    weights, path = trained.folder / "best_ckpt.pth", next(iter(scans))
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "text.png").write_text("no image")
    for arguments, message in (
        ((path, "--classes", tmp_path / "names.txt"), "names 2 classes, the network has 10"),
        ((tmp_path / "text.png",), "text.png: not an image of a known format"),
        ((tmp_path / "none.png",), "No such file or directory"),
        ((path, "-k", 0), "-k must be at least 1"),
        ((path, "--classes", path), "0.png holds no class names in UTF-8: "),
    ):
        status, out, err = call("tools/predict.py", weights, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err


def test_predict_names_what_it_cannot_read_and_classifies_all_others(trained, scans, call, tmp_path):
    weights, (first, second, third) = trained.folder / "best_ckpt.pth", scans
    cut, text, absent = tmp_path / "cut.png", tmp_path / "text.png", tmp_path / "none.png"
    cut.write_bytes(first.read_bytes()[:60])
    text.write_text("no image")
    paths = [cut, first, text, second, absent, tmp_path, third]
    status, out, err = call("tools/predict.py", weights, *paths, "-b", 2, "-k", 10, "--json", tmp_path / "p.json")
    assert status == 2
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(first), str(second), str(third)]
    found = json.loads((tmp_path / "p.json").read_text())
    assert list(found) == [str(first), str(second), str(third)]
    rows = torch.tensor([[dict(found[str(path)])[str(label)] for label in range(10)] for path in scans])
    torch.testing.assert_close(rows, expected(weights, scans), rtol=1e-4, atol=1e-6)
    *lines, last = err.splitlines()
    assert last == f"by training weights from {weights}"
    assert [line.split(": ")[:2] for line in lines] == [["error", str(p)] for p in (cut, text, absent, tmp_path)]
    assert "not an image of a known format" in lines[1]
    assert lines[2] == f"error: {absent}: No such file or directory"
    assert lines[3] == f"error: {tmp_path}: Is a directory"


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[2J.png", "\udcff.png", "\u202egnp.png"])
def test_predict_shows_odd_names_escaped(name, trained, scans, call, tmp_path):
    weights, odd = trained.folder / "best_ckpt.pth", tmp_path / name
    odd.write_bytes(next(iter(scans)).read_bytes())
    (tmp_path / f"broken{name}").write_text("no image")
    names = ["zero\x1b[2J", *map(str, range(1, 10))]
    (tmp_path / "names.txt").write_text("\n".join(names))
    options = ["--classes", tmp_path / "names.txt", "-k", 10, "--json", tmp_path / "p.json"]
    status, out, err = call("tools/predict.py", weights, odd, tmp_path / f"broken{name}", *options)
    assert status == 2
    assert out.removesuffix("\n").isprintable()
    assert all(line.isprintable() for line in err.split("\n"))
    assert len(err.splitlines()) == 2
    escaped = name.encode("unicode_escape").decode()
    assert out.startswith(f"{tmp_path}/{escaped}: ")
    assert "zero\\x1b[2J " in out
    assert err.startswith(f"error: {tmp_path}/broken{escaped}: not an image")
    (key,) = json.loads((tmp_path / "p.json").read_text())
    assert key == str(odd)


def test_predict_reads_no_pipe_and_gives_no_answer_that_is_not_finite(trained, scans, call, tmp_path):
    weights, path = trained.folder / "best_ckpt.pth", next(iter(scans))
    os.mkfifo(tmp_path / "pipe.png")
    status, _, err = call("tools/predict.py", weights, tmp_path / "pipe.png")
    assert (status, err) == (2, f"error: {tmp_path}/pipe.png: is no regular file\n")
    status, _, err = call("tools/predict.py", weights, path, "--classes", tmp_path / "pipe.png")
    assert (status, err) == (2, f"error: {tmp_path}/pipe.png is no regular file: give class names, one a line\n")
    payload = torch.load(weights, weights_only=True)
    huge = {name: value.double() * 1e300 for name, value in payload["model"].items() if name.endswith("head.weight")}
    torch.save(payload | {"model": payload["model"] | huge}, tmp_path / "huge.pth")
    status, out, err = call("tools/predict.py", tmp_path / "huge.pth", path)
    assert (status, out) == (2, "")
    assert "the network's outputs are not finite" in err
