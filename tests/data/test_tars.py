"""Tar files: what is read of them, the saved index, and files that are damaged or hostile."""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stored_sets import write_tar

from data import TarSource, tars


def png(number: int) -> bytes:
    """Returns an image that can be told from others."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 6, 3), number, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def numbers(source: TarSource) -> list[tuple[int, str]]:
    """Returns the number of each image and its class."""
    loaded = (source.load(index) for index in range(len(source)))
    return [(image.getpixel((0, 0))[0], source.classes[label]) for image, label in loaded]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "repmlpnet"


@pytest.fixture
def root(tmp_path) -> Path:
    """Two shards of three images with labels by name."""
    root = tmp_path / "tars"
    write_tar(root / "val-000000.tar", {"a.png": png(1), "a.cls": b"cat\n", "b.png": png(2), "b.cls": b"ant"})
    write_tar(root / "val-000001.tar", {"x/c.x.png": png(3), "x/c.cls": b"cat", "x/c.txt": b"a cat"})
    return root


def add(path: Path, *members: tarfile.TarInfo, content: bytes = b"") -> None:
    """Adds entries to a tar file."""
    with tarfile.open(path, "a") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(content) if content else None)


def entry(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def test_labels_lie_beside_the_images(root):
    source = TarSource(root, "val")
    assert numbers(source) == [(1, "cat"), (2, "ant"), (3, "cat")]
    assert source.classes == ["ant", "cat"]
    assert [source.name(index) for index in range(3)] == ["a.png", "b.png", "x/c.x.png"]
    assert source.locate(2) == f"{root}/val-000001.tar/x/c.x.png"


def test_numbers_are_named_by_a_file_beside_them(tmp_path):
    write_tar(tmp_path / "val.tar", {"a.png": png(1), "a.cls": b"1", "b.png": png(2), "b.cls": b"0"})
    assert numbers(TarSource(tmp_path, "val")) == [(1, "1"), (2, "0")]
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    source = TarSource(tmp_path, "val")
    assert numbers(source) == [(1, "bee"), (2, "ant")]
    assert source.classes == ["ant", "bee", "cat"]
    (tmp_path / "classes.txt").write_text("ant\n")
    with pytest.raises(ValueError, match=r"val.tar/a.png: the label 1 is none of the 1 classes that classes.txt"):
        TarSource(tmp_path, "val")


def test_the_folder_of_an_image_is_its_class_however_deep(tmp_path):
    files = {"./data/train/dog/1.png": png(1), "/data/train/../train/ant/2.jpg.png": png(2), "README.txt": b"by me"}
    write_tar(tmp_path / "train.tar", files)
    source = TarSource(tmp_path, "train")
    assert numbers(source) == [(1, "dog"), (2, "ant")]
    assert source.locate(1) == f"{tmp_path}/train.tar/data/train/ant/2.jpg.png"
    assert not (tmp_path / "data").exists()


def test_a_class_may_have_folders_of_its_own(tmp_path):
    """As in an image folder, whatever lies above all classes, and in whichever file."""
    write_tar(tmp_path / "train-000000.tar", {"./set/cat/b1/0.png": png(0), "set/cat/b2/c/1.png": png(1)})
    write_tar(tmp_path / "train-000001.tar", {"set/dog/b1/2.png": png(2), "set/dog/3.png": png(3)})
    assert numbers(TarSource(tmp_path, "train")) == [(0, "cat"), (1, "cat"), (2, "dog"), (3, "dog")]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/0.png", "train/1.png"), "the folder train of its images is that of a split, not of a class"),
        (("a/train/cat/0.png", "a/val/cat/0.png"), "the folder train of its images is that of a split"),
        (("training/cat/0.png", "test/cat/0.png"), "the folder test of its images is that of a split"),
        (("set/0.png", "set/cat/1.png", "set/dog/2.png"), "set has images and folders of images in it"),
    ],
)
def test_folders_that_are_no_classes(tmp_path, names, message):
    write_tar(tmp_path / "train.tar", {name: png(number) for number, name in enumerate(names)})
    with pytest.raises(ValueError, match=rf"train.tar: {message}"):
        TarSource(tmp_path, "train")


def test_a_class_may_be_called_as_a_split_elsewhere(tmp_path):
    write_tar(tmp_path / "train.tar", {"cat/0.png": png(0), "test/1.png": png(1)})
    assert TarSource(tmp_path, "train").classes == ["cat", "test"]


def test_folders_named_by_numbers_are_ordered_by_number(tmp_path):
    """As those of an image folder, also when the index is read again."""
    write_tar(tmp_path / "val.tar", {f"{name}/a.png": png(name) for name in (10, 2, 1)})
    for _ in range(2):
        source = TarSource(tmp_path, "val")
        assert source.classes == ["1", "2", "10"]
        assert numbers(source) == [(10, "10"), (2, "2"), (1, "1")]


def test_hidden_files_are_left_out(root):
    add(root / "val-000000.tar", entry("._a.png", size=3), entry(".git/b.png", size=3), content=b"abc")
    assert len(TarSource(root, "val")) == 3


def test_images_without_a_label_are_refused(tmp_path):
    write_tar(tmp_path / "train-000000.tar", {"a.png": png(1)})
    with pytest.raises(ValueError, match=r"train-000000.tar: a.png has no label: expected a.cls beside it, or a f"):
        TarSource(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("z.png", b"?", "z.png has no label: expected z.cls in the same file"),
        ("z.cls", b"cat", "the label z.cls has no image"),
        ("a.jpg", b"?", "a.png and a.jpg share one label"),
        ("a.png", b"?", "holds a.png twice"),
        ("b.cls", b"cat", "holds b.cls twice"),
        ("./a.png", b"?", "holds a.png twice"),
        ("c.cls", b"", "c.cls holds no label"),
        ("c.cls", b"\xff", "c.cls holds no label"),
        ("c.cls", b"x" * 1001, "c.cls of 1001 bytes is no label"),
        ("\x1b[2J.png", b"?", r"\\x1b\[2J.png has no label"),
        ("x" * 5000 + ".png", b"?", r"x+ \.\.\. x+.png has no label"),
    ],
)
def test_what_does_not_belong_together(root, name, content, message):
    add(root / "val-000000.tar", entry(name, size=len(content)), content=content)
    with pytest.raises(ValueError, match=message) as error:
        TarSource(root, "val")
    assert str(error.value).startswith(f"{root}/val-000000.tar")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


def test_a_nul_in_a_name_is_refused(root):
    with tarfile.open(root / "val-000002.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("d.png")
        member.pax_headers = {"path": "d\0e.png"}
        archive.addfile(member)
    with pytest.raises(ValueError, match=r"val-000002.tar: d\\x00e.png has a NUL character in its name"):
        TarSource(root, "val")


def test_an_image_in_two_files_is_refused(root):
    write_tar(root / "val-000002.tar", {"b.png": png(4), "b.cls": b"ant"})
    with pytest.raises(ValueError, match=r"val-000002.tar and .*val-000000.tar both hold b.png, which would co"):
        TarSource(root, "val")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "no regular file"),
        (tarfile.FIFOTYPE, "no regular file"),
    ],
)
def test_links_and_devices_in_place_of_images_are_refused(root, kind, said):
    add(root / "val-000001.tar", entry("e/passwd.png", kind, "/etc/passwd"))
    with pytest.raises(ValueError, match=rf"val-000001.tar: e/passwd.png is {said}: pack it again as a plain file"):
        TarSource(root, "val")


def test_sparse_files_are_refused(tmp_path):
    info = entry("ant/1.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "999"}
    info.size = 512
    with tarfile.open(tmp_path / "val.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"1\n0\n512\n".ljust(512, b"\0")))
    with pytest.raises(ValueError, match=r"ant/1.png is sparse"):
        TarSource(tmp_path, "val")


def test_a_size_that_no_image_has(root):
    path = root / "val-000001.tar"
    with path.open("r+b") as file:
        header = entry("huge.png", size=2**33).tobuf(tarfile.GNU_FORMAT)
        file.seek(0)
        file.write(header)
        file.truncate(2**33 + 2048)  # a hole
    with pytest.raises(ValueError, match=r"huge.png of 8589934592 bytes is no image"):
        TarSource(root, "val")


@pytest.mark.parametrize("left", [0.1, 0.5, 0.9, "end"])
def test_a_truncated_file_is_refused(root, left):
    path = root / "val-000001.tar"
    with tarfile.open(path) as archive:
        end = [member.offset_data + 512 for member in archive][-1]
    os.truncate(path, end if left == "end" else int(left * end))
    with pytest.raises(ValueError, match=r"val-000001.tar( is|:).*copy or pack it again"):
        TarSource(root, "val")


def test_files_that_follow_the_end_are_refused(root):
    """As `cat` joins tar files; a reader that stops at the first end would lose the second."""
    path = root / "val-000000.tar"
    path.write_bytes(path.read_bytes() + (root / "val-000001.tar").read_bytes())
    (root / "val-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"is damaged, or several in one, from byte \d+ on"):
        TarSource(root, "val")


@pytest.mark.parametrize(("magic", "name"), [(b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_compressed_files_are_refused_by_name(root, magic, name):
    (root / "val-000001.tar").write_bytes(magic + bytes(2000))
    with pytest.raises(ValueError, match=rf"val-000001.tar is compressed \({name}\)"):
        TarSource(root, "val")


def test_gzip_is_refused(root):
    path = root / "val-000001.tar"
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"val-000001.tar is compressed \(gzip\), .* decompress it"):
        TarSource(root, "val")


def test_whatever_is_damaged_a_file_is_named(root):
    """Or an image is unreadable, or nothing is wrong with what is read."""
    path, rng = root / "val-000001.tar", random.Random(0)
    content = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(content[: rng.randrange(1, len(content)) if rng.random() < 0.2 else None])
        for _ in range(rng.choice((1, 4))):
            damaged[rng.randrange(min(len(damaged), 2500))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            source = TarSource(root, "val")
        except ValueError as error:
            assert str(root / "val-00000") in str(error)  # noqa: PT017
            continue
        for index in range(len(source)):
            try:
                source.load(index)
            except (OSError, ValueError):
                assert "000001" in source.locate(index)


def test_no_tar_files(tmp_path):
    (tmp_path / "._train.tar").write_bytes(b"of another system")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"no tar files of train at .*expected train.tar, train-000000.tar \.\.\. or"):
        TarSource(tmp_path, "train")
    write_tar(tmp_path / "train.tar", {"README": b"nothing else"})
    with pytest.raises(ValueError, match=r"no image in .*train.tar \(\.jpg, "):
        TarSource(tmp_path, "train")


def test_two_places_are_refused(root):
    shutil.copy(root / "val-000000.tar", root / "val.tar")
    with pytest.raises(ValueError, match=r"holds val.tar and val-\*.tar, which may be the same images"):
        TarSource(root, "val")


def test_a_missing_shard_is_noticed(root):
    (root / "val-000001.tar").rename(root / "val-000003.tar")
    with pytest.raises(ValueError, match=r"val-000003.tar follows number 0: the files in between are missing"):
        TarSource(root, "val")


def test_the_first_shard_is_missing(root):
    for number in (1, 0):
        (root / f"val-00000{number}.tar").rename(root / f"val-00000{number + 1}.tar")
    assert len(TarSource(root, "val")) == 3  # numbered from 1
    (root / "val-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"val-000002.tar is the first: the files before number 2 are missing"):
        TarSource(root, "val")


def test_train_and_val_have_the_same_names(root):
    write_tar(root / "train.tar", {"a.png": png(1), "a.cls": b"cat"})
    with pytest.raises(ValueError, match=r"val-000000.tar \.\.\. has a class 'ant' and .*train.tar has not"):
        TarSource(root, "val")
    assert TarSource(root, "val", same_classes=False).classes == ["ant", "cat"]
    (root / "classes.txt").write_text("ant\nbee\ncat")
    assert [TarSource(root, split).labels.tolist() for split in ("train", "val")] == [[2], [2, 0, 2]]


class TestIndex:
    @pytest.fixture
    def scans(self, monkeypatch) -> list[str]:
        """The names of the files whose headers have been read."""
        read, names = tars.read_members, []
        monkeypatch.setattr(tars, "read_members", lambda path: names.append(path.name) or read(path))
        return names

    def test_headers_are_read_once(self, root, scans):
        first = TarSource(root, "val")
        assert scans == ["val-000000.tar", "val-000001.tar"]
        second = TarSource(root, "val")
        assert len(scans) == 2
        assert numbers(second) == numbers(first)
        assert (second.classes, second.locate(2)) == (first.classes, first.locate(2))
        assert (root / ".val-000000.index.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()

    @pytest.mark.parametrize("change", ["size", "date", "more", "fewer"])
    def test_a_change_is_noticed(self, root, scans, change):
        TarSource(root, "val")
        scans.clear()
        if change == "size":
            write_tar(root / "val-000001.tar", {"d.png": png(7), "d.cls": b"ant", "e.png": png(8), "e.cls": b"cat"})
        if change == "date":
            status = (root / "val-000001.tar").stat()
            write_tar(root / "val-000001.tar", {"x/c.x.png": png(9), "x/c.cls": b"cat", "x/c.txt": b"a dog"})
            os.utime(root / "val-000001.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        if change == "more":
            write_tar(root / "val-000002.tar", {"z.png": png(9), "z.cls": b"ant"})
        if change == "fewer":
            (root / "val-000001.tar").unlink()
        expected = {"size": [1, 2, 7, 8], "date": [1, 2, 9], "more": [1, 2, 3, 9], "fewer": [1, 2]}[change]
        assert [number for number, _ in numbers(TarSource(root, "val"))] == expected
        assert scans

    def test_another_file_of_equal_size_and_date_is_noticed(self, root):
        path = root / "val-000001.tar"
        TarSource(root, "val")
        status = path.stat()
        write_tar(root / "new", {"x/c.x.png": png(3), "x/c.cls": b"ant", "x/c.txt": b"a cat"})
        os.utime(root / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(root / "new", path)
        assert path.stat().st_size == status.st_size
        assert numbers(TarSource(root, "val"))[2] == (3, "ant")

    def test_another_folder_has_another_index(self, tmp_path):
        """Of tar files that are one and the same, so that all but their place is equal."""
        write_tar(tmp_path / "a/val.tar", {"a.png": png(1), "a.cls": b"cat"})
        (tmp_path / "b").mkdir()
        os.link(tmp_path / "a/val.tar", tmp_path / "b/val.tar")
        assert tars._stamp([tmp_path / "a/val.tar"]) != tars._stamp([tmp_path / "b/val.tar"])

    @pytest.mark.parametrize("key", ["codes", "offsets", "by_folders"])
    def test_a_flipped_bit_is_noticed(self, root, key):
        expected = numbers(TarSource(root, "val"))
        place = root / ".val-000000.index.safetensors"
        content = bytearray(place.read_bytes())
        length = 8 + int.from_bytes(content[:8], "little")
        content[length + json.loads(content[8:length])[key]["data_offsets"][0]] ^= 1
        place.write_bytes(content)
        assert numbers(TarSource(root, "val")) == expected

    def test_where_nothing_can_be_written_the_cache_has_it(self, root, scans, cache, monkeypatch):
        save = tars._save

        def read_only(place: Path, *content: object) -> None:
            if place.parent == root:
                raise PermissionError(13, "Permission denied", str(place))
            save(place, *content)

        monkeypatch.setattr(tars, "_save", read_only)
        TarSource(root, "val")
        assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
        assert not list(root.glob(".*"))
        assert numbers(TarSource(root, "val")) == [(1, "cat"), (2, "ant"), (3, "cat")]
        assert len(scans) == 2
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        assert len(TarSource(root, "val")) == 3

    @pytest.mark.parametrize("content", [b"", b"{}", bytes(100), b"\xff" * 100])
    def test_a_damaged_index_is_made_anew(self, root, content):
        expected = numbers(TarSource(root, "val"))
        (root / ".val-000000.index.safetensors").write_bytes(content)
        assert numbers(TarSource(root, "val")) == expected


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_few_files_stay_open(root, monkeypatch):
    monkeypatch.setattr(tars, "MAX_OPEN", 1)
    source = TarSource(root, "val")
    before = len(os.listdir("/proc/self/fd"))
    assert numbers(source) * 2 == numbers(source) + numbers(source)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    received = pickle.loads(pickle.dumps(source))
    assert numbers(received) == numbers(source)
    del source, received
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_became_shorter_or_vanished(root):
    source = TarSource(root, "val")
    os.truncate(root / "val-000001.tar", 520)
    with pytest.raises(OSError, match=r"val-000001.tar has become shorter"):
        source.load(2)
    (root / "val-000000.tar").unlink()
    with pytest.raises(FileNotFoundError):
        source.load(0)


def test_one_file_alone_can_be_divided(root):
    whole = TarSource(root / "val-000000.tar", "whole")
    assert numbers(whole) == [(1, "cat"), (2, "ant")]
    with pytest.raises(
        ValueError, match=r"tars holds val-000000.tar, and no train.tar, .* to divide: rename the files"
    ):
        TarSource(root, "whole")
    for path in root.glob("val-*.tar"):
        path.rename(root / path.name.replace("val", "images"))
    assert len(TarSource(root, "whole")) == 3


@pytest.mark.parametrize("names", [("training", "test"), ("validation",), ("Valid-0000",)])
def test_files_of_other_splits_are_not_the_whole(tmp_path, names):
    for name in names:
        write_tar(tmp_path / f"{name}.tar", {f"cat/{name}.png": png(1)})
    with pytest.raises(ValueError, match=rf"holds {sorted(names)[0]}.tar, and no train.tar"):
        TarSource(tmp_path, "whole")
