"""Running the scripts, and what they work on: trained weights of every kind, small data sets with and without flaws."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Process, clean_environment

import models
from models.checkpoints import read_checkpoint
from models.reparam import to_deploy

ROOT = Path(__file__).parents[2]
ARCH = "RepMLPNet-Digits"
# Two epochs, so that there is a warm-up; a numbered checkpoint after each.
SHORT = f"--cfg {ROOT}/configs/quickstart.yaml --opts TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 SAVE_FREQ 1"


class Result(NamedTuple):
    """How a script ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


class Run(NamedTuple):
    """A training that has ended: its output folder, its own folder there, and what it printed."""

    output: Path
    folder: Path
    result: Result

    def records(self, kind: str) -> list[dict]:
        """The records of one kind in `metrics.jsonl`."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def weights(self, name: str = "latest.pth", key: str = "model") -> dict[str, torch.Tensor]:
        """The weights in one of its checkpoints."""
        return torch.load(self.folder / name, weights_only=True)[key]


def as_user(command: Sequence[str], folder: Path, timeout: float = 300) -> Result:
    """Runs a command as a user would, with a fresh interpreter."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=timeout,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def user() -> Callable[..., Result]:
    """Returns a function that runs `python <script> <arguments>` with a fresh interpreter, outside of the project."""

    def run(*arguments: object, folder: Path | None = None) -> Result:
        script, *rest = map(str, arguments)
        if script.startswith("-"):
            return as_user([sys.executable, script, *rest], folder or Path(tempfile.gettempdir()))
        return as_user([sys.executable, str(ROOT / script), *rest], folder or Path(tempfile.gettempdir()))

    return run


@pytest.fixture(scope="session")
def script(start: Callable[..., Process]) -> Callable[..., Result]:
    """Returns a function that runs a script in a process of its own, without the time that its imports take."""

    def run(*arguments: object, **options: object) -> Result:
        process = start(*arguments, **options)
        status = process.wait()
        return Result(status, process.out, process.err)

    return run


@pytest.fixture(scope="session")
def train(script, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Returns a function that trains with some arguments to a new output folder, and asserts that it succeeds."""

    def run(arguments: str, *, arch: str = ARCH, tag: str = "run", output: Path | None = None, **options) -> Run:
        output = output or tmp_path_factory.mktemp("output")
        words = arguments.split()
        at = words.index("--opts") if "--opts" in words else len(words)
        result = script("main_repmlp.py", *words[:at], "--output", output, "--tag", tag, *words[at:], **options)
        assert result.status == 0, result.err
        return Run(output, output / arch / tag, result)

    return run


@pytest.fixture(scope="session")
def trained(user, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The short run on the digits that all tests share; nobody writes to its folder."""
    output = tmp_path_factory.mktemp("trained")
    result = user("main_repmlp.py", "--output", output, "--tag", "first", *SHORT.split())
    assert result.status == 0, result.err
    return Run(output, output / ARCH / "first", result)


@pytest.fixture(scope="session")
def deployed(user, trained: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its best weights, converted."""
    path = tmp_path_factory.mktemp("deployed") / "deploy.pth"
    result = user("convert.py", trained.folder / "best_ckpt.pth", path, "-a", ARCH)
    assert result.status == 0, result.err
    return path


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


def digest(path: Path) -> str:
    """What a file holds, in short."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
