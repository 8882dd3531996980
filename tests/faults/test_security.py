"""Files from strangers run no code and reach no other file; nothing asks the network."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from fault_runs import one_line
from yacs.config import CfgNode

from tools import soak


class Payload:
    """An object whose unpickling runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def raw(path: Path, payload: object) -> None:
    with path.open("wb") as file:
        pickle.dump(payload, file, protocol=2)


def legacy(path: Path, payload: object) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, raw, legacy], ids=["zip", "raw", "legacy"])
def test_a_malicious_checkpoint_runs_nothing(run, tmp_path, write):
    path, marker = tmp_path / "stranger.pth", tmp_path / "marker"
    payload = {"model": {}, "optimizer": {}, "epoch": 1, "note": Payload(marker)}
    write(*((payload, path) if write is torch.save else (path, payload)))
    error = one_line(run.start("MODEL.RESUME", path))
    assert error.startswith(f"error: {path} is damaged or no checkpoint that can be read safely: ")
    assert "it holds Python objects, and loading those could run code" in error
    assert not marker.exists()
    assert not list(run.folder.glob("*.pth"))
    pickle.loads(pickle.dumps(payload["note"]))
    assert marker.exists(), "the attack itself must work"


def test_a_malicious_checkpoint_in_the_folder_of_the_run(undisturbed, interrupted, tmp_path):
    torch.save(interrupted.state() | {"note": Payload(tmp_path / "marker")}, interrupted.folder / "latest.pth")
    interrupted.finish()
    assert "latest.pth is damaged or no checkpoint that can be read safely: it holds Python objects" in interrupted.log
    assert not (tmp_path / "marker").exists()
    assert soak.differences(undisturbed.folder, interrupted.folder) == []


def test_a_published_checkpoint_with_its_pickled_configuration_resumes(interrupted, run, tmp_path):
    """Such files are written after an epoch, with a CfgNode among the tensors."""
    state = torch.load(interrupted.folder / "ckpt_epoch_0.pth", weights_only=True)
    config = CfgNode({"TRAIN": {"EPOCHS": 300, "BASE_LR": 0.1}, "TAG": "theirs"})
    config.freeze()
    published = {key: state[key] for key in ("model", "optimizer", "epoch", "max_accuracy")}
    torch.save(published | {"lr_scheduler": {"base_values": [0.1]}, "config": config}, tmp_path / "published.pth")
    for path in interrupted.folder.glob("*.pth"):
        path.unlink()
    run.finish("MODEL.RESUME", tmp_path / "published.pth", "TRAIN.EMA_ALPHA", 0.0)
    assert f"resuming from {tmp_path}/published.pth, update 44\n" in run.log
    assert [record["epoch"] for record in run.records("eval")] == [1]


@pytest.mark.parametrize(
    "attack",
    [
        "!!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:subprocess.check_output [['touch', '{}']]",
        "!!python/name:os.system",
    ],
)
def test_a_recipe_with_python_in_it_is_refused(start, tmp_path, attack):
    recipe, marker = tmp_path / "recipe.yaml", tmp_path / "marker"
    recipe.write_text(f"TAG: {attack.format(marker)}\n")
    error = one_line(start("main_repmlp.py", "--cfg", recipe, "--output", tmp_path / "output"))
    assert str(recipe) in error
    assert not marker.exists()
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("entry", ["../../secret.png", "/etc/hostname", "ant/../../secret.png"])
def test_a_map_does_not_lead_out_of_its_zip(start, images, tmp_path, entry):
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            archive.write(images / "train/ant/0.png", "ant/0.png")
            archive.writestr(entry, "an entry may call itself that; it is never unpacked")
        (tmp_path / f"{split}_map.txt").write_text(f"ant/0.png\t0\n{entry}\t0\n")
    words = ("--zip", "--data-path", tmp_path, "--arch", "RepMLPNet-Digits", "--output", tmp_path / "output")
    error = one_line(start("main_repmlp.py", *words, "--opts", "DATA.IMG_SIZE", 16))
    assert f"{tmp_path}/train_map.txt, line 2: {entry!r} is not a path inside the zip" in error


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["\x1b[2J\nerror: forged"] * 10, r"'\x1b[2J\nerror: forged'"),
        ([str(number) for number in range(11)], "it names 11 classes and has 10 outputs"),
        (["a" * 5000], "meta.class_names is a list, not at most 1048576 texts of 1024 characters"),
        ([["a"]], "meta.class_names[0] is a list, not text"),
    ],
)
def test_names_of_classes_cannot_forge_a_line_or_fill_the_memory(start, undisturbed, images, tmp_path, names, message):
    state = torch.load(undisturbed.folder / "latest.pth", weights_only=True)
    meta = state["meta"] | {"class_names": names}
    torch.save({"model": state["model"], "meta": meta}, tmp_path / "stranger.pth")
    words = ("--eval", "--resume", tmp_path / "stranger.pth", "--data-path", images, "--output", tmp_path / "output")
    error = one_line(start("main_repmlp.py", *words))
    assert error.startswith(f"error: {tmp_path}/stranger.pth ")
    assert message in error
    assert error.isprintable()
    assert len(error) < 500


