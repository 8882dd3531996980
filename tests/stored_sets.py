"""The images of an image folder, written in every format that images may be stored in."""

import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

CLASSES = ("ant", "bee", "cat")


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes a tar file with these files in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _images(folder: Path, split: str) -> dict[str, bytes]:
    """Returns the images of an image folder by `class/file`."""
    paths = sorted(path for path in (folder / split).rglob("*") if path.is_file())
    return {path.relative_to(folder / split).as_posix(): path.read_bytes() for path in paths}


def _as_folder(folder: Path, root: Path, split: str) -> None:
    for name, content in _images(folder, split).items():
        (root / split / name).parent.mkdir(parents=True, exist_ok=True)
        (root / split / name).write_bytes(content)


def _as_zip(folder: Path, root: Path, split: str) -> None:
    with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
        for name, content in _images(folder, split).items():
            archive.writestr(name, content)
    lines = [f"{name}\t{CLASSES.index(name.split('/')[0])}\n" for name in _images(folder, split)]
    (root / f"{split}_map.txt").write_text("".join(lines))
    (root / "classes.txt").write_text("\n".join(CLASSES))


def _as_shards(folder: Path, root: Path, split: str) -> None:
    """As for WebDataset: shuffled, five images a file, each with its label and something more."""
    images = list(_images(folder, split).items())
    np.random.default_rng(0).shuffle(images)
    for start in range(0, len(images), 5):
        files = {}
        for number, (name, content) in enumerate(images[start : start + 5]):
            label = str(CLASSES.index(name.split("/")[0]))
            files |= {f"{start + number:05}.png": content, f"{start + number:05}.cls": label.encode()}
            files |= {f"{start + number:05}.json": b"{}"}
        write_tar(root / f"{split}-{start // 5:06}.tar", files)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")


def _as_tar_of_folders(folder: Path, root: Path, split: str) -> None:
    with tarfile.open(root / f"{split}.tar", "w") as archive:
        archive.add(folder / split, arcname=f"./{split}")


def _as_tar_of_each_class(folder: Path, root: Path, split: str) -> None:
    for name in CLASSES:
        images = _images(folder, split).items()
        write_tar(root / split / f"{name}.tar", {key.split("/")[1]: c for key, c in images if key.startswith(name)})


def _as_csv(folder: Path, root: Path, split: str) -> None:
    rows = [f'"{folder}/{split}/{name}",{name.split("/")[0]}\r\n' for name in _images(folder, split)]
    (root / f"{split}.csv").write_text("".join(["path,label\r\n", *rows]), encoding="utf-8-sig")


def _as_text(folder: Path, root: Path, split: str) -> None:
    (root / "images").exists() or (root / "images").symlink_to(folder)
    rows = [f"images/{split}/{name} {CLASSES.index(name.split('/')[0])}\n" for name in _images(folder, split)]
    (root / f"{split}.txt").write_text("".join(rows))
    (root / "classes.json").write_text('{"bee": 1, "ant": 0, "cat": 2}')


# The entry of FORMATS that reads it, and a function of an image folder, a folder to write to, and a split.
STORED: dict[str, tuple[str, Callable[[Path, Path, str], None]]] = {
    "folder": ("folder", _as_folder),
    "zip": ("zip", _as_zip),
    "shards": ("tar", _as_shards),
    "tar of folders": ("tar", _as_tar_of_folders),
    "tar of each class": ("tar", _as_tar_of_each_class),
    "csv": ("list", _as_csv),
    "text": ("list", _as_text),
}


def store(how: str, folder: Path, root: Path) -> str:
    """Writes the images of an image folder in another form; returns the settings that read it."""
    form, write = STORED[how]
    root.mkdir()
    for split in ("train", "val"):
        write(folder, root, split)
    return f"DATA.DATA_PATH {root} DATA.FORMAT {form}"
