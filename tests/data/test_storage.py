"""Storage that hangs, shrinks, has gone or is closed, with real files."""

import ctypes
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from settings import settings

from data import DigitsSource, FolderSource, ZipSource, build_eval_loader, build_train_loader, eval_transform
from data.loaders import most_workers
from utils.log import NAME

SIZE = (24, 24)
ONCE_IT_CAN = "start again once it can"


def loading(num_workers: int):
    return settings(f"DATA.BATCH_SIZE 1 DATA.NUM_WORKERS {num_workers} DATA.PIN_MEMORY False").DATA


class Records(logging.Handler):
    """What the project's logger says."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    handler = Records()
    logging.getLogger(NAME).addHandler(handler)
    yield handler.records
    logging.getLogger(NAME).removeHandler(handler)


def hang(path: Path, until: Callable[[], bool], content: bytes) -> threading.Thread:
    """Makes a file block whoever reads it until a condition holds; then it has this content."""

    def write() -> None:
        limit = time.monotonic() + 60
        while not until() and time.monotonic() < limit:
            time.sleep(0.01)
        path.write_bytes(content)

    path.unlink()
    os.mkfifo(path)
    thread = threading.Thread(target=write)
    thread.start()
    return thread


def build(kind: str, folder: Path, num_workers: int):
    if kind == "train":
        return build_train_loader(FolderSource(folder, "train"), eval_transform(SIZE), loading(num_workers), seed=0)
    return build_eval_loader(FolderSource(folder, "val"), eval_transform(SIZE), loading(num_workers))


@pytest.mark.parametrize(("kind", "num_workers"), [("train", 2), ("val", 1), ("val", 0)])
def test_a_read_that_hangs_is_named_and_waited_for(image_folder, logged, kind, num_workers):
    loader = build(kind, image_folder, num_workers)
    expected = [batch.images for batch in loader]
    path = image_folder / kind / "bee" / "1.png"
    loader.patience_s = 0.2
    writer = hang(path, lambda: len(logged) == 2, path.read_bytes())
    batches = list(loader)
    writer.join()
    assert all(torch.equal(batch.images, images) for batch, images in zip(batches, expected, strict=True))
    assert [batch.unreadable for batch in batches] == [[]] * len(expected)
    here = os.getpid()
    for record in logged:
        text, _, process = record.getMessage().partition(" s (process ")
        assert text.rpartition(" for ")[0] == f"waiting for {path}"
        assert (int(process.rstrip(")")) == here) == (num_workers == 0)
    first, second = (record.created for record in logged)
    assert second - first > 0.15, "it is named again after twice the time"


@pytest.mark.skipif(most_workers() < 2, reason="needs two cores")
def test_of_several_reads_that_hang_one_is_named_and_the_others_are_counted(image_folder, logged):
    loader = build("val", image_folder, 2)
    expected = [batch.images for batch in loader]
    loader.patience_s = 0.2
    both = [image_folder / "val/ant" / name for name in ("0.png", "1.png")]  # each read by another process

    def are_named() -> bool:
        return any(record.getMessage().endswith("), and for 1 more") for record in logged)

    writers = [hang(path, are_named, path.read_bytes()) for path in both]
    assert all(torch.equal(batch.images, images) for batch, images in zip(loader, expected, strict=True))
    for writer in writers:
        writer.join()
    assert are_named()


def test_a_loader_that_nobody_asks_is_not_taken_for_one_that_hangs(logged):
    loader = build_eval_loader(DigitsSource("val"), eval_transform((8, 8)), loading(1))
    loader.patience_s = 0.5
    for number, _ in enumerate(loader):
        if number == 0:
            time.sleep(1)
    assert logged == []


def test_a_file_that_shrinks_while_it_is_read_is_unreadable(image_folder):
    path = image_folder / "val" / "bee" / "1.png"
    loader = build("val", image_folder, 0)
    writer = hang(path, lambda: True, path.read_bytes()[:60])
    (found,) = [message for batch in loader for message in batch.unreadable]
    writer.join()
    assert found.startswith(f"{path}: ")


def test_an_archive_that_shrinks_while_it_is_read_has_unreadable_images(image_zip):
    source = ZipSource(image_zip, "train", cache_mode="no")
    expected = source.load(0)[0].tobytes()
    archive = image_zip / "train.zip"
    os.truncate(archive, archive.stat().st_size // 2)
    loader = build_eval_loader(source, eval_transform(SIZE), loading(0))
    messages = {message for batch in loader for message in batch.unreadable}
    assert 0 < len(messages) < len(source)
    assert all(message.startswith(f"{archive}/") for message in messages)
    assert source.load(0)[0].tobytes() == expected


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["train", "val"])
def test_a_folder_that_vanishes_is_one_error(image_folder, kind, num_workers):
    """And no list of images that can't be read, which others would replace."""
    batches = iter(build(kind, image_folder, num_workers))
    next(batches)
    (image_folder / kind).rename(image_folder / "elsewhere")
    line = rf"^the folder {image_folder}/{kind}/\w+ can't be read: No such file or directory; {ONCE_IT_CAN}$"
    with pytest.raises(OSError, match=line):
        list(batches)


def test_a_single_file_that_vanishes_is_an_unreadable_image(image_folder):
    loader = build("val", image_folder, 0)
    (image_folder / "val/ant/0.png").unlink()
    assert [message for batch in loader for message in batch.unreadable] == [
        f"{image_folder}/val/ant/0.png: [Errno 2] No such file or directory: '{image_folder}/val/ant/0.png'"
    ]


class CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def obey_permissions() -> None:
    """Makes this process obey the permissions of files, as that of a user does, also if it is one of root."""
    if os.geteuid() == 0:
        no_capabilities = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capset(ctypes.byref(CapabilityHeader(0x20080522, 0)), no_capabilities) == 0, ctypes.get_errno()


def messages_of(folder: Path, connection) -> None:
    """Sends the unreadable images of an evaluation by a process that obeys permissions, or its error."""
    obey_permissions()
    try:
        connection.send([message for batch in build("val", folder, 0) for message in batch.unreadable])
    except OSError as error:
        connection.send(str(error))


def test_permissions_that_are_missing(image_folder):
    """For one file, an unreadable image; for a folder, an error, at its first image or where it can't be listed."""
    path = image_folder / "val" / "bee" / "1.png"
    path.chmod(0)
    assert in_a_process(image_folder) == [f"{path}: [Errno 13] Permission denied: '{path}'"]
    path.parent.chmod(0o600)
    assert in_a_process(image_folder) == f"the folder {path.parent} can't be read: Permission denied; {ONCE_IT_CAN}"
    path.parent.chmod(0)
    assert in_a_process(image_folder) == f"[Errno 13] Permission denied: '{path.parent}'"
    path.parent.chmod(0o700)


def in_a_process(folder: Path) -> list[str] | str:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=messages_of, args=(folder, there))
    process.start()
    found = here.recv()
    process.join()
    return found
