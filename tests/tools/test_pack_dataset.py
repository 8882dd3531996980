"""Packing a data set: the same bytes, in tar files that are whole or absent, and a stopped run that continues."""

import gc
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from pictures import write_patterns

from data import FolderSource, ListSource, TarSource
from tools import pack_dataset
from utils import cli


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten training and four test images of two classes, some with names that keys of WebDataset can't have."""
    root = tmp_path / "images"
    for split, count in (("train", 5), ("val", 2)):
        for seed, name in enumerate(("dog", "ant")):
            write_patterns(root / split / name, seed, count)
    (root / "train/dog/0.png").rename(root / "train/dog/a.b.png")
    (root / "train/dog/1.png").rename(root / "train/dog/a.c.png")
    (root / "train/dog/2.png").rename(root / "train/dog/a_b.PNG")
    return root


def pack(*words: object) -> None:
    pack_dataset.main([str(word) for word in words])


def encoded(source) -> dict[bytes, str]:
    return {source.read(index): source.classes[source.labels[index]] for index in range(len(source))}


def sums(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.tar"))}


@pytest.mark.parametrize(
    ("limit", "counts"),
    [(("--images", 3), [3, 3, 3, 1]), (("--megabytes", 0.008), [2, 2, 2, 2, 2]), ((), [10])],
)
def test_the_bytes_are_copied_unchanged_in_a_seeded_order(folder, tmp_path, limit, counts, capsys):
    out = tmp_path / "out"
    pack(folder, out, *limit, "--verify")
    for split, count in (("train", 10), ("val", 4)):
        packed, source = TarSource(out, split), FolderSource(folder, split)
        assert encoded(packed) == encoded(source)
        assert packed.classes == source.classes == ["ant", "dog"]
        record = json.loads((out / f"{split}.json").read_text())
        assert record["complete"]
        assert {row["name"]: row["sha256"] for row in record["shards"]}.items() <= sums(out).items()
        assert sum(row["images"] for row in record["shards"]) == count
        assert all(row["bytes"] == (out / row["name"]).stat().st_size for row in record["shards"])
    assert [row["images"] for row in json.loads((out / "train.json").read_text())["shards"]] == counts
    assert packed.labels.tolist() != sorted(packed.labels)
    assert "train: 10 images in" in capsys.readouterr().out
    again = tmp_path / "again"
    pack(folder, again, *limit)
    assert sums(again) == sums(out)
    pack(folder, tmp_path / "other", *limit, "--seed", 1)
    assert sums(tmp_path / "other") != sums(out)


def test_a_stopped_run_continues(folder, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    pack(folder, whole, "--images", 3)
    source = FolderSource(folder, "train")
    names = pack_dataset._names(source)
    eighth = json.loads((whole / "train.json").read_text())["plan"] and TarSource(whole, "train").name(7)
    path = folder / "train" / source.name(names.index(eighth.rpartition(".")[0]))
    content = path.read_bytes()
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(OSError, match="No such file") as error:
        pack(folder, out, "--images", 3)
    assert str(path) in str(error.value)
    assert sorted(sums(out)) == ["train-000000.tar", "train-000001.tar"]
    assert not list(out.glob(".*.tmp"))
    with pytest.raises(ValueError, match=r"train.json: the packing is not finished"):
        TarSource(out, "train")
    before = (out / "train-000001.tar").stat()
    path.unlink()
    path.write_bytes(content)
    pack(folder, out, "--images", 3, "--verify")
    assert sums(out) == sums(whole)
    assert (out / "train-000001.tar").stat().st_mtime_ns == before.st_mtime_ns
    pack(folder, out, "--images", 3)  # nothing is left to do


def test_verification_finds_what_has_changed(folder, tmp_path):
    out = tmp_path / "out"
    pack(folder, out)
    path = out / "train-000000.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000000.tar has changed since"):
        pack(folder, out, "--verify")
    path.write_bytes(bytes([content[600] ^ 1]).join([content[:600], content[601:]]))
    image = folder / "train/ant/0.png"
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"is not .*train/ant/0.png: pack it again"):
        pack(folder, out, "--verify")


