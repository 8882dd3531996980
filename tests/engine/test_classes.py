"""Which output is which class: by name, by position, or an error."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from data import FolderSource, Source
from data.class_names import imagenet_names
from engine.classes import SAME_CLASSES, Outputs, check_resumed_classes, match_classes
from models.checkpoints import Checkpoint

WEIGHTS, IMAGES = Path("weights.pth"), "/images"
NUMBERS = [str(number) for number in range(1000)]


class Named(Source):
    """A data set of which nothing but the classes is known."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    def __len__(self) -> int:
        return 0

    def load(self, index: int):
        raise NotImplementedError

    def locate(self, index: int) -> str:
        raise NotImplementedError


def folder(root: Path, *names: str) -> FolderSource:
    for name in names:
        (root / "val" / name).mkdir(parents=True)
        (root / "val" / name / "0.png").touch()
    return FolderSource(root, "val")


def match(classes, names=None, count=None, dataset=None, **options):
    source = classes if isinstance(classes, Source) else Named(classes)
    return match_classes(Outputs(WEIGHTS, count or len(names), names, dataset), source, IMAGES, **options)


@pytest.mark.parametrize(
    ("classes", "names", "count"),
    [
        (["ant", "bee"], ["ant", "bee"], 2),
        (["ant", "bee"], ["ant", "bee"], 12),  # MODEL.NUM_CLASSES 12
        (["ant", "ant"], ["ant", "ant"], 2),
        (NUMBERS[:10], NUMBERS[:10], 10),
        (NUMBERS[:10], None, 10),
        (imagenet_names(), None, 1000),
        (imagenet_names(), NUMBERS, 1000),  # trained on a zip
        (imagenet_names(), imagenet_names(), 1000),
    ],
)
def test_the_same_classes_need_no_word(classes, names, count):
    assert match(classes, names, count) is SAME_CLASSES


def test_another_order():
    found = match(["cat", "ant", "bee"], ["ant", "bee", "cat"])
    assert (found.outputs, found.subset) == ((2, 0, 1), False)
    assert found.note == "the classes, which are in another order than those of the weights, are matched by name"
    assert match(["3", "0", "1", "2"], NUMBERS[:4]).outputs == (3, 0, 1, 2)


@pytest.mark.parametrize(
    ("classes", "names", "outputs"),
    [
        (["bee", "ant"], ["ant", "bee", "cat"], (1, 0)),
        (["ant", "bee"], ["ant", "bee", "cat"], (0, 1)),
        (["3", "7"], NUMBERS[:10], (3, 7)),
    ],
)
def test_some_of_the_classes(classes, names, outputs):
    found = match(classes, names)
    assert (found.outputs, found.subset) == (outputs, True)
    assert found.note.startswith(f"2 of the {len(names)} classes of the weights are matched by name")


@pytest.mark.parametrize("dataset", [None, "imagenet"])
@pytest.mark.parametrize("names", [None, NUMBERS, imagenet_names()])
def test_classes_of_imagenet(names, dataset):
    """As of ImageNet-A and -R, by released weights, and by those of a run."""
    some = imagenet_names()[6:900:5]
    found = match(some, names, 1000, dataset)
    assert (found.outputs, found.subset) == (tuple(range(6, 900, 5)), True)
    assumed = "those of ImageNet-1k in the order of their WordNet ids" in found.note
    assert assumed == (names is not imagenet_names() and names != imagenet_names())
    backwards = match(imagenet_names()[::-1], names, 1000, dataset)
    assert (backwards.outputs, backwards.subset) == (tuple(reversed(range(1000))), False)


@pytest.mark.parametrize("names", [None, imagenet_names()])
def test_numbers_are_positions(names, tmp_path):
    """As of ImageNet-V2, whose folders are 0 to 999."""
    source = folder(tmp_path, *NUMBERS)
    found = match(source, names, 1000)
    assert (source.classes[10], found.outputs, found.subset) == ("10", None, False)
    assert found.note == "the classes have numbers for names: each is the output of that number"
    assert match([f"{number:03}" for number in range(1000)], names, 1000) == found


def test_weights_without_names_go_by_position():
    found = match(["bee", "ant", "c", "d"], None, 4)
    assert (found.outputs, found.subset) == (None, False)
    assert found.note == "the weights name no classes: 'bee', 'ant', 'c', ... are their outputs in this order"
    assert (
        match(["bee", "ant"], ["0", "1"]).note
        == "the weights name no classes: 'bee', 'ant' are their outputs in this order"
    )
    assert match([f"c{i}" for i in range(1000)], None, 1000).outputs is None


