"""Files of checkpoints: plain, whole or absent, and under check sums."""

import json
import os
import pickle
import resource
import stat
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors.torch
import torch
from model_helpers import randomised
from safetensors import safe_open
from torch import Tensor

from models import create_model
from models.files import link_checkpoint, read_payload, write_atomically, write_checkpoint

META = {"arch": "RepMLPNet-Digits", "image_size": [16, 16], "form": "deploy", "structure": {}}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return randomised(create_model("RepMLPNet-Digits", 6, deploy=True)).float().state_dict()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_are_plain(name: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "new folder" / name
    write_checkpoint(path, {"model": weights, "meta": META})
    if name.endswith(".pth"):
        payload = torch.load(path, weights_only=True)
        assert payload["meta"] == META
        assert list(payload["model"]) == list(weights)
    else:
        with safe_open(path, framework="pt") as file:
            assert json.loads(file.metadata()["meta"]) == META
        assert safetensors.torch.load_file(path).keys() == weights.keys()
    read = read_payload(path)
    assert read["meta"] == META
    assert all(torch.equal(value, read["model"][key]) for key, value in weights.items())
    assert [p.name for p in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_files_can_be_read_by_others(name: str, tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write_checkpoint(tmp_path / name, {"model": {"a": torch.ones(2)}})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o644


def test_an_old_file_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("old")
    seen = []

    def write(file: BinaryIO) -> None:
        for piece in (b"ne", b"w"):
            file.write(piece)
            file.flush()
            seen.append(path.read_text())

    write_atomically(path, write)
    assert seen == ["old", "old"]
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_the_whole_file_reaches_the_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sync = tmp_path / "new" / "folder" / "a.pth", os.fsync
    synced: list[tuple[str, bool]] = []

    def observed(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append(("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes", path.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", observed)
    write_atomically(path, lambda file: file.write(b"short"))
    assert synced == [("5 bytes", False), ("folder", True)]
    assert path.read_bytes() == b"short"


def test_equal_content_is_equal_bytes_and_the_users_mask_holds(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        for name in ("a.pth", "b.pth"):
            write_checkpoint(tmp_path / name, {"model": {"a": torch.ones(2)}})
    finally:
        os.umask(mask)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_failed_write_leaves_the_old_file_and_no_other(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_checkpoint(path, {"model": {"a": torch.ones(2)}})
    old = path.read_bytes()
    unwritable = {"model": {"a": torch.zeros(1000)}, "meta": {"callback": lambda: None}}
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        write_checkpoint(path, unwritable)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_text("old")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_disk_that_takes_no_more_is_an_os_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_checkpoint(path, {"model": {"a": torch.ones(2)}})
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r".") as error:
            write_checkpoint(path, {"model": {"a": torch.ones(2**20)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_safetensors_take_views(tmp_path: Path) -> None:
    view = torch.arange(6.0).reshape(2, 3).t()
    write_checkpoint(tmp_path / "a.safetensors", {"model": {"a": view}})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a.safetensors")["a"], view)


def test_every_byte_of_the_weights_is_under_a_check_sum(weights: dict[str, Tensor], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth", {"model": weights})
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    assert len(tensors) == len(weights)
    assert sum(entry.file_size for entry in tensors) == sum(v.nbytes for v in weights.values())


def test_a_second_name_is_the_same_file_and_replaces_another(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.pth", {"model": {"a": torch.ones(2)}})
    (tmp_path / "b.pth").write_text("old")
    link_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
    assert (tmp_path / "b.pth").samefile(tmp_path / "a.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"]
