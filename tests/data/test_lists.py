"""Lists of images: CSV and text, names and numbers, and lines that can't be right."""

import os

import pytest

from data import ListSource
from data.labels import read_classes
from data.lists import read_list


@pytest.fixture
def root(image_folder):
    """An image folder, to which the lists of a test are added."""
    return image_folder


def rows(path):
    return [(row.path, row.label) for row in read_list(path)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "a/1.png,cat\nb.png,dog\n", [("a/1.png", "cat"), ("b.png", "dog")]),
        ("a.csv", "path,label\r\na.png,0\r\n\r\n", [("a.png", "0")]),
        ("a.csv", "\ufeffLabel,File,width\ncat,a.png,640\n", [("a.png", "cat")]),
        ("a.csv", '"a, b.png","great ""white"" shark"\n', [("a, b.png", 'great "white" shark')]),
        ("a.csv", " a.png , cat \n,\n", [("a.png", "cat")]),
        ("a.csv", "é/\u65e5.png,\u732b\n", [("é/\u65e5.png", "\u732b")]),
        ("a.tsv", "path\tlabel\na, b.png\tgreat cat\n", [("a, b.png", "great cat")]),
        ("a.txt", "a.png 3\nb c.png 12\n\n", [("a.png", "3"), ("b c.png", "12")]),
        ("a.txt", "\ufeffa b.png\tgreat cat\r\n", [("a b.png", "great cat")]),
        ("a.txt", "path label\na.png 3", [("a.png", "3")]),
        ("a.txt", "a 1.png cat\n", [("a 1.png", "cat")]),
    ],
)
def test_forms_of_a_list(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert rows(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "a.png,1\nb.png\n", "line 2: expected `path,label`, found 'b.png'"),
        ("a.csv", "a.png,\n", "line 1: expected `path,label`"),
        ("a.csv", ",cat\n", "line 1: expected `path,label`"),
        ("a.csv", "a.png,1,2\n", "line 1: 'a.png' has several labels .'1 2'.: classification takes one an image"),
        ("a.csv", "a.png,cat;dog\n", "line 1: 'a.png' has several labels .'cat;dog'."),
        ("a.csv", "a.png,1 5 7\n", "line 1: 'a.png' has several labels .'1 5 7'."),
        ("a.txt", "a.png 1 5 7\n", "line 1: 'a.png' has several labels .'1 5 7'."),
        ("a.txt", "a.png\t1\t5\n", "line 1: 'a.png' has several labels .'1 5'."),
        ("a.txt", "a.png\n", "line 1: expected `path,label`, found 'a.png'"),
        ("a.csv", "path,label\na.png,1,7\n", "line 2: 3 fields, but the first line names 2"),
        ("a.csv", "path,label\na.png\n", "line 2: 1 fields, but the first line names 2"),
        ("a.csv", "a.png,1\nb.png,2\na.png,1\n", "line 3: 'a.png' is in line 1 already, and would count twice"),
        ("a.csv", "a.png,1\n./a.png,2\n", "line 2: './a.png' is in line 1 already, and would count twice"),
        ("a.csv", "a/1.png,1\nb/../a//1.png,2\n", "line 2: 'b/../a//1.png' is in line 1 already"),
        ("a.csv", "img_path,y\na.png,0\nb.png,10\n", "line 1: 'y' is the only label that is no number: if the line"),
        ("a.csv", '"a.png,1\nb.png,2\n', "line 2: unexpected end of data"),
        ("a.csv", '"a.png"x,1\n', "line 1: ',' expected after '\"'"),
        ("a.csv", "a\0.png,1\n", "line 1: "),
        ("a.csv", "x" * 200_000 + ",1\n", "line 1: field larger than field limit"),
        ("a.txt", "x" * 10**6, "line 1: expected `path,label`, found 'x+ "),
        ("a.csv", "\x1b[2J\u202e\n", r"found '\\x1b\[2J\\u202e'"),
        ("a.csv", b"\xff.png,1\n", "is not in UTF-8"),
        ("a.csv", "", "lists no image: write one `path,label` a line"),
        ("a.csv", "path,label\n", "lists no image"),
    ],
)
def test_wrong_lines_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_list(path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_paths_are_relative_or_absolute(root, tmp_path):
    (root / "val.csv").write_text(f"val/ant/0.png,ant\n{root}/val/bee/0.png,bee\n../folder/val/cat/0.png,cat\n")
    source = ListSource(root, "val")
    assert [source.load(index)[1] for index in range(3)] == [0, 1, 2]
    assert source.locate(0) == str(root / "val/ant/0.png")
    assert source.locate(1) == str(root / "val/bee/0.png")


def test_what_is_no_image_is_noticed_when_it_is_due(root):
    os.mkfifo(root / "pipe.png")
    (root / "val.csv").write_text("missing.png,ant\npipe.png,ant\nval,ant\nval/ant/0.png,ant\n")
    source = ListSource(root, "val")
    assert len(source) == 4
    with pytest.raises(FileNotFoundError):
        source.load(0)
    for index in (1, 2):
        with pytest.raises(ValueError, match="is no regular file"):
            source.load(index)
    assert source.load(3)[1] == 0


def test_train_and_val_have_the_same_names(root):
    (root / "train.csv").write_text("a.png,ant\nb.png,bee\n")
    (root / "val.txt").write_text("c.png ant\nd.png bea\n")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"val.txt has a class 'bea' and .*train.csv has not.* classes.txt beside"):
            ListSource(root, split)
    assert ListSource(root, "val", same_classes=False).classes == ["ant", "bea"]
    (root / "val.txt").write_text("c.png bee\n")
    (root / "classes.txt").write_text("bee\nant")
    assert ListSource(root, "train").labels.tolist() == [1, 0]
    assert ListSource(root, "val").labels.tolist() == [0]
    (root / "val.txt").write_text("c.png bea\n")
    with pytest.raises(ValueError, match=r"val.txt, line 1: the label 'bea' is none of the 2 classes that classes.txt"):
        ListSource(root, "val")


