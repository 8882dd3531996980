"""Names of classes: their order, files that list them, and the folders that they come from."""

import random
import re
import shutil
from pathlib import Path

import pytest

from data import FolderSource
from data.class_names import are_positions, first_difference, imagenet_names, in_order, numbered, read_class_names


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").touch()
    return root


@pytest.mark.parametrize(
    "ordered",
    [
        ["0", "1", "2", "9", "10", "11", "100"],
        ["000", "1", "002", "10", "0011"],  # padded or not
        ["9" * 5000, "1" + "0" * 5000],  # numbers that no integer is read from
        ["1", "10", "2", "two"],  # not all are numbers
        ["-1", "1", "10", "2"],
        ["1", "10", "2", "\uff13"],  # a digit, and none of ASCII
        ["1", "01.5", "n1", "n10", "n2"],
        ["B", "a"],
        [],
    ],
    ids=lambda names: " ".join(name[:6] for name in names),
)
def test_the_order(ordered):
    if not all(re.fullmatch("[0-9]+", name) for name in ordered):
        ordered = sorted(ordered)
    for seed in range(5):
        shuffled = random.Random(seed).sample(ordered, len(ordered))
        assert in_order(shuffled) == ordered


@pytest.mark.parametrize(("first", "second"), [("01", "1"), ("0", "00"), ("010", "10")])
def test_two_names_of_one_number(first, second, tmp_path):
    with pytest.raises(ValueError, match=f"the classes '{first}' and '{second}' are one number: rename one of them"):
        in_order(["5", second, first])
    assert in_order(["cat", second, first]) == [first, second, "cat"]
    folders(tmp_path / "train", "5", second, first)
    with pytest.raises(ValueError, match="are one number"):
        FolderSource(tmp_path, "train")


def test_folders_named_by_numbers(tmp_path):
    for split in ("train", "val"):
        folders(tmp_path / split, "10", "2", "0")
    source = FolderSource(tmp_path, "train")
    assert source.classes == ["0", "2", "10"]
    assert [source.paths[i] for i in range(3)] == ["0/0.png", "2/0.png", "10/0.png"]
    assert source.labels.tolist() == [0, 1, 2]
    people = FolderSource(tmp_path, "train", same_classes=False)
    assert people.classes == ["0", "10", "2"], "the centres of people in checkpoints keep their order"


def test_positions():
    assert are_positions(["0", "1", "2"])
    assert are_positions([f"{label:04}" for label in range(1000)])
    assert not are_positions(["1", "2", "3"])
    assert not are_positions(["0", "2"])
    assert not are_positions(["0", "1", "cat"])


def test_the_names_of_imagenet_are_in_the_order_of_their_folders():
    names = imagenet_names()
    assert (len(names), names[0], names[-1]) == (1000, "n01440764", "n15075141")
    assert in_order(reversed(names)) == names


def test_first_difference():
    assert first_difference(["a", "b"], ["a", "b"]) == ""
    assert first_difference(["a", "c\x1b"], ["a", "b"]) == r"class 1 is 'c\x1b', not 'b'"
    assert first_difference(["a"], ["a", "b"]) == "class 1 is missing, not 'b'"


def test_names_in_a_file(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\na dog\n", encoding="utf-8")
    assert read_class_names(path, 2) == ["cat", "a dog"]
    with pytest.raises(ValueError, match="names 2 classes, the network has 3"):
        read_class_names(path, 3)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="holds no class names in UTF-8"):
        read_class_names(path, 1)
    with pytest.raises(ValueError, match="is no regular file"):
        read_class_names(tmp_path, 1)


def test_outputs_without_names_have_numbers():
    assert numbered(["cat"], 3) == ["cat", "1", "2"]
    assert numbered(None, 2) == ["0", "1"]


def test_a_folder_of_class_folders_is_a_set_to_evaluate_on(tmp_path):
    folders(tmp_path, "cat", "ant")
    (tmp_path / "README.txt").touch()
    source = FolderSource(tmp_path, "val")
    assert (source.classes, list(source.paths)) == (["ant", "cat"], ["ant/0.png", "cat/0.png"])
    assert source.notes == (f"{tmp_path} holds neither train/ nor val/: its own folders are taken as the classes",)
    assert FolderSource(tmp_path, "val", same_classes=False).classes == ["ant", "cat"]
    with pytest.raises(ValueError, match=f"no class folders at {tmp_path}/train"):
        FolderSource(tmp_path, "train")


def test_a_split_is_never_taken_for_a_class(tmp_path):
    folders(tmp_path / "train", "ant")
    folders(tmp_path, "cat")
    with pytest.raises(ValueError, match=f"no class folders at {tmp_path}/val"):
        FolderSource(tmp_path, "val")
    folders(tmp_path / "val", "ant")
    source = FolderSource(tmp_path, "val")
    assert (source.classes, source.notes) == (["ant"], ())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "val").symlink_to("nowhere")
    folders(tmp_path / "broken", "cat")
    with pytest.raises(ValueError, match="no class folders at"):
        FolderSource(tmp_path / "broken", "val")


@pytest.mark.parametrize("name", ["test", "Validation", "valid"])
def test_splits_of_other_names_are_named(tmp_path, name):
    folders(tmp_path, name, "ant")
    with pytest.raises(ValueError, match=f"holds no val/, and a folder '{name}': rename or link it to val if"):
        FolderSource(tmp_path, "val")


def test_a_folder_of_data_sets_is_not_walked_through(tmp_path):
    folders(tmp_path / "imagenet", "val/ant")
    folders(tmp_path / "other", "cat")
    with pytest.raises(ValueError, match=f"no class folders at {tmp_path}/val"):
        FolderSource(tmp_path, "val")
    shutil.rmtree(tmp_path / "imagenet")
    assert FolderSource(tmp_path / "other", "val").classes == ["cat"]