def test_a_file_that_was_not_copied_is_missed(folder, tmp_path):
    pack(folder, tmp_path / "out", "--images", 3)
    (tmp_path / "out/train-000003.tar").unlink()
    with pytest.raises(ValueError, match=r"names 1 files that are missing, the first is train-000003.tar"):
        TarSource(tmp_path / "out", "train")
    (tmp_path / "out/train-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"train-000002.tar follows number 0: the files in between are missing"):
        TarSource(tmp_path / "out", "train")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images 3", "is of another packing .images of a shard differ."),
        ("--seed 1", "is of another packing .seed differ."),
        ("--images 0", "--images at least 1"),
        ("--megabytes 0", "--megabytes must be above 0"),
        ("--megabytes nan", "--megabytes must be above 0 and finite"),
        ("--megabytes inf", "--megabytes must be above 0 and finite"),
    ],
)
def test_nothing_is_overwritten(folder, tmp_path, words, message):
    pack(folder, tmp_path / "out")
    before = sums(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        pack(folder, tmp_path / "out", *words.split())
    assert sums(tmp_path / "out") == before


def test_files_of_others_are_not_touched(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"train-000000.tar is there already"):
        pack(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train-000000.tar"]


def test_images_from_a_zip_keep_their_classes(folder, tmp_path):
    root = tmp_path / "zipped"
    root.mkdir()
    with zipfile.ZipFile(root / "val.zip", "w") as archive:
        for name in ("dog/0.png", "ant/0.png"):
            archive.write(folder / "val" / name, name)
    (root / "val_map.txt").write_text("dog/0.png\t1\nant/0.png\t0\n")
    (root / "classes.txt").write_text("the ant\nthe dog\n")
    pack(root, tmp_path / "out", "--splits", "val", "--verify", "--opts", "DATA.FORMAT", "zip")
    packed = TarSource(tmp_path / "out", "val")
    assert packed.classes == ["the ant", "the dog"]
    assert encoded(packed)[(folder / "val/dog/0.png").read_bytes()] == "the dog"


def test_classes_that_are_named_by_numbers_are_not_mistaken(tmp_path):
    """Those of people are ordered by text, so that a number is not the position of its class."""
    for seed in range(11):
        write_patterns(tmp_path / "people/train" / str(seed), seed, 1)
    pack(tmp_path / "people", tmp_path / "out", "--splits", "train", "--verify", "--opts", "DATA.DATASET", "faces")
    packed = TarSource(tmp_path / "out", "train", same_classes=False)
    source = FolderSource(tmp_path / "people", "train", same_classes=False)
    assert packed.classes == source.classes == sorted(map(str, range(11)))
    assert encoded(packed) == encoded(source)


def test_hidden_and_colliding_names_are_kept(folder, tmp_path):
    names = [".cache/ant/x.2.png", ".cache/ant/x.png", ".cache/ant/x.PNG", "__ant__/.0.png"]
    for seed, name in enumerate(names):
        write_patterns(tmp_path / str(seed), seed, 1)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / str(seed) / "0.png").rename(folder / name)
    (folder / "train.csv").write_text("".join(f"{name},{label % 2}\n" for label, name in enumerate(names)))
    pack(folder, tmp_path / "out", "--splits", "train", "--verify", "--opts", "DATA.FORMAT", "list")
    packed = TarSource(tmp_path / "out", "train")
    assert encoded(packed) == encoded(ListSource(folder, "train"))
    found = {packed.name(index) for index in range(4)}
    assert found == {"cache/ant/x_2.png", "cache/ant/x.png", "cache/ant/x_2_2.PNG", "ant__/0.png"}


@pytest.mark.parametrize("name", [" ant", "a\nnt", "a\x85nt", "a" * 1001])
def test_class_names_that_no_label_can_hold_are_refused(folder, tmp_path, name):
    (folder / "classes.json").write_text(json.dumps([name, "dog"]))
    (folder / "train.csv").write_text("train/ant/0.png,0\n")
    with pytest.raises(ValueError, match=r"^the class .*: rename it$"):
        pack(folder, tmp_path / "out", "--splits", "train", "--opts", "DATA.FORMAT", "list")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-512])])
def test_a_finished_file_that_is_gone_or_shorter_is_named(folder, tmp_path, damage):
    pack(folder, tmp_path / "out", "--images", 3)
    damage(tmp_path / "out/train-000001.tar")
    with pytest.raises(ValueError, match=r"out/train-000001.tar is missing or has not the \d+ bytes"):
        pack(folder, tmp_path / "out", "--images", 3)


def test_a_run_continues_that_was_killed_before_its_first_file_was_recorded(folder, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    pack(folder, whole, "--images", 3)
    contents = {path: path.read_bytes() for path in folder.glob("train/*/*")}
    for path in contents:
        path.unlink()
        path.symlink_to("nowhere")
    with pytest.raises(OSError, match="No such file"):
        pack(folder, out, "--images", 3)
    shutil.copy(whole / "train-000000.tar", out)  # as it is there before the record says so
    for path, content in contents.items():
        path.unlink()
        path.write_bytes(content)
    pack(folder, out, "--images", 3, "--verify")
    assert sums(out) == sums(whole)


def test_a_split_may_lack_the_last_of_numbered_classes(folder, tmp_path):
    root = tmp_path / "zipped"
    root.mkdir()
    for split, labels in (("train", (0, 2, 1)), ("val", (1, 0))):
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for number in range(len(labels)):
                archive.write(folder / f"train/ant/{number}.png", f"{number}.png")
        rows = [f"{number}.png\t{label}\n" for number, label in enumerate(labels)]
        (root / f"{split}_map.txt").write_text("".join(rows))
    words = ("--verify", "--opts", "DATA.FORMAT", "zip")
    pack(root, tmp_path / "out", *words)
    val = TarSource(tmp_path / "out", "val")
    assert val.classes == TarSource(tmp_path / "out", "train").classes == ["0", "1", "2"]
    assert encoded(val)[(folder / "train/ant/0.png").read_bytes()] == "1"
    pack(root, tmp_path / "out", "--splits", "val", *words)  # on its own, it fits as well


def test_other_classes_are_found_before_anything_is_written(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/classes.txt").write_text("ant\ndog\nbee\n")
    with pytest.raises(ValueError, match=r"out/classes.txt names other classes"):
        pack(folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["classes.txt"]


def test_digits_are_no_files(tmp_path):
    with pytest.raises(ValueError, match="digits is not stored as image files"):
        pack("digits", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(folder, disk_of, capsys):
    disk = disk_of("48k")
    assert cli.status_of(lambda: pack(folder, disk / "out", "--images", 3)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "No space left on device; make room and start again" in line
    assert not list(disk.glob("out/.*.tmp"))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its own
def test_webdataset_reads_what_is_packed(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="not installed")
    pack(folder, tmp_path / "out", "--images", 4)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    classes = ["ant", "dog"]
    found = {sample.get("png") or sample["PNG"]: classes[int(sample["cls"])] for sample in samples}
    assert found == encoded(FolderSource(folder, "train"))
    gc.collect()
