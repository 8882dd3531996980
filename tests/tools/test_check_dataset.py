"""`tools.check_dataset`: each kind of fault in real files, alone, and none where there is none."""

import json
import os
import re
import shutil
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from settings import settings

import data
from tools import check_dataset
from tools.check_dataset import KINDS


def write(path: Path, seed: int, size: tuple[int, int] = (40, 36), mode: str = "RGB", **options: object) -> None:
    """Writes noise of (width, height) pixels, which takes more than 1 kB."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, **options)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Two classes, three training and two test images each."""
    root = tmp_path_factory.mktemp("sound")
    for number in range(10):
        split, name = ("train", "val")[number >= 6], ("ant", "bee")[number % 2]
        (root / split / name).mkdir(parents=True, exist_ok=True)
        write(root / split / name / f"{number}.png", number)
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "root"))


def unreadable(root: Path) -> list[list[str]]:
    (root / "val/bee/7.png").write_text("this is a text\n")
    return [["val/bee/7.png"]]


def truncated(root: Path) -> list[list[str]]:
    os.truncate(root / "train/bee/1.png", 2000)
    return [["train/bee/1.png"]]


def two_classes(root: Path) -> list[list[str]]:
    shutil.copy(root / "train/ant/0.png", root / "val/bee/copy.png")
    shutil.copy(root / "train/ant/0.png", root / "train/ant/copy.png")
    return [["train/ant/0.png", "train/ant/copy.png", "val/bee/copy.png"]]


def train_and_val(root: Path) -> list[list[str]]:
    shutil.copy(root / "train/ant/2.png", root / "val/ant/2.png")
    return [["train/ant/2.png", "val/ant/2.png"]]


def repeated(root: Path) -> list[list[str]]:
    shutil.copy(root / "val/ant/6.png", root / "val/ant/copy.png")
    return [["val/ant/6.png", "val/ant/copy.png"]]


def case(root: Path) -> list[list[str]]:
    write(root / "train/ant/a.png", 20)
    write(root / "train/ant/A.png", 21)
    return [["train/ant/A.png", "train/ant/a.png"]]


def tiny(root: Path) -> list[list[str]]:
    write(root / "train/ant/narrow.png", 20, (100, 31))
    Image.new("RGB", (64, 64)).save(root / "train/bee/empty.png")
    return [["train/ant/narrow.png"], ["train/bee/empty.png"]]


def unbalanced(root: Path) -> list[list[str]]:
    for number in range(17):
        write(root / "val/bee" / f"more{number}.png", 20 + number)
    write(root / "val/bee/last.png", 50)
    return [["val"]]


def rotated(root: Path) -> list[list[str]]:
    exif = Image.Exif()
    exif[0x0112] = 6
    write(root / "train/ant/rotated.jpg", 20, exif=exif)
    exif[0x0112] = 1
    write(root / "train/ant/upright.jpg", 21, exif=exif)
    return [["train/ant/rotated.jpg"]]


