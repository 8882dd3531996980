"""Pairs for verification: read from a list, or drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import FolderSource, draw_pairs, read_pairs


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    for split, people in (("train", "abc"), ("val", "de")):
        for person in people:
            (tmp_path / split / person).mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (4, 4)).save(tmp_path / split / person / f"{number} x.png")
    return FolderSource(tmp_path, "val", same_classes=False)


def test_other_people_in_val_are_an_error_unless_they_are_meant(source: FolderSource, tmp_path: Path) -> None:
    assert source.classes == ["d", "e"]
    with pytest.raises(ValueError, match="train and val need the same class folders"):
        FolderSource(tmp_path, "val")


def test_a_list_is_read(source: FolderSource, tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("# first second truth\n\nd/0 x.png\td/2 x.png\tsame\ne/1 x.png\td/1 x.png\tdifferent\n")
    pairs = read_pairs(path, source)
    assert [source.locate(i)[-9:] for i in pairs.first] == ["d/0 x.png", "e/1 x.png"]
    assert [source.locate(i)[-9:] for i in pairs.second] == ["d/2 x.png", "d/1 x.png"]
    assert pairs.same.tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d/0 x.png\td/1 x.png\n", "line 1: expected `path path same`"),
        ("\nd/0 x.png\td/1 x.png\tequal\n", "line 2: expected `path path same`"),
        ("d/0 x.png d/1 x.png same\n", "line 1: expected"),  # paths with blanks need tabs
        ("d/0 x.png\ta/1 x.png\tdifferent\n", "line 1: there is no image a/1 x.png in .*val"),
        ("# nothing\n", "holds no pairs"),
    ],
)
def test_a_list_with_mistakes_is_refused(source: FolderSource, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "pairs.txt", source)


def test_a_list_that_is_not_there(source: FolderSource, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no list of pairs at .*absent.txt"):
        read_pairs(tmp_path / "absent.txt", source)


def test_drawn_pairs_are_true_different_and_the_same_each_time() -> None:
    labels = np.repeat(np.arange(8), (5, 4, 4, 3, 3, 2, 1, 1))
    pairs = draw_pairs(labels, 40, seed=3)
    assert pairs.same.tolist() == [True] * 20 + [False] * 20
    assert ((labels[pairs.first] == labels[pairs.second]) == pairs.same).all()
    assert (pairs.first < pairs.second).all()
    assert len(set(zip(pairs.first, pairs.second, strict=True))) == 40
    assert len(set(labels[pairs.first[:20]])) > 3
    assert all(np.array_equal(a, b) for a, b in zip(pairs, draw_pairs(labels, 40, seed=3), strict=True))
    assert not np.array_equal(pairs.first, draw_pairs(labels, 40, seed=4).first)


def test_where_there_are_fewer_pairs_all_of_them_come_as_many_of_each_kind() -> None:
    pairs = draw_pairs(np.array([0, 0, 1]), 100)  # one pair of one class, two of two
    assert (len(pairs.same), int(pairs.same.sum())) == (2, 1)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_labels_without_pairs_of_both_kinds_are_refused(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="two classes at least, one of them with two images"):
        draw_pairs(np.array(labels), 10)


@pytest.mark.parametrize("count", [0, 1, -2])
def test_too_few_pairs_to_draw(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} pairs can't be drawn"):
        draw_pairs(np.array([0, 0, 1]), count)


def test_a_list_with_a_byte_order_mark_is_read_and_another_encoding_is_named(
    source: FolderSource, tmp_path: Path
) -> None:
    first, second = list(source.paths)[:2]
    path = tmp_path / "pairs.txt"
    path.write_text(f"{first}\t{second}\tsame\n", encoding="utf-8-sig")
    assert len(read_pairs(path, source).same) == 1
    path.write_bytes(b"\xff\xfe a b same")
    with pytest.raises(ValueError, match=f"{path} is not a list of pairs in UTF-8"):
        read_pairs(path, source)
