"""Which files of a folder are images of which class: torchvision's order, links, hidden names, what is no file."""

import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from data import FolderSource, read_pairs
from data.folders import class_names, scan


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def found(root: Path) -> list[tuple[str, int]]:
    listing = scan(root, class_names(root))
    return list(zip(listing.paths, np.repeat(np.arange(len(listing.counts)), listing.counts), strict=True))


def of_torchvision(root: Path) -> list[tuple[str, int]]:
    labels = {name: label for label, name in enumerate(class_names(root))}
    samples = make_dataset(root, labels, IMG_EXTENSIONS, allow_empty=True)
    return [(os.path.relpath(path, root), label) for path, label in samples]


def test_the_order_is_that_of_torchvision(tmp_path):
    root, elsewhere = tmp_path / "train", tmp_path / "elsewhere"
    deep = ["b/x/1.png", "b/x-1/1.png", "b/x.png/1.png", "b/x/y/1.png", "b/x y/1.jpg", "b/X/1.jpg", "b/é/1.jpg"]
    names = [f"a/{name}" for name in ("1.png", "10.png", "2.png", "B.JPG", "a.jpeg", "é.bmp", "\udcff.png", "z.TIF")]
    touch(root, *deep, *names, "c/0.webp", "a/notes.txt", "a/png", "b/x/y/z.json", "ab/1.png", "a b/1.png", "1.png")
    touch(elsewhere, "d/2.png", "d/deep/1.png")
    (root / "d").symlink_to(elsewhere / "d")
    (root / "c" / "broken.png").symlink_to("nowhere")
    (root / "c" / "circle.png").symlink_to("circle.png")
    (root / "c" / "linked.png").symlink_to(elsewhere / "d" / "2.png")
    expected = of_torchvision(root)
    assert len(expected) == len(deep) + len(names) + 8
    assert found(root) == expected
    assert found(Path(os.path.relpath(root))) == expected


@pytest.mark.parametrize("split", ["val", "validation", "Test"])
def test_the_whole_is_no_folder_of_splits(tmp_path, split):
    touch(tmp_path, f"{split}/cat/0.png")
    with pytest.raises(ValueError, match=rf"holds no train/ to divide, and a folder '{split}': rename or link"):
        FolderSource(tmp_path, "whole")
    touch(tmp_path, "train/cat/0.png")
    assert FolderSource(tmp_path, "whole").classes == ["cat"]


def test_no_system_call_is_spent_on_a_file(tmp_path, monkeypatch):
    """An image folder may hold a million of them, on a slow disk."""
    touch(tmp_path, *(f"{name}/{number}.png" for name in "ab" for number in range(50)))
    calls: list[str] = []
    for name in ("stat", "lstat", "scandir"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, f=function, **k: calls.append(name) or f(*a, **k))
    assert len(found(tmp_path)) == 100
    assert calls.count("scandir") == 3
    assert len(calls) < 20 + 2 * len(tmp_path.parents)


@pytest.mark.parametrize(
    "link", ["ant/up", "ant/deep/up", "ant/self", "bee/other", "cow", "ant/root", "ant/above", "ant/twice"]
)
def test_a_folder_that_is_reached_in_two_ways_is_refused(tmp_path, link):
    """Its images would count twice, or without end; the link is named, and the folder."""
    root = tmp_path / "data" / "train"
    touch(root, "ant/0.png", "ant/deep/0.png", "bee/0.png")
    targets = {"ant/up": "ant", "ant/deep/up": "ant", "ant/self": "ant", "bee/other": "ant/deep", "cow": "bee"}
    target = {"ant/root": Path("/"), "ant/above": tmp_path, "ant/twice": root / "ant" / "deep"}
    (root / link).symlink_to(target.get(link) or root / targets[link])
    with pytest.raises(ValueError, match=r"are one folder, .* more than once: remove the symbolic link") as error:
        found(root)
    assert f"{root}/{link}" in str(error.value)
    assert str(target.get(link) or root / targets[link]) in str(error.value)