def deep_png(path: Path) -> None:
    """Writes RGB with 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + np.random.default_rng(row).bytes(6 * 40) for row in range(40))
    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def deep(root: Path) -> list[list[str]]:
    grey = np.random.default_rng(0).integers(0, 2**16, (40, 40), dtype=np.uint16)
    Image.fromarray(grey).save(root / "train/ant/grey.png")
    deep_png(root / "train/bee/rgb.png")
    return [["train/ant/grey.png"], ["train/bee/rgb.png"]]


def cmyk(root: Path) -> list[list[str]]:
    write(root / "train/ant/cmyk.jpg", 20, mode="CMYK")
    return [["train/ant/cmyk.jpg"]]


def huge(root: Path) -> list[list[str]]:
    Image.new("1", (2**13, 2**12 + 1)).save(root / "train/ant/huge.png")
    return [["train/ant/huge.png"]]


def extension(root: Path) -> list[list[str]]:
    (root / "train/ant/0.png").rename(root / "train/ant/0.jpg")
    write(root / "train/ant/photo.jpeg", 20)
    return [["train/ant/0.jpg"]]


def left_out(root: Path) -> list[list[str]]:
    (root / "train/ant/Thumbs.db").write_bytes(b"")
    (root / "train/bee/.ipynb_checkpoints").mkdir()
    shutil.copy(root / "train/ant/0.png", root / "train/bee/.ipynb_checkpoints")
    shutil.copy(root / "train/ant/0.png", root / "train/beside.png")
    return [["train/ant/Thumbs.db"], ["train/beside.png"], ["train/bee/.ipynb_checkpoints"]]


FAULTS = {
    "unreadable": unreadable,
    "truncated": truncated,
    "two classes": two_classes,
    "train and val": train_and_val,
    "case": case,
    "tiny": tiny,
    "unbalanced": unbalanced,
    "repeated": repeated,
    "rotated": rotated,
    "16 bits": deep,
    "CMYK": cmyk,
    "huge": huge,
    "extension": extension,
    "left out": left_out,
}


def checked(call, folder: object, *options: object):
    """Returns the result of a check, and what it has written."""
    file = Path(options[-1]) if options and str(options[-1]).endswith(".json") else None
    result = call(
        "tools/check_dataset.py", folder, *options[: -1 if file else None], *(["--json", file] if file else [])
    )
    return result, json.loads(file.read_text()) if file else None


def test_every_kind_is_tested():
    assert {*FAULTS, "empty class"} == KINDS.keys()  # that one has a test of its own, below


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_found_alone(call, root, tmp_path, kind):
    expected = FAULTS[kind](root)
    result, found = checked(call, root, "-j", 0, tmp_path / "report.json")
    level, text = KINDS[kind]
    assert result.status == (level == "error"), result.err
    assert [row["kind"] for row in found["findings"]] == [kind] * len(expected), found["findings"]
    places = [[place.removeprefix(f"{root}/") for place in row["where"]] for row in found["findings"]]
    assert sorted(places) == sorted(expected)
    assert {row["level"] for row in found["findings"]} == {level}
    assert f"{level:<8}{len(expected):>9}  {text}\n" in result.out
    counts = {"error": 0, "warning": 0, "note": 0} | {level: len(expected)}
    assert result.out.splitlines()[-1] == "{error} errors, {warning} warnings, {note} notes".format(**counts)


def test_what_is_said_of_a_sound_data_set(call, root, tmp_path):
    write(root / "train/ant/grey.jpg", 20, mode="L")
    write(root / "train/bee/palette.png", 21, mode="P")
    files = [path for path in root.glob("train/*/*")]
    written = [checked(call, root, "-j", workers, tmp_path / f"{workers}.json")[1] for workers in (0, 2)]
    assert all(split.pop("seconds") > 0 for report in written for split in report["splits"].values())
    assert written[0] == written[1]
    result, found = checked(call, root, tmp_path / "report.json")
    assert (result.status, result.err, found["findings"]) == (0, "", [])
    assert found["splits"]["train"] == {
        "seconds": found["splits"]["train"]["seconds"],
        "images": 8,
        "bytes": sum(path.stat().st_size for path in files),
        "formats": {"PNG": 7, "JPEG": 1},
        "modes": {"RGB": 6, "L": 1, "P": 1},
        "classes": {"ant": 4, "bee": 4},
    }
    lines = result.out.splitlines()
    assert re.fullmatch(
        r"train: 8 images of 2 classes; [\d.]+ KiB; PNG 7, JPEG 1; RGB 6, L 1, P 1; \d+ images/s", lines[0]
    )
    assert lines[2:] == ["0 errors, 0 warnings, 0 notes"]


def test_a_training_meets_the_error_that_is_listed(call, root, tmp_path):
    unreadable(root)
    truncated(root)
    _, found = checked(call, root, tmp_path / "report.json")
    for row in found["findings"]:
        source = data.FolderSource(root, Path(row["where"][0]).parts[-3])
        index = [source.locate(i) for i in range(len(source))].index(row["where"][0])
        with pytest.raises((OSError, ValueError)) as caught:
            source.load(index)
        assert str(caught.value) == row["detail"]


def test_a_few_examples_are_printed_and_all_are_written(call, root, tmp_path):
    for path in (root / "train").glob("*/*.png"):
        path.write_bytes(b"")
    result, found = checked(call, root, "--split", "train", tmp_path / "report.json")
    assert len(found["findings"]) == 6
    assert list(found["splits"]) == ["train"]
    assert result.out.count(f"  {root}/train/") == check_dataset.EXAMPLES
    assert "  ...\n" in result.out


def test_names_are_escaped(call, root):
    (root / "val/bee/\x1b[2J\n.png").write_bytes(b"")
    result, _ = checked(call, root)
    assert f"  {root}/val/bee/\\x1b[2J\\n.png: not an image of a known format" in result.out


def test_a_zip_with_a_class_without_images(call, root, tmp_path):
    for split in data.sources.SPLITS:
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            paths = sorted((root / split).rglob("*.png"))
            for path in paths:
                archive.write(path, path.name)
        labels = [2 * (path.parent.name == "bee") for path in paths]
        lines = [f"{path.name}\t{label}\n" for path, label in zip(paths, labels, strict=True)]
        (tmp_path / f"{split}_map.txt").write_text("".join(lines))
    result, _ = checked(call, tmp_path, "--opts", "DATA.ZIP_MODE", "True")
    assert result.status == 0
    assert result.out.splitlines()[2] == f"warning {2:>9}  {KINDS['empty class'][1]}"
    assert "  train: 1\n  val: 1\n" in result.out


def test_class_names_that_differ_in_case(call, root):
    for split in ("train", "val"):
        (root / split / "Ant").mkdir()
        write(root / split / "Ant" / "new.png", 20 + len(split))
    result, _ = checked(call, root)
    assert result.status == 0
    assert result.out.splitlines()[2:4] == [f"warning {2:>9}  {KINDS['case'][1]}", "  Ant = ant"]


@pytest.mark.parametrize("name", ["digits", "cityscapes"])
def test_other_data_sets(call, name, cityscapes_folder):
    path = "digits" if name == "digits" else cityscapes_folder
    result, _ = checked(call, path, "--dataset", name, "--split", "val")
    count = {"digits": 359, "cityscapes": 4}[name]
    assert result.status == 0
    assert result.out.startswith(f"val: {count} images of ")


def test_people_may_differ_and_images_may_not(call, root):
    """Of data sets for verification: train and val have classes of their own."""
    (root / "val/ant").rename(root / "val/carl")
    shutil.copy(root / "train/ant/0.png", root / "val/carl")
    result, _ = checked(call, root, "--dataset", "faces")
    assert result.status == 1
    assert f"  {root}/train/ant/0.png = {root}/val/carl/0.png: ant, carl\n" in result.out


class Interrupted(data.DigitsSource):
    """Ctrl-C while its 200th image is read."""

    def _image(self, index: int) -> Image.Image:
        if index == 200:
            os.kill(os.getpid(), signal.SIGINT)
        return super()._image(index)


def test_an_interrupted_check_says_how_far_it_was():
    cfg = settings("DATA.NUM_WORKERS 0").DATA
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted after 192 of 359 images of val$"):
        check_dataset.read("val", Interrupted("val"), cfg, [])


def test_a_folder_that_vanishes_ends_the_check(root):
    source = data.FolderSource(root, "val")
    (root / "val").rename(root / "elsewhere")
    with pytest.raises(OSError, match=f"^the folder {root}/val/ant can't be read: No such file or directory"):
        check_dataset.read("val", source, settings("DATA.NUM_WORKERS 1").DATA, [])


def test_a_mistake_is_one_line(call, root, tmp_path):
    result, _ = checked(call, tmp_path / "nowhere")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert result.err.startswith("error: no class folders at ")
    result = call("tools/check_dataset.py", root, "--json", root / "report.json")
    assert (result.status, result.out) == (2, "")
    assert "lies in" in result.err