def test_numbers_are_positions_in_both_splits(root):
    (root / "train.csv").write_text("a.png,0\nb.png,7\n")
    (root / "val.csv").write_text("c.png,3\n")
    train, val = ListSource(root, "train"), ListSource(root, "val")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 7], [3])
    assert train.classes == val.classes == list("01234567")
    (root / "train.csv").write_text("a.png,0\n\nb.png,1000\n")
    with pytest.raises(ValueError, match=r"train.csv, line 3: with the label 1000 there would be 1001 classes"):
        ListSource(root, "train")


class TestNumbersAsNames:
    """Names of classes that are numbers, `1`, `2`, `3`, and labels that may be these, or positions."""

    @pytest.fixture(autouse=True)
    def names(self, root):
        (root / "classes.txt").write_text("1\n2\n3\n")

    def labels(self, root, train: str, val: str) -> list[list[int]]:
        """Returns the labels of both splits, given as they are written."""
        for split, written in (("train", train), ("val", val)):
            (root / f"{split}.csv").write_text("".join(f"{n}.png,{word}\n" for n, word in enumerate(written.split())))
        sources = [ListSource(root, split) for split in ("train", "val")]
        assert all(source.classes == ["1", "2", "3"] for source in sources)
        return [source.labels.tolist() for source in sources]

    def test_both_splits_decide(self, root):
        assert self.labels(root, "0 1 2", "1 2") == [[0, 1, 2], [1, 2]]
        assert self.labels(root, "1 2 3", "1 2") == [[0, 1, 2], [0, 1]]

    def test_what_may_be_both_is_refused(self, root):
        with pytest.raises(
            ValueError, match=r"train.csv: the label 1 is the name of one class .* of another, '2': give"
        ):
            self.labels(root, "1 2", "1")

    def test_names_that_are_their_positions_are_both(self, root):
        (root / "classes.txt").write_text("0\n1\n2\n")
        (root / "train.csv").write_text("a.png,2\nb.png,1\n")
        assert ListSource(root, "train").labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,01\nb.png,1\n", r"train.csv: the classes '01' and '1' are one number"),
        ("a.png,0\nb.png,-1\n", r"train.csv, line 2: the label -1 is negative"),
    ],
)
def test_numbers_that_are_no_positions(root, content, message):
    (root / "train.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        ListSource(root, "train")


def test_two_lists_or_none(root):
    with pytest.raises(ValueError, match=r"no list of images at .*folder: expected one of train.csv, train.tsv"):
        ListSource(root, "train")
    (root / "train.csv").write_text("a.png,0\n")
    (root / "train.txt").write_text("a.png 0\n")
    with pytest.raises(ValueError, match=r"train.csv and .*train.txt both list the images of train: keep one"):
        ListSource(root, "train")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("classes.txt", "ant\r\ngreat white shark\r\n", ["ant", "great white shark"]),
        ("classes.txt", "\ufeffb\na", ["b", "a"]),
        ("classes.json", '["b", "a"]', ["b", "a"]),
        ("classes.json", '{"a": 1, "b": 0}', ["b", "a"]),
        ("classes.json", '{"a": "1", "b": "0"}', ["b", "a"]),
    ],
)
def test_class_names(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert read_classes(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.txt", "a\nb\na\n", "names the class 'a' twice"),
        ("classes.txt", "a\n\nb\n", "has an empty name in it"),
        ("classes.txt", b"\xff", "holds no class names"),
        ("classes.json", "{", "holds no class names"),
        ("classes.json", "[]", "expected a list of names"),
        ("classes.json", "[1, 2]", "expected a list of names"),
        ("classes.json", '{"a": 0, "b": 2}', "expected a list of names"),
        ("classes.json", '{"a": 0, "b": 0}', "expected a list of names"),
        ("classes.json", '{"a": [0]}', "expected a list of names"),
        ("classes.json", "7", "expected a list of names"),
    ],
)
def test_class_names_that_cannot_be_right(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_classes(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))


def test_there_need_be_no_class_names(tmp_path):
    assert read_classes(tmp_path) is None