def test_links_that_multiply_end_at_once(tmp_path):
    """Each of 30 folders holds two links to the next one: no circle, and 2^30 ways."""
    places = [tmp_path / "elsewhere" / str(number) for number in range(31)]
    for place in places:
        touch(place, "0.png")
    for place, following in pairwise(places):
        (place / "a").symlink_to(following)
        (place / "b").symlink_to(following)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "ant").symlink_to(places[0])
    with pytest.raises(ValueError, match="are one folder"):
        found(tmp_path / "train")


def test_links_to_parents_end_at_once(tmp_path):
    touch(tmp_path, "train/ant/0.png", "train/bee/0.png")
    for name in ("ant", "bee"):
        (tmp_path / "train" / name / "up").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="are one folder"):
        found(tmp_path / "train")


def test_train_and_val_may_be_one_folder(tmp_path):
    touch(tmp_path, "train/ant/0.png")
    (tmp_path / "val").symlink_to("train")
    assert len(FolderSource(tmp_path, "train")) == len(FolderSource(tmp_path, "val")) == 1


def test_what_is_hidden_is_left_out(tmp_path):
    shown = ["ant/0.png", "ant/deep/0.png", "bee/0.png", "bee/a.b.png"]
    hidden = [".ipynb_checkpoints/0.png", ".git/0.png", "ant/.ipynb_checkpoints/0.png", "ant/._0.png", "ant/.png"]
    touch(tmp_path / "train", *shown, *hidden, "bee/.deep/er/0.png")
    touch(tmp_path / "val", *shown, "bee/.hidden.png")
    source = FolderSource(tmp_path, "train")
    assert source.classes == ["ant", "bee"]
    assert list(source.paths) == shown
    assert FolderSource(tmp_path, "val").classes == ["ant", "bee"], "the splits have the same classes"


def test_a_class_of_hidden_files_alone_has_no_image(tmp_path):
    touch(tmp_path / "train", "ant/0.png", "__MACOSX/._0.png")
    with pytest.raises(ValueError, match=r"no image in .*/train/__MACOSX: add one \(\.jpg, "):
        FolderSource(tmp_path, "train")


def test_pipes_and_sockets_are_no_images(tmp_path):
    """Opening one would wait for ever."""
    touch(tmp_path / "train", "ant/0.png")
    os.mkfifo(tmp_path / "train/ant/1.png")
    (tmp_path / "train/ant/2.png").symlink_to("1.png")
    assert list(FolderSource(tmp_path, "train").paths) == ["ant/0.png"]


def test_a_broken_link_is_an_image_that_cannot_be_read(tmp_path):
    touch(tmp_path / "train", "ant/0.png")
    (tmp_path / "train/ant/1.png").symlink_to("nowhere")
    source = FolderSource(tmp_path, "train")
    assert len(source) == 2
    with pytest.raises(FileNotFoundError):
        source.load(1)


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[2J.png", "\udcff.png", "\u202egnp.png", "x" * 200 + ".png"])
def test_odd_names_are_found_and_shown_escaped(image_folder, name):
    original = image_folder / "train" / "ant" / "0.png"
    shutil.copy(original, image_folder / "train" / "bee" / name)
    source = FolderSource(image_folder, "train")
    index = list(source.paths).index(f"bee/{name}")
    assert source.load(index)[0].tobytes() == source.load(0)[0].tobytes()
    assert source.locate(index).isprintable()
    assert source.locate(index).startswith(f"{image_folder}/train/bee/")


def test_names_of_classes_are_shown_escaped(tmp_path):
    (tmp_path / "train" / "a\x1b[2J").mkdir(parents=True)
    with pytest.raises(ValueError, match="no image in") as error:
        FolderSource(tmp_path, "train")
    assert str(error.value).isprintable()


def test_pairs_know_images_by_their_own_names(tmp_path):
    touch(tmp_path / "val", "a\x1b/0.png", "b/0.png")
    (tmp_path / "pairs").write_text("a\x1b/0.png\tb/0.png\tdifferent\n")
    pairs = read_pairs(tmp_path / "pairs", FolderSource(tmp_path, "val", same_classes=False))
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([0], [1])
