"""Dividing training images by a seeded fraction or into folds: stratified, and a function of the names alone."""

from collections import Counter

import numpy as np
import pytest
from settings import settings
from stored_sets import CLASSES, STORED, store

from data import EncodedSource, open_source
from data.sources import ImageSource
from data.splits import hold_out

SIZES = {"ant": 20, "bee": 7, "cat": 2}


class Named(ImageSource):
    """Images that have names and classes, and no pixels."""

    def __init__(self, sizes: dict[str, int], order: list[int] | None = None) -> None:
        names = [(f"{name}/{number}", label) for label, name in enumerate(sizes) for number in range(sizes[name])]
        names = [names[index] for index in order] if order else names
        self.names, self.classes = [name for name, _ in names], list(sizes)
        self.labels = np.array([label for _, label in names])

    def name(self, index: int) -> str:
        return self.names[index]

    def locate(self, index: int) -> str:
        return self.names[index]

    def _image(self, index: int):
        raise AssertionError


def held_out(source: Named, opts: str) -> set[str]:
    mask = hold_out(source, settings(opts).DATA)
    return {name for name, out in zip(source.names, mask, strict=True) if out}


def counts(names: set[str]) -> dict[str, int]:
    return dict(Counter(sorted(name.split("/")[0] for name in names)))


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [(0.1, [2, 1, 1]), (0.3, [6, 2, 1]), (0.5, [10, 4, 1]), (0.99, [19, 6, 1]), (1e-6, [1, 1, 1])],
)
def test_each_class_gives_its_fraction_and_keeps_some(fraction, expected):
    assert list(counts(held_out(Named(SIZES), f"DATA.VAL_FRACTION {fraction}")).values()) == expected


def test_folds_are_disjoint_and_make_up_the_whole():
    source = Named({"ant": 20, "bee": 7, "cat": 5})
    folds = [held_out(source, f"DATA.FOLDS 5 DATA.FOLD {fold}") for fold in range(5)]
    assert sum(map(len, folds)) == len(source)
    assert set.union(*folds) == set(source.names)
    assert all(set(counts(fold)) == {"ant", "bee", "cat"} for fold in folds)
    assert {len(fold) for fold in folds} <= {6, 7}
    assert [counts(fold)["ant"] for fold in folds] == [4] * 5


def test_the_order_and_other_classes_change_nothing():
    order = np.random.default_rng(0).permutation(sum(SIZES.values())).tolist()
    for opts in ("DATA.VAL_FRACTION 0.3", "DATA.FOLDS 2 DATA.FOLD 1"):
        expected = held_out(Named(SIZES), opts)
        assert held_out(Named(SIZES, order), opts) == expected
        more = held_out(Named(SIZES | {"dog": 50}), opts)
        assert {name for name in more if not name.startswith("dog")} == expected


def test_the_division_is_always_the_same():
    """A run that resumes, on another machine and years later, must not train on its test images."""
    assert sorted(held_out(Named(SIZES), "DATA.VAL_FRACTION 0.1")) == ["ant/0", "ant/11", "bee/2", "cat/1"]


def test_another_seed_divides_differently():
    assert held_out(Named(SIZES), "DATA.FOLDS 2") != held_out(Named(SIZES), "DATA.FOLDS 2 DATA.SPLIT_SEED 1")


@pytest.mark.parametrize(
    ("opts", "sizes", "message"),
    [
        ("DATA.VAL_FRACTION 0.5", {"ant": 3, "bee": 1}, "the class 'bee' is too small .* 1 of the 2 images"),
        ("DATA.FOLDS 5", {"ant": 5, "bee": 4}, "the class 'bee' is too small .* 4 of the 5 images"),
    ],
)
def test_a_class_that_is_too_small_is_named(opts, sizes, message):
    with pytest.raises(ValueError, match=message):
        held_out(Named(sizes), opts)


def test_a_class_without_images_needs_none():
    source = Named({"ant": 3, "bee": 0, "cat": 2, "dog": 0})
    assert counts(held_out(source, "DATA.VAL_FRACTION 0.5")) == {"ant": 2, "cat": 1}


@pytest.mark.parametrize("opts", ["DATA.VAL_FRACTION 0.25", "DATA.FOLDS 4 DATA.FOLD 3"])
@pytest.mark.parametrize("how", STORED)
def test_every_format_can_be_divided(how, opts, image_folder, tmp_path):
    cfg = settings(f"{store(how, image_folder, tmp_path / 'stored')} DATA.CACHE_MODE no {opts}").DATA
    train, val = (open_source(cfg, split) for split in ("train", "val"))
    assert isinstance(train, EncodedSource)
    assert (len(train), len(val)) == (9, 3)
    assert train.classes == val.classes == list(CLASSES)
    assert np.bincount(val.labels).tolist() == [1, 1, 1]
    images = [(source.locate(i), source.load(i)[0].tobytes()) for source in (train, val) for i in range(len(source))]
    assert len(set(images)) == 12
    undivided = open_source(settings(f"DATA.DATA_PATH {image_folder}").DATA, "train")
    pixels = {undivided.load(index)[0].tobytes(): undivided.classes[undivided.labels[index]] for index in range(12)}
    for source in (train, val):
        for index in range(len(source)):
            image, label = source.load(index)
            assert pixels[image.tobytes()] == source.classes[label]


def test_one_folder_without_splits(image_folder):
    cfg = settings(f"DATA.DATA_PATH {image_folder}/train DATA.VAL_FRACTION 0.5").DATA
    train, val = (open_source(cfg, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 6)
    assert train.locate(0).startswith(f"{image_folder}/train/ant/")


def test_data_sets_in_memory_can_be_divided():
    cfg = settings("DATA.DATA_PATH digits DATA.FOLDS 10").DATA
    train, val = (open_source(cfg, split) for split in ("train", "val"))
    assert len(train) + len(val) == 1438
    assert {train.locate(i) for i in range(len(train))}.isdisjoint(val.locate(i) for i in range(len(val)))
    assert train.load(3)[0].mode == "RGB"


@pytest.mark.parametrize("name", ["cityscapes", "faces"])
def test_masks_and_people_are_not_divided(name, tmp_path):
    cfg = settings(f"TASK {'segmentation' if name == 'cityscapes' else 'verification'}").DATA.clone()
    cfg.defrost()
    cfg.DATASET, cfg.DATA_PATH, cfg.FOLDS = name, str(tmp_path), 5
    with pytest.raises(ValueError, match=f"divide each class, but the labels of {name} are .*: leave them out"):
        open_source(cfg, "val")
