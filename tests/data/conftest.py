"""Small data sets in the real formats, written to a temporary folder."""

import hashlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from named_sets import WRITERS
from PIL import Image
from stored_sets import CLASSES
from torchvision.datasets import CIFAR10, CIFAR100

from data.datasets import WITHOUT_PATH
from utils.seed import seed_everything


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    """Writes a smooth random image of (width, height) pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(autouse=True)
def _same_draws_in_each_run() -> None:
    seed_everything(0)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Three classes; four training and two test images each."""
    root = tmp_path / "folder"
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                write_image(root / split / name / f"{number}.png", seed=100 * label + number)
    return root


@pytest.fixture
def face_folder(image_folder: Path) -> Path:
    """The images of `image_folder`, those of `val` as other people than those of `train`."""
    for name in CLASSES:
        (image_folder / "val" / name).rename(image_folder / "val" / f"other {name}")
    return image_folder


@pytest.fixture
def image_zip(image_folder: Path, tmp_path: Path) -> Path:
    """The images of `image_folder`, zipped."""
    root = tmp_path / "zipped"
    root.mkdir()
    for split in ("train", "val"):
        lines = []
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for path in sorted((image_folder / split).rglob("*.png")):
                entry = path.relative_to(image_folder / split).as_posix()
                archive.write(path, entry)
                lines.append(f"{entry}\t{CLASSES.index(path.parent.name)}\n")
        (root / f"{split}_map.txt").write_text("".join(lines))
    return root


def write_cifar(
    root: Path, monkeypatch: pytest.MonkeyPatch, reader: type[CIFAR10], labels: str, train: list[str]
) -> Path:
    """Writes a CIFAR's files with a few random images, whose checksums torchvision is made to expect.

    `labels` is the key of the labels, `train` the names of the files of the training part, which share 20 images.
    """
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    classes = 10 if reader is CIFAR10 else 100

    def write(name: str, content: dict[str, object]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def part(count: int) -> dict[str, object]:
        pixels = generator.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        return {"data": pixels, labels: [int(label) for label in generator.integers(0, classes, count)]}

    names = {reader.meta["key"]: [f"class {label}" for label in range(classes)]}
    test = reader.test_list[0][0]
    monkeypatch.setattr(reader, "train_list", [[name, write(name, part(20 // len(train)))] for name in train])
    monkeypatch.setattr(reader, "test_list", [[test, write(test, part(10))]])
    meta = reader.meta["filename"]
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": write(meta, names)})
    return root


@pytest.fixture
def cifar10_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10's seven files with a few random images."""
    files = [f"data_batch_{number}" for number in range(1, 6)]
    return write_cifar(tmp_path / "cifar10", monkeypatch, CIFAR10, "labels", files)


@pytest.fixture
def cifar100_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-100's three files with a few random images."""
    return write_cifar(tmp_path / "cifar100", monkeypatch, CIFAR100, "fine_labels", ["train"])


@pytest.fixture
def data_path(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Returns a function from the name of a data set to a path with some of its data."""
    fixtures = {
        "imagenet": "image_folder",
        "cf10": "cifar10_folder",
        "cf100": "cifar100_folder",
        "cityscapes": "cityscapes_folder",
        "faces": "face_folder",
        "torchvision/CIFAR10": "cifar10_folder",
        "torchvision/CIFAR100": "cifar100_folder",
    }
    monkeypatch, root = request.getfixturevalue("monkeypatch"), request.getfixturevalue("tmp_path")

    def find(name: str) -> str:
        if name in WITHOUT_PATH:
            return name
        writer = WRITERS.get(name.removeprefix("torchvision/"))
        if writer is not None:
            writer(root, monkeypatch)
            return str(root)
        if name not in fixtures:
            pytest.fail(f"write a fixture with some images of {name}, and list it here: {__file__}")
        return str(request.getfixturevalue(fixtures[name]))

    return find