def test_fewer_classes_go_by_position_where_the_user_says_so():
    with pytest.raises(ValueError, match="weights.pth is for 12 classes, /images has 2"):
        match(["ant", "bee"], None, 12)
    assert match(["ant", "bee"], None, 12, fewer=True).outputs is None
    with pytest.raises(ValueError, match="weights.pth is for 2 classes, /images has 3"):
        match(["ant", "bee", "cat"], None, 2, fewer=True)


@pytest.mark.parametrize(
    ("classes", "names", "count", "message"),
    [
        (
            ["ant", "cow"],
            ["ant", "bee"],
            2,
            r"does not know 1 of the 2 classes in /images: 'cow'; it knows 'ant', 'bee':",
        ),
        (
            ["a\x1b", *"bcdef"],
            ["ant"],
            1,
            r"does not know 6 of the 6 classes in /images: 'a\\x1b', 'b', 'c', ...; it",
        ),
        (["ant", "ant"], ["ant", "bee"], 2, "can't be matched by name: one has two classes of one name"),
        (["ant"], ["ant", "ant"], 2, "can't be matched by name: one has two classes of one name"),
        (["1", "2"], ["ant", "bee"], 2, "does not know 2 of the 2 classes"),
        (["0", "1"], ["ant", "bee", "cat"], 3, "is for 3 classes, /images has 2"),
        (NUMBERS[:12], NUMBERS[1:13], 12, "classes of the same names at different places, and each has others besides"),
        (NUMBERS[1:13], NUMBERS[:12], 12, r"\(class 0 is '1', not '0'\): rename the folders, or name the outputs"),
        (imagenet_names()[:200], NUMBERS[:5], 1000, "is for 5 classes, /images has 200"),
        (imagenet_names()[:200], None, 999, "is for 999 classes, /images has 200"),
        (["cat", *imagenet_names()[:199]], None, 1000, "is for 1000 classes, /images has 200"),
    ],
)
def test_other_classes_are_refused(classes, names, count, message):
    with pytest.raises(ValueError, match=message) as error:
        match(classes, names, count)
    assert "weights.pth" in str(error.value)
    assert str(error.value).isprintable()


def test_weights_of_another_data_set_are_not_taken_for_those_of_imagenet():
    with pytest.raises(ValueError, match="is for 1000 classes, /images has 200"):
        match(imagenet_names()[:200], None, 1000, "cf100")


def test_numbers_that_were_ordered_by_text_are_refused(tmp_path):
    source = folder(tmp_path, "2", "10", "1")
    with pytest.raises(
        ValueError, match=r"ordered by text \('1', '10', '2'\) and are ordered by number now \('1', '2', '1"
    ) as error:
        match(source, None, 3)
    assert "put a letter before each name, for the order by text, or name its outputs in a file" in str(error.value)
    assert match(source, ["1", "10", "2"]).outputs == (0, 2, 1)
    assert match(folder(tmp_path / "lettered", "c2", "c10", "c1"), None, 3).outputs is None
    assert match(folder(tmp_path / "few", "0", "1", "2"), None, 3) is SAME_CLASSES


def resumed(before, now) -> None:
    meta = {} if before is None else {"class_names": before}
    source = now if isinstance(now, Source) else Named(now)
    check_resumed_classes(Checkpoint(WEIGHTS, {"a": torch.ones(1)}, None, meta), source.classes, source, IMAGES)


def test_a_run_goes_on_with_its_classes(tmp_path):
    for before, now in (
        (["ant", "bee"], ["ant", "bee"]),
        (None, ["ant", "bee"]),
        (["0", "1"], ["ant", "bee"]),
        (["ant", "bee"], ["0", "1"]),
        (["1", "2", "10"], folder(tmp_path, "2", "10", "1")),
    ):
        resumed(before, now)


def test_a_run_with_other_classes_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="of another experiment, since in /images class 1 is 'cow', not 'bee': restore"
    ):
        resumed(["ant", "bee"], ["ant", "cow"])
    with pytest.raises(ValueError, match="class 0 is 'bee', not 'ant'"):
        resumed(["ant", "bee"], ["bee", "ant"])
    with pytest.raises(ValueError, match="class 2 is 'cow', not missing"):
        resumed(["ant", "bee"], ["ant", "bee", "cow"])
    for before, now in ((NUMBERS[:12], NUMBERS[1:13]), (NUMBERS[1:13], NUMBERS[:12])):
        with pytest.raises(ValueError, match="of another experiment, since in /images class 0 is"):
            resumed(before, now)
    with pytest.raises(ValueError, match=r"weights.pth does not name its classes: .* put a letter before each name"):
        resumed(None, folder(tmp_path, "2", "10", "1"))
    check_resumed_classes(Checkpoint(WEIGHTS, {}, None), None, Named(["anyone"]), IMAGES)
