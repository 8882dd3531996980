"""The right classes: ImageNet's variants in their layouts, names that travel with weights, what is refused.

Expected figures are counted in NumPy from the logits of the network itself.
"""

import json
import pkgutil
import shutil
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from script_runs import ARCH
from timm.data import ImageNetInfo
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import models
from data import DATASETS
from models.checkpoints import build_from, read_checkpoint
from models.reparam import randomize_statistics

IDS = sorted(ImageNetInfo().label_names())
SOME = IDS[3::5]  # as many as ImageNet-A and -R have
POOL = 50  # different images
TINY = "DATA.IMG_SIZE 16 DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0"


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """Weights with 1000 outputs, and no word on what they are."""
    torch.manual_seed(0)
    model = models.create_model(ARCH, 1000)
    randomize_statistics(model)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    path = tmp_path_factory.mktemp("released") / "released.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> list[Path]:
    """Images of noise that every set is made of."""
    folder, rng = tmp_path_factory.mktemp("pool"), np.random.default_rng(0)
    for number in range(POOL):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(POOL)]


@torch.no_grad()
def logits_of(weights: Path, images: list[Path], mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD) -> np.ndarray:
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in images]) / 255
    model = build_from(read_checkpoint(weights)).model.double()
    return model(torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2)).numpy()


@pytest.fixture(scope="module")
def logits(released, pool) -> np.ndarray:
    return logits_of(released, pool)


def make(root: Path, classes: list[str], pool: list[Path]) -> tuple[Path, list[tuple[int, int]]]:
    """Links an image of the pool, or a few, into the folder of each class; returns each with its class."""
    content = []
    for position, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for copy in range(1 + position % 2):
            number = (7 * position + copy) % len(pool)
            (root / name / f"{copy}.png").hardlink_to(pool[number])
            content.append((number, position))
    return root, content


def expected(logits: np.ndarray, content: list[tuple[int, int]], outputs: list[int], masked: bool) -> dict:
    """Top-1 and top-5 in percent and the mean cross-entropy of images, each with its class."""
    compared = outputs if masked else list(range(logits.shape[1]))
    best1 = best5 = loss = 0.0
    for number, position in content:
        row, target = logits[number], outputs[position]
        order = sorted(compared, key=lambda k: -row[k])
        best1 += order[0] == target
        best5 += target in order[:5]
        loss += np.log(np.exp(row[compared]).sum()) - row[target]
    count = len(content)
    figures = {"top1": 100 * best1 / count, "top5": 100 * best5 / count, "loss": loss / count}
    return {name: pytest.approx(value, rel=1e-4) for name, value in figures.items()} | {"images": count}


@pytest.fixture
def measured(call, tmp_path):
    """Returns a function that runs `test.py`, and returns its figures and what it printed."""

    def run(images: Path | str, weights: Path, *flags: object, mode: str = "train") -> tuple[dict, str]:
        words = (images, mode, weights, "-j", 0, "--json", tmp_path / "figures.json", *flags)
        result = call("test.py", *words)
        assert (result.status, result.err) == (0, "")
        return json.loads((tmp_path / "figures.json").read_text()), result.out

    return run


@pytest.fixture
def refused(call):
    """Returns a function that runs a script, which refuses its arguments in one line."""

    def run(*words: object) -> str:
        result = call(*words)
        assert result.status == 2
        (line,) = result.err.splitlines()
        return line

    return run


def test_folders_of_numbers_as_of_imagenet_v2(measured, released, pool, logits, tmp_path):
    root, content = make(tmp_path / "v2", [str(number) for number in range(1000)], pool)
    found, out = measured(root, released)
    assert found == expected(logits, content, list(range(1000)), masked=False)
    assert f"{root} holds neither train/ nor val/: its own folders are taken as the classes\n" in out
    assert "the classes have numbers for names: each is the output of that number\n" in out


