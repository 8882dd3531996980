"""The saved index of an image folder: it is what a scan finds, whatever happens to the folder or to the index."""

import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from settings import settings

from data import FolderSource, folders, index, open_source
from data.sources import PackedStrings

MOMENT_S = 0.02  # more than the step of the clock that a file system writes into folders
CONTEXT = multiprocessing.get_context("fork")


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Indices are saved here, of folders of any size, and trusted a moment after a folder's last change."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "MANY", 1)
    monkeypatch.setattr(index, "GRANULARITY_S", 0.0)
    return tmp_path / "cache" / "repmlpnet"


@pytest.fixture
def scanned(tmp_path, monkeypatch) -> Callable[[], int]:
    """Returns a function that returns how many scans there were, in all processes, since it was last called."""
    notes, scan = tmp_path / "scans", folders.scan

    def noted(*args):
        with notes.open("a") as file:
            file.write(".")
        return scan(*args)

    def count() -> int:
        found = len(notes.read_text()) if notes.exists() else 0
        notes.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(folders, "scan", noted)
    return count


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with what a folder can hold: nested folders, links to files and folders, links that lead nowhere."""
    root, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for split in ("train", "val"):
        touch(
            root / split, "ant/0.png", "ant/1.jpg", "ant/deep/er/2.png", "bee/0.png", "cat/.hidden/0.png", "cat/0.png"
        )
        touch(root / split, "bee/\udcff\n.png", "bee/notes.txt")
    touch(elsewhere, "dog/0.png", "dog/deep/1.png", "wolf/7.png")
    (root / "train/dog").symlink_to(elsewhere / "dog")
    (root / "train/ant/linked.png").symlink_to(elsewhere / "dog/0.png")
    (root / "train/ant/later").symlink_to(elsewhere / "later")
    (root / "val/dog").symlink_to(elsewhere / "wolf")
    time.sleep(MOMENT_S)
    return root


def content(source: FolderSource) -> list:
    return [source.classes, list(source.paths), source.labels.tolist()]


def check(root: Path, split: str = "train", **options: bool) -> None:
    """An open by way of the index finds what a scan finds."""
    expected = content(FolderSource(root, split, index=False, **options))
    assert content(FolderSource(root, split, **options)) == expected


def test_the_second_open_reads_what_the_first_has_saved(root, cache, scanned) -> None:
    first, second = FolderSource(root, "train"), FolderSource(root, "train")
    assert scanned() == 1
    assert content(first) == content(second)
    assert len(second) == 9
    assert second.labels.dtype == np.int64
    assert second.locate(0) == f"{root}/train/ant/0.png"
    assert FolderSource(root / ".." / "data", "train").paths[0] == "ant/0.png", "it is one folder by all of its names"
    (root.parent / "link").symlink_to(root)
    assert len(FolderSource(root.parent / "link", "train")) == 9
    assert scanned() == 0
    check(root, "val")
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"] * 2, "nothing else is left there"


def replace_with_equal_times(folder: Path) -> None:
    """Puts another folder in the place of one, with its times as far as a program can set them."""
    times = (folder.stat().st_atime_ns, folder.stat().st_mtime_ns)
    folder.rename(folder.parent.parent / "old")
    touch(folder, "9.png")
    os.utime(folder, ns=times)


def unpack_over(folder: Path) -> None:
    """Adds a file as `tar` does, which then restores the time of the folder."""
    times = (folder.stat().st_atime_ns, folder.stat().st_mtime_ns)
    touch(folder, "9.png")
    os.utime(folder, ns=times)


def retarget(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file is added": lambda root: touch(root, "train/ant/5.png"),
    "a file is added further below": lambda root: touch(root, "train/ant/deep/er/5.png"),
    "a file is added where there was none": lambda root: touch(root, "train/ant/deep/5.png"),
    "a file is added behind a link": lambda root: touch(root.parent, "elsewhere/dog/deep/5.png"),
    "a file is added as tar does": lambda root: unpack_over(root / "train/ant"),
    "a file is removed": lambda root: (root / "train/ant/0.png").unlink(),
    "a file is renamed": lambda root: (root / "train/ant/0.png").rename(root / "train/ant/00.png"),
    "a file is replaced by a folder": lambda root: (
        (root / "train/ant/0.png").unlink(),
        touch(root, "train/ant/0.png/1.png"),
    ),
    "a folder is added": lambda root: touch(root, "train/ant/new/5.png"),
    "a folder is removed": lambda root: shutil.rmtree(root / "train/ant/deep"),
    "a folder is replaced by another of the same times": lambda root: replace_with_equal_times(root / "train/ant"),
    "a hidden folder is shown": lambda root: (root / "train/cat/.hidden").rename(root / "train/cat/shown"),
    "a folder is hidden": lambda root: (root / "train/ant/deep").rename(root / "train/ant/.deep"),
    "a link leads elsewhere": lambda root: retarget(root / "train/dog", root.parent / "elsewhere/wolf"),
    "what a link leads to is replaced": lambda root: replace_with_equal_times(root.parent / "elsewhere/dog"),
    "a broken link leads to a folder": lambda root: touch(root.parent, "elsewhere/later/5.png"),
    "a class is added": lambda root: touch(root, "train/bear/0.png", "val/bear/0.png"),
    "a class is removed": lambda root: [shutil.rmtree(root / split / "bee") for split in ("train", "val")],
    "a class is renamed": lambda root: [(root / s / "bee").rename(root / s / "wasp") for s in ("train", "val")],
    "two classes change places": lambda root: [
        (root / "train" / a).rename(root / "train" / b) for a, b in (("ant", "x"), ("bee", "ant"), ("x", "bee"))
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(root, cache, scanned, change) -> None:
    before = content(FolderSource(root, "train"))
    CHANGES[change](root)
    time.sleep(MOMENT_S)
    expected = content(FolderSource(root, "train", index=False))
    assert expected != before
    scanned()
    assert content(FolderSource(root, "train")) == expected
    assert content(FolderSource(root, "train")) == expected
    assert scanned() == 1


def test_another_list_of_extensions_is_another_index(root, cache, scanned, monkeypatch) -> None:
    """A Pillow without AVIF, say, reads other files of the same folder."""
    FolderSource(root, "train")
    for module in (index, folders):
        monkeypatch.setattr(module, "EXTENSIONS", (".png",))
    assert "ant/1.jpg" not in list(FolderSource(root, "train").paths)
    assert scanned() == 2


def test_what_has_just_changed_is_not_trusted(root, cache, scanned, monkeypatch) -> None:
    """It may change again within one step of the clock."""
    monkeypatch.setattr(index, "GRANULARITY_S", 3600.0)
    for _ in range(3):
        check(root)
    assert scanned() == 6, "three without an index, and three"


def test_a_folder_from_the_future_is_read_from_its_index(root, cache, scanned) -> None:
    """Its time can be set at will; the one of its last change of status cannot."""
    os.utime(root / "train/ant", (4e9, 4e9))
    time.sleep(MOMENT_S)
    for _ in range(2):
        check(root)
    assert scanned() == 3, "two without an index, and one"


def test_a_clock_behind_that_of_the_files_trusts_nothing(root, cache, scanned, monkeypatch) -> None:
    now = time.time_ns
    monkeypatch.setattr(index.time, "time_ns", lambda: now() - 3600 * 10**9)
    for _ in range(3):
        FolderSource(root, "train")
    assert scanned() == 3


def saved(cache: Path) -> Path:
    (file,) = cache.glob("*.safetensors")
    return file


def test_a_damaged_index_is_made_anew(root, cache, scanned) -> None:
    expected = content(FolderSource(root, "train"))
    file = saved(cache)
    good = file.read_bytes()
    flipped = [good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :] for i in range(0, len(good), 9)]
    cut = [good[:length] for length in range(0, len(good), 97)]
    others = [b"{}", b"\0" * len(good), good + b"\0", os.urandom(len(good)), b"\x80\x05N."]
    scanned()
    for number, bad in enumerate([*flipped, *cut, *others]):
        file.write_bytes(bad)
        assert content(FolderSource(root, "train")) == expected, number
    # Whatever is not noticed must be without effect: what the file says of the folder, for people.
    assert scanned() > 0.9 * (number + 1)


def test_what_a_killed_process_has_left_is_removed(root, cache) -> None:
    FolderSource(root, "train")
    file = saved(cache)
    file.with_name(f".{file.name}.0123abcd").write_bytes(file.read_bytes()[:100])
    file.with_name(f"{file.stem}.{os.uname().nodename}.lock").touch()
    file.unlink()
    FolderSource(root, "train")
    assert list(cache.iterdir()) == [file]


def test_an_index_of_another_folder_or_program_is_not_read(root, cache, scanned, monkeypatch) -> None:
    FolderSource(root, "train")
    file = saved(cache)
    other = root.with_name("other")
    shutil.copytree(root, other, symlinks=True)
    touch(other, "train/ant/9.png")
    time.sleep(MOMENT_S)
    FolderSource(other, "train")
    (of_other,) = set(cache.iterdir()) - {file}
    shutil.copy(of_other, file)
    check(root)
    monkeypatch.setattr(index, "FORMAT", "image folder 0")
    scanned()
    FolderSource(root, "train")
    assert scanned() == 1


@pytest.mark.parametrize("kind", ["a file", "no home", "not absolute", "no permission"])
def test_without_a_usable_cache_each_start_scans(root, cache, scanned, monkeypatch, tmp_path, kind) -> None:
    if kind == "a file":
        cache.parent.touch()
    elif kind == "no permission":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/sys")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "" if kind == "no home" else "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path)
    if kind == "no home":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)  # a user without an entry, as in containers
    for _ in range(2):
        assert len(FolderSource(root, "train")) == 9
    assert scanned() == (1 if kind == "not absolute" else 2)
    assert not (tmp_path / "relative").exists()


def test_a_full_disk_is_no_error(root, scanned, monkeypatch, disk_of, caplog) -> None:
    disk = disk_of("1m")
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    monkeypatch.setattr(index, "MANY", 1)
    (disk / "repmlpnet").mkdir()
    with (disk / "rest").open("wb", buffering=0) as rest:
        rest.write(bytes(2**20))
    with caplog.at_level("INFO", logger="repmlpnet"):
        for _ in range(2):
            assert len(FolderSource(root, "train")) == 9
    assert scanned() == 2
    assert not list((disk / "repmlpnet").iterdir())
    assert "is made anew" in caplog.text


def open_in_process(root: Path, results: "multiprocessing.SimpleQueue") -> None:
    results.put(content(FolderSource(root, "train")))


def in_processes(count: int, root: Path) -> list:
    results = CONTEXT.SimpleQueue()
    processes = [CONTEXT.Process(target=open_in_process, args=(root, results)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [results.get() for _ in processes]


def test_of_eight_processes_one_scans(root, cache, scanned, monkeypatch) -> None:
    scan = folders.scan
    monkeypatch.setattr(folders, "scan", lambda *args: time.sleep(0.3) or scan(*args))
    found = in_processes(8, root)
    assert scanned() == 1
    assert found == [content(FolderSource(root, "train"))] * 8
    assert scanned() == 0
    assert list(cache.iterdir()) == [saved(cache)]


def test_of_eight_processes_few_scan_what_has_just_changed(root, cache, scanned, monkeypatch) -> None:
    """The others asked for what one has begun to read after that; a later start asks anew."""
    scan = folders.scan
    monkeypatch.setattr(index, "GRANULARITY_S", 3600.0)
    monkeypatch.setattr(folders, "scan", lambda *args: time.sleep(0.3) or scan(*args))
    found = in_processes(8, root)
    assert 0 < scanned() < 8, "two, but for processes that started late"
    assert found == [content(FolderSource(root, "train"))] * 8
    assert scanned() == 1


def test_all_scan_where_no_lock_can_be_had(root, cache, scanned, monkeypatch) -> None:
    monkeypatch.setattr(index, "PATIENCE_S", 0.0)  # as if a process that has it were stopped
    scan = folders.scan
    monkeypatch.setattr(folders, "scan", lambda *args: time.sleep(0.3) or scan(*args))
    assert in_processes(3, root) == [content(FolderSource(root, "train", index=False))] * 3
    assert scanned() > 2
    assert content(FolderSource(root, "train")) == content(FolderSource(root, "train", index=False))
    assert saved(cache)


def test_what_is_refused_without_an_index_is_refused_with_one(root, cache) -> None:
    for _ in range(2):
        check(root)
        check(root, same_classes=False)
    shutil.rmtree(root / "val/bee")
    with pytest.raises(ValueError, match="has a class 'bee'"):
        FolderSource(root, "train")
    assert len(FolderSource(root, "train", same_classes=False)) == 9
    (root / "train/ant/again").symlink_to(root / "train/bee")
    with pytest.raises(ValueError, match="are one folder"):
        FolderSource(root, "train", same_classes=False)
    (root / "train/ant/again").unlink()
    shutil.rmtree(root / "train/cat")
    (root / "train/cat").mkdir()
    for _ in range(2):
        with pytest.raises(ValueError, match="no image in .*/train/cat"):
            FolderSource(root, "train", same_classes=False)


@pytest.mark.parametrize("dataset", ["imagenet", "faces"])
def test_a_key_turns_it_off(root, cache, dataset) -> None:
    cfg = settings(f"DATA.DATA_PATH {root} DATA.DATASET {dataset} DATA.INDEX False")
    assert len(open_source(cfg.DATA, "train")) == 9
    assert not cache.exists()
    open_source(settings(f"DATA.DATA_PATH {root} DATA.DATASET {dataset}").DATA, "train")
    assert saved(cache)


def test_small_folders_leave_nothing_behind(root, cache, monkeypatch) -> None:
    monkeypatch.setattr(index, "MANY", 10)
    check(root)
    assert not list(cache.iterdir())


NAMES = ["", "a", "é/\U0001f41d.png", "\udcff", "b" * 300, "", "line\nbreak"]


def test_packed_strings() -> None:
    packed = PackedStrings(NAMES)
    split = PackedStrings.split("".join(f"{name}\0" for name in NAMES).encode("utf-8", "surrogatepass"))
    for strings in (packed, split, pickle.loads(pickle.dumps(split)), PackedStrings.of(split.content, split.ends)):
        assert list(strings) == [strings[i] for i in range(len(strings))] == NAMES
    for empty in (PackedStrings(), PackedStrings.split(b"")):
        assert (len(empty), list(empty)) == (0, [])


def unique_bytes() -> int:
    """Returns the memory of this process that no other one has."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def growth_over_an_epoch(strings, results: "multiprocessing.SimpleQueue") -> None:
    order = np.random.default_rng(0).permutation(len(strings))
    assert strings[0]
    before = unique_bytes()
    for i in order:
        strings[i]
    results.put(unique_bytes() - before)


def test_the_memory_of_a_worker_does_not_grow_with_the_number_of_images() -> None:
    """Objects would: to look at one writes to its reference count, and so copies the page that it lies in."""
    names = [f"n{i % 1000:08}/n{i % 1000:08}_{i}.JPEG" for i in range(100_000)]
    results, growth = CONTEXT.SimpleQueue(), []
    for strings in (PackedStrings(names), names):
        worker = CONTEXT.Process(target=growth_over_an_epoch, args=(strings, results))
        worker.start()
        worker.join()
        growth.append(results.get())
    assert growth[0] < 2**20 < 5 * 2**20 < growth[1]
