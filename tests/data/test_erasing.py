"""Random erasing of a whole batch at once against timm, which erases box after box."""

import random

import pytest
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from data import ERASING_MODES
from data.boxes import box_masks
from data.erasing import BatchErasing

SHAPES = [(8, 3, 17, 31), (5, 1, 32, 32), (6, 3, 2, 2)]  # into the last few boxes fit


def erased(kind: type[RandomErasing], seed: int, images: Tensor, **settings: object) -> tuple[Tensor, float]:
    """The images, and what is drawn next."""
    random.seed(seed)
    torch.manual_seed(seed)
    found = kind(device="cpu", **settings)(images)
    assert found is images
    return found, random.random()


@pytest.mark.parametrize("probability", [0.25, 1.0])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ERASING_MODES)
def test_boxes_and_draws_are_those_of_timm(mode, shape, count, probability):
    some = False
    for seed in range(20):
        images = torch.full(shape, 9.0)
        settings = {"probability": probability, "mode": mode, "max_count": count}
        ours, theirs = (erased(kind, seed, images.clone(), **settings) for kind in (BatchErasing, RandomErasing))
        assert torch.equal(ours[0] == images, theirs[0] == images)
        assert ours[1] == theirs[1]
        if mode == "const":
            assert torch.equal(ours[0], theirs[0])
        some |= not torch.equal(ours[0], images)
    assert some


@pytest.mark.parametrize("mode", ["rand", "pixel"])
def test_what_fills_the_boxes_has_the_distribution_of_timm(mode):
    """Standard normal numbers: one a channel of a box, or one a pixel and channel."""
    values = []
    for seed in range(300):
        images, _ = erased(BatchErasing, seed, torch.full((8, 3, 12, 12), 99.0), probability=1.0, mode=mode)
        for image in images:
            for channel in image:
                own = channel[channel != 99]
                assert len(own.unique()) == (1 if mode == "rand" else len(own))
                values.append(own[:1])
    drawn = torch.cat(values)
    assert len(drawn.unique()) == len(drawn) == 300 * 8 * 3
    assert abs(drawn.mean()) < 0.05
    assert abs(drawn.std() - 1) < 0.03
    assert (drawn.abs() < 0.6745).double().mean() == pytest.approx(0.5, abs=0.025)  # the quartiles


def test_of_several_colours_over_a_pixel_the_last_one_stays():
    class Nested(BatchErasing):
        def _draw(self, height: int, width: int) -> list:
            return [(0, height, 0, width), (1, 3, 1, 3)]

    images = torch.full((2, 3, 4, 4), 99.0)
    Nested(1.0, mode="rand", max_count=2)(images)
    inside = box_masks(torch.tensor([1, 3, 1, 3]), 4, 4)[0]
    for channel in images.flatten(0, 1):
        (inner,), (outer,) = channel[inside].unique(), channel[~inside].unique()
        assert inner != outer != 99


def test_masks_of_boxes():
    boxes = torch.tensor([[[0, 2, 1, 3], [1, 1, 0, 3]], [[1, 2, 0, 1], [0, 2, 0, 3]]])
    masks = box_masks(boxes, 2, 3)
    assert masks.shape == (2, 2, 1, 2, 3)
    assert masks.int().tolist() == [
        [[[[0, 1, 1], [0, 1, 1]]], [[[0, 0, 0], [0, 0, 0]]]],
        [[[[0, 0, 0], [1, 0, 0]]], [[[1, 1, 1], [1, 1, 1]]]],
    ]