@pytest.mark.parametrize("masked", [True, False])
def test_some_classes_as_of_imagenet_a(measured, released, pool, logits, tmp_path, masked):
    root, content = make(tmp_path / "a", SOME, pool)
    outputs = [IDS.index(name) for name in SOME]
    found, out = measured(root, released, *["--all-outputs"] * (not masked), "--per-class")
    per_class = found.pop("per_class")
    assert found == expected(logits, content, outputs, masked) | {"masked": masked}
    assert f", among {'the classes of the images' if masked else 'all classes of the network'}\n" in out
    assert "200 of the 1000 classes of the weights are matched by name: those of ImageNet-1k in the order of" in out
    hits = [expected(logits, [case], outputs, masked)["top1"] for case in content if case[1] == 1]
    assert per_class[1] == np.mean([hit.expected for hit in hits])
    assert [line.split()[0] for line in out.splitlines() if line.startswith("   n")] == SOME


def test_both_structures_are_compared_on_all_outputs(measured, released, pool, logits, tmp_path):
    root, content = make(tmp_path / "a", SOME, pool)
    found, _ = measured(root, released, mode="check")
    figures = expected(logits, content, [IDS.index(name) for name in SOME], masked=True) | {"masked": True}
    assert found.pop("injected") == figures
    assert (found.pop("agreement"), found.pop("difference") < 1e-4) == (100, True)
    assert found == figures


def test_three_processes_evaluate_as_one(start, released, pool, logits, tmp_path):
    root, content = make(tmp_path / "a", SOME[:20], pool)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"--eval --arch {ARCH} --data-path {root} --resume {released} --output {tmp_path} --opts {TINY}".split()
    ranks = []
    for rank in range(3):
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
        place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start("main_repmlp.py", *words, "DATA.TEST_BATCH_SIZE", 4, "AMP", "off", environment=place))
    assert {process.wait() for process in ranks} == {0}, [process.err for process in ranks]
    figures = expected(logits, content, [IDS.index(name) for name in SOME[:20]], masked=True)
    said = f"Acc@1 {figures['top1'].expected:.3f} Acc@5 {figures['top5'].expected:.3f} "
    assert said in ranks[0].out
    assert ranks[0].out.rstrip().endswith(f"on {len(content)} images, among the classes of the images")
    assert "20 of the 1000 classes of the weights are matched by name" in ranks[0].out


def validation_set(root: Path, pool: list[Path], first: str) -> tuple[Path, list[int]]:
    """Packs the pool under names of ImageNet's validation set; returns the numbers in them."""
    root.mkdir()
    numbers = [int(first), *range(2, POOL + 1)]
    names = [f"some/ILSVRC2012_val_{number:08}.JPEG" for number in numbers]
    with zipfile.ZipFile(root / "val.zip", "w") as archive:
        for path, name in zip(pool, names, strict=True):
            archive.write(path, name)
    labels = [number % 1000 for number in range(999, 999 + POOL)]
    lines = (f"{name}\t{label}\n" for name, label in zip(names, labels, strict=True))
    (root / "val_map.txt").write_text("".join(lines))
    return root, numbers


def test_real_labels(measured, released, pool, logits, tmp_path):
    root, numbers = validation_set(tmp_path / "val", pool, "3977")
    content = pkgutil.get_data(timm.data.__name__, "_info/imagenet_real_labels.json")
    assert content is not None
    sets = [json.loads(content)[number - 1] for number in numbers]
    assert any(len(labels) > 1 for labels in sets)
    labelled = [i for i in range(POOL) if sets[i]]
    assert len(labelled) < POOL
    # One image is right by a label that is not its own.
    weights = torch.load(released, weights_only=True)["model"]
    chosen = next(i for i in labelled if sets[i][-1] != (999 + i) % 1000)
    weights["head.bias"][sets[chosen][-1]] += logits[chosen].max() - logits[chosen, sets[chosen][-1]] + 0.01
    torch.save({"model": weights}, tmp_path / "moved.pth")
    best = logits_of(tmp_path / "moved.pth", pool).argmax(1)
    right = [best[i] in sets[i] for i in labelled]
    found, out = measured(root, tmp_path / "moved.pth", "--real-labels", "--opts", "DATA.ZIP_MODE", True)
    assert (found["real"], found["real_images"]) == (pytest.approx(100 * np.mean(right)), len(labelled))
    assert sum(right) > 0
    assert found["images"] == POOL
    assert f"ReaL {found['real']:.3f} (on {len(labelled)}) on {POOL} images" in out


