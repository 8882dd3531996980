"""Files that are written: not over what is read, and whole or not at all."""

import errno
import json
import os
import resource
import stat
from functools import partial
from pathlib import Path

import pytest

from data import CityscapesSource, FolderSource, ListSource, TarSource, ZipSource
from data.torchvision_sets import open_torchvision
from utils.files import check_target, clear_about_space, user_path, write_json, write_text


@pytest.fixture
def inputs(tmp_path):
    """A file and a folder that are read."""
    (tmp_path / "weights.pth").write_bytes(b"weights")
    (tmp_path / "data" / "val").mkdir(parents=True)
    return [tmp_path / "weights.pth", tmp_path / "data", "digits"]


@pytest.mark.parametrize("name", ["new.json", "old.json", "deep/er/new.json", "data2/a.json", "data.json", "val"])
def test_a_target_of_its_own(inputs, tmp_path, name):
    (tmp_path / "old.json").write_text("{}")
    check_target(tmp_path / name, inputs)
    check_target(tmp_path / name, map(str, inputs))
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("name", ["data", "data/..", ".", "/"])
def test_a_folder_is_no_target(inputs, tmp_path, name):
    with pytest.raises(ValueError, match="is a folder: give the name of a file"):
        check_target(tmp_path / name, inputs)


@pytest.mark.parametrize("name", ["weights.pth", "data/../weights.pth", "link", "chain", "hard"])
def test_an_input_is_no_target_by_any_name(inputs, tmp_path, name):
    (tmp_path / "link").symlink_to("weights.pth")
    (tmp_path / "chain").symlink_to("link")
    (tmp_path / "hard").hardlink_to(tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"{name} is read, and would be replaced: give another name"):
        check_target(tmp_path / name, inputs)
    with pytest.raises(ValueError, match="is read"):
        check_target(tmp_path / "weights.pth", [tmp_path / name])


@pytest.mark.parametrize("name", ["data/a.json", "data/val/new/a.json", "elsewhere/a.json", "data/val/../a.json"])
def test_nothing_is_written_into_a_folder_that_is_read(inputs, tmp_path, name):
    (tmp_path / "elsewhere").symlink_to("data/val")
    with pytest.raises(ValueError, match=r"a.json lies in .*data, which is read: give a name elsewhere"):
        check_target(tmp_path / name, inputs)


def test_a_link_out_of_a_folder_that_is_read_leads_elsewhere(inputs, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "data" / "results").symlink_to(tmp_path / "results")
    check_target(tmp_path / "data" / "results" / "a.json", inputs)


def test_a_device_or_a_pipe_is_not_replaced(inputs, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for name in ("pipe", "null"):
        with pytest.raises(ValueError, match="is no regular file"):
            check_target(tmp_path / name, inputs)


def test_a_file_in_the_way(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"a.json can't be written, .*weights.pth takes no files"):
        check_target(tmp_path / "weights.pth" / "a.json", inputs)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(inputs, tmp_path):
    (tmp_path / "data").chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ValueError, match="takes no files"):
        check_target(tmp_path / "data" / "a.json", [])


def test_links_in_a_circle(inputs, tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    check_target(tmp_path / "circle", inputs)
    write_text(tmp_path / "circle", "replaced")
    assert (tmp_path / "circle").read_text() == "replaced"


@pytest.mark.parametrize(
    ("figures", "read"),
    [
        ({"top1": 0.1 + 0.2, "images": 3}, {"top1": 0.1 + 0.2, "images": 3}),
        (
            {"top1": float("nan"), "loss": [float("inf"), (1.0, float("-inf"))]},
            {"top1": None, "loss": [None, [1.0, None]]},
        ),
        ({"Ärger\n\udce9": ["蚂蚁", None, True]}, {"Ärger\n\udce9": ["蚂蚁", None, True]}),
        ([], []),
    ],
)
def test_figures_are_read_back(tmp_path, figures, read):
    write_json(tmp_path / "new" / "a.json", figures)
    text = (tmp_path / "new" / "a.json").read_bytes()
    assert json.loads(text) == read
    assert text.endswith(b"\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_what_json_does_not_know_leaves_the_older_file(tmp_path):
    (tmp_path / "a.json").write_text("older")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"path": tmp_path})
    assert (tmp_path / "a.json").read_text() == "older"


@pytest.fixture
def largest_file():
    """Files of at most 4096 bytes, as on a disk that is full afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path, largest_file):
    (tmp_path / "a.txt").write_text("older")
    with pytest.raises(OSError, match=r"a.txt can't be written to: File too large"):
        write_text(tmp_path / "a.txt", "x" * 5000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "older"


def test_text_is_utf8_with_its_own_line_ends(tmp_path):
    write_text(tmp_path / "a.txt", "Ärger\r\n蚂蚁\n")
    assert (tmp_path / "a.txt").read_bytes() == "Ärger\r\n蚂蚁\n".encode()


def test_a_full_disk_is_named():
    full = r"^/dev/full can't be written to: No space left on device; make room"
    with pytest.raises(OSError, match=full), clear_about_space("/dev/full"), open("/dev/full", "w") as file:
        file.write("x")
    with pytest.raises(OSError, match=r"^/run/lock can't be written to: .*; wait$"), clear_about_space("/run", "wait"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/lock")


def test_other_refusals_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), clear_about_space(tmp_path):
        (tmp_path / "none").read_text()


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~") == tmp_path
    assert user_path("~/a/~") == tmp_path / "a" / "~"
    assert user_path("~root/a") == Path("/root/a")
    assert user_path(Path("a/~root")) == Path("a/~root")
    for path in ("~nosuchuser", "~nosuchuser/a", Path("~nosuchuser/a")):
        with pytest.raises(ValueError, match=r"^~nosuchuser.*: there is no such user; write \./~"):
            user_path(path)
    with pytest.raises(ValueError, match=r"^'a\\x00b' has a NUL character"):
        user_path("a\0b")


def test_a_data_path_of_nobody(tmp_path):
    for source in (
        FolderSource,
        ZipSource,
        TarSource,
        ListSource,
        partial(open_torchvision, "CIFAR10"),
        CityscapesSource,
    ):
        with pytest.raises(ValueError, match="there is no such user"):
            source("~nosuchuser/images", "val")
    with pytest.raises(ValueError, match="there is no such user"):
        check_target(tmp_path / "a.json", ["~nosuchuser/images"])
