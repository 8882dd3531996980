"""What the scripts work on: trained weights of every kind, small data sets with and without flaws."""

import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from script_runs import ARCH, Run

import models
from models.checkpoints import read_checkpoint
from models.reparam import to_deploy


def write_image(path: Path, label: int, number: int) -> None:
    """Writes an image of 20 x 16 pixels in the colour of its label, with some noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([label, number]).integers(0, 60, (16, 20, 3), dtype=np.uint8)
    noise[..., label % 3] += 150
    Image.fromarray(noise).save(path)


def write_folder(root: Path, splits: Sequence[str] = ("train", "val"), classes: Sequence[str] = ("ant", "bee")) -> Path:
    """Writes an image folder with twelve training and five test images a class."""
    for split in splits:
        for label, name in enumerate(classes):
            for number in range(12 if split == "train" else 5):
                write_image(root / split / name / f"{number}.png", label, number + 100 * (split == "val"))
    return root


def digits_folder(root: Path) -> Path:
    """Writes the test part of the digits as an image folder that has nothing but `val`."""
    from data import DigitsSource

    source = DigitsSource("val")
    for index in range(len(source)):
        image, label = source.load(index)
        path = root / "val" / str(label) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound image folder of two classes."""
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def digits_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test part of the digits as an image folder without a training part."""
    return digits_folder(tmp_path_factory.mktemp("digits_val"))


@pytest.fixture(scope="session")
def zipped(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `images` in zip files with their maps."""
    root = tmp_path_factory.mktemp("zipped")
    for split in ("train", "val"):
        lines = []
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for path in sorted((images / split).rglob("*.png")):
                entry = path.relative_to(images / split).as_posix()
                archive.write(path, entry)
                lines.append(f"{entry}\t{('ant', 'bee').index(path.parent.name)}\n")
        (root / f"{split}_map.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="session")
def flawed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Image folders with one flaw each, by its name."""
    root = tmp_path_factory.mktemp("flawed")

    def copy(name: str) -> Path:
        return Path(shutil.copytree(images, root / name))

    result = SimpleNamespace(absent=root / "absent", empty=root / "empty")
    result.empty.mkdir()
    result.only_val = write_folder(root / "only_val", splits=("val",))
    result.only_train = write_folder(root / "only_train", splits=("train",))
    result.empty_class = copy("empty_class")
    for split in ("train", "val"):
        (result.empty_class / split / "cow").mkdir()
    result.unknown_class = copy("unknown_class")
    write_image(result.unknown_class / "val" / "cow" / "0.png", 2, 0)
    result.cut_val = copy("cut_val")
    cut = result.cut_val / "val" / "bee" / "3.png"
    cut.write_bytes(cut.read_bytes()[:100])
    result.text_train = copy("text_train")
    (result.text_train / "train" / "bee" / "3.png").write_text("this is a text\n")
    result.unreadable = copy("unreadable")
    for path in (result.unreadable / "train").rglob("*.png"):
        path.write_text("this is a text\n")
    result.no_map = root / "no_map"
    result.no_map.mkdir()
    zipfile.ZipFile(result.no_map / "train.zip", "w").close()
    result.three = write_folder(root / "three", classes=("ant", "bee", "cow"))
    return result


class Surprise:
    """An object that a checkpoint must not bring along: unpickling it would run a command."""

    def __reduce__(self) -> tuple:
        return os.system, ("echo surprise",)


@pytest.fixture(scope="session")
def weights(trained: Run, deployed: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Checkpoints of every kind, by name."""
    root = tmp_path_factory.mktemp("weights")
    result = SimpleNamespace(train=trained.folder / "best_ckpt.pth", deploy=deployed, absent=root / "absent.pth")
    payload = torch.load(trained.folder / "latest.pth", weights_only=True)

    def save(name: str, content: object) -> None:
        setattr(result, name, root / f"{name}.pth")
        torch.save(content, root / f"{name}.pth")

    def fresh(name: str, arch: str, classes: int) -> None:
        torch.manual_seed(0)
        model = models.create_model(arch, classes)
        save(name, {"model": model.state_dict()})

    save("bare", payload["model"])
    save("deploy_run", payload | {"model": to_deploy(built(result.train)).state_dict()})
    save("listed", [payload["model"]["head.bias"]])
    save("no_tensors", {"model": {"head.weight": "not a tensor"}})
    save("nothing", {})
    save("code", {"model": payload["model"], "extra": Surprise()})
    save("incomplete", {"model": {k: v for k, v in payload["model"].items() if not k.startswith("head.")}})
    save(
        "holey", {"model": {k: v for k, v in payload["model"].items() if k != "stages.0.1.repmlp_block.fc3_bn.weight"}}
    )
    fresh("seven", ARCH, 7)
    fresh("resnet", "resnet10t", 10)
    save("unknown", {"model": {"layer.weight": torch.ones(3, 3)}})
    result.text = root / "text.pth"
    result.text.write_text("this is no checkpoint\n")
    result.hollow = root / "hollow.pth"
    result.hollow.touch()
    result.cut = root / "cut.pth"
    result.cut.write_bytes(result.train.read_bytes()[:5000])
    result.folder = root
    return result


def built(path: Path) -> torch.nn.Module:
    """The trained network of a checkpoint."""
    checkpoint = read_checkpoint(path)
    model = models.create_model(ARCH, 10)
    model.load_state_dict(checkpoint.state_dict)
    return model.eval()