DRAWING = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n%%EOF\n"


def test_an_image_cannot_start_a_program(run, start, images, tmp_path):
    """Pillow hands a drawing in PostScript to the program `gs`, whatever the file is called."""
    root, marker = Path(shutil.copytree(images, tmp_path / "folder")), tmp_path / "marker"
    drawing = root / "train/ant/3.png"
    drawing.write_bytes(DRAWING)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "bin/gs").chmod(0o755)
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    words = ("DATA.DATA_PATH", root, "DATA.DATASET", "imagenet", "DATA.BATCH_SIZE", 16)
    for workers in (0, 2):
        run.finish(*words, "TAG", f"workers{workers}", environment=path, workers=workers)
        log = (run.folder.parent / f"workers{workers}" / "log_rank0.txt").read_text()
        assert log.count(f"unreadable image replaced: {drawing}: not an image of a known format") == 1
    assert not marker.exists()
    (tmp_path / "attack.py").write_text(f"from PIL import Image\nImage.open({str(drawing)!r}).load()\n")
    start(tmp_path / "attack.py", environment=path).wait()
    assert marker.exists(), "the attack itself must work"


@pytest.mark.parametrize(
    ("entry", "label", "message"),
    [
        ("ant/0.png", "999999999", "line 2: with the label 999999999 there would be 1000000000 classes"),
        ("ant/0.png", "9" * 5000, "line 2: the label '9"),
        ("ant/0.png\x1b[2J", "0", r"line 2: the zip has no entry 'ant/0.png\x1b[2J'"),
        ("ant/1.png", "0", "line 2: 'ant/1.png' is in line 1 already"),
    ],
)
def test_a_map_cannot_make_an_endless_list_or_forge_a_line(start, images, tmp_path, entry, label, message):
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for number in (0, 1):
                archive.write(images / f"train/ant/{number}.png", f"ant/{number}.png")
        (tmp_path / f"{split}_map.txt").write_text(f"ant/1.png\t0\n{entry}\t{label}\n")
    words = ("--zip", "--data-path", tmp_path, "--arch", "RepMLPNet-Digits", "--output", tmp_path / "output")
    error = one_line(start("main_repmlp.py", *words, "--opts", "DATA.IMG_SIZE", 16))
    assert f"{tmp_path}/train_map.txt, {message}" in error
    assert error.isprintable()
    assert len(error) < 500


def test_a_link_cannot_make_an_endless_folder(start, images, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "folder"))
    for name in ("ant/up", "bee/up"):
        (root / "val" / name).symlink_to(root)
    words = ("--data-path", root, "--arch", "RepMLPNet-Digits", "--output", tmp_path / "output")
    error = one_line(start("main_repmlp.py", *words, "--batch-size", 8, "--opts", "DATA.IMG_SIZE", 16))
    assert f"{root}/val/ant/up and {root} are one folder, whose images would count more than once" in error


ALARM = """
import os, sys

def hook(event, args):
    asks = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    if asks or (event in ("socket.connect", "socket.bind") and not isinstance(args[1], (str, bytes))):
        os.write(2, f"the network was asked: {event} {args}".encode())
        os._exit(99)

sys.addaudithook(hook)
"""


def test_no_network_access(tmp_path):
    """Any look-up or connection ends the process; where that is possible, there is no network at all besides."""
    (tmp_path / "sitecustomize.py").write_text(ALARM)
    environment = os.environ | soak.ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    alarm = subprocess.run(
        [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert alarm.returncode == 99, "the alarm itself must work"
    command = [sys.executable, *soak.arguments(tmp_path / "output", 2, {"TRAIN.EPOCHS": 1, "TRAIN.WARMUP_EPOCHS": 0})]
    unshare = shutil.which("unshare")
    if unshare and not subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode:
        command = [unshare, "-n", *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Best Acc@1" in done.stdout