def test_real_labels_need_the_images_that_they_are_for(refused, released, pool, trained, tmp_path):
    root, _ = validation_set(tmp_path / "val", pool, "50001")
    words = ("train", released, "-j", 0, "--real-labels")
    assert "there is no ReaL label for" in refused("test.py", root, *words, "--opts", "DATA.ZIP_MODE", True)
    some, _ = make(tmp_path / "a", SOME[:2], pool)
    assert "ReaL labels are for the validation set of ImageNet with its 1000" in refused("test.py", some, *words)
    training = refused("main_repmlp.py", "--data-path", "digits", "--opts", "TEST.REAL_LABELS", True)
    assert "leave TEST.REAL_LABELS out of a training" in training


@pytest.fixture(scope="module")
def content_of_digits(pool, tmp_path_factory) -> tuple[Path, list[tuple[int, int]]]:
    """Folders of two of the digits' classes."""
    return make(tmp_path_factory.mktemp("digits") / "some", ["3", "7"], pool)


@pytest.mark.parametrize("masked", [True, False])
def test_weights_of_a_run_know_their_classes(measured, trained, pool, content_of_digits, masked):
    root, content = content_of_digits
    weights = trained.folder / "best_ckpt.pth"
    found, out = measured(root, weights, *["--all-outputs"] * (not masked))
    digits = DATASETS["digits"]  # by whose statistics the weights were trained
    logits = logits_of(weights, pool, digits.mean, digits.std)
    assert found == expected(logits, content, [3, 7], masked) | {"masked": masked}
    assert "2 of the 10 classes of the weights are matched by name\n" in out


def test_names_in_a_file_stand_for_those_of_the_weights(measured, refused, trained, content_of_digits, tmp_path):
    root, _ = content_of_digits
    bare, names, lettered = tmp_path / "bare.pth", tmp_path / "names.txt", tmp_path / "lettered"
    torch.save(trained.weights("best_ckpt.pth"), bare)
    for folder in root.iterdir():
        shutil.copytree(folder, lettered / f"digit {folder.name}")
    for weights in (trained.folder / "best_ckpt.pth", bare):
        error = refused("test.py", lettered, "train", weights, "-j", 0)
        assert f"{weights} is for 10 classes, {lettered} has 2" in error
    names.write_text("".join(f"digit {digit}\n" for digit in range(10)))
    mean, std = (",".join(map(str, values)) for values in DATASETS["digits"].statistics(3))  # which bare ones lack
    found, out = measured(lettered, bare, "--classes", names, "--opts", "DATA.MEAN", mean, "DATA.STD", std)
    assert "2 of the 10 classes of the weights are matched by name\n" in out
    assert found == measured(root, trained.folder / "best_ckpt.pth")[0]


def test_classes_travel_from_the_folder_to_converted_weights(train, call, refused, images, tmp_path):
    words = f"--arch {ARCH} --data-path {{}} --batch-size 8 --opts {TINY}"
    run = train(words.format(images))
    latest, deploy = run.folder / "latest.pth", tmp_path / "deploy.safetensors"
    assert torch.load(latest, weights_only=True)["meta"]["class_names"] == ["ant", "bee"]
    assert call("convert.py", latest, deploy).status == 0
    assert read_checkpoint(deploy).meta["class_names"] == ["ant", "bee"]
    picture = next(images.rglob("*.png"))
    assert {"ant", "bee"} < {*call("tools/predict.py", deploy, picture).out.replace(",", "").split()}

    other = tmp_path / "other"
    for split in ("train", "val"):
        shutil.copytree(images / split / "ant", other / split / "bee")
        shutil.copytree(images / split / "bee", other / split / "ant\x1b")
    error = refused("test.py", other, "deploy", deploy, "-j", 0)
    assert f"{deploy} does not know 1 of the 2 classes in {other}: 'ant\\x1b'; it knows 'ant', 'bee': rename" in error
    words = [*words.format(other).split(), "TRAIN.EPOCHS", "1", "TAG", "run", "OUTPUT", str(run.output)]
    error = refused("main_repmlp.py", *words)
    assert f"of another experiment, since in {other} class 0 is 'ant\\x1b', not 'ant': restore the classes" in error
