"""The pixels of one image, in a tensor as by Pillow: all but the same where they are resized, the same elsewhere."""

import numpy as np
import pytest
import torch
from pictures import encoded, photo
from PIL import Image
from torchvision import transforms as published

from data import build_decoder, eval_transform
from data.pixels import cut, flip, resize, size_of, to_pillow, to_tensor

MODES = ("L", "RGB", "RGBA")
MOST = {"bilinear": 1, "bicubic": 2}  # of 255


def both(image: Image.Image) -> tuple[Image.Image, torch.Tensor]:
    """Returns an image as Pillow's and as a tensor (H, W, C)."""
    pixels = torch.from_numpy(np.array(image))
    return image, pixels if pixels.ndim == 3 else pixels[..., None]


def differences(image: Image.Image, pixels: torch.Tensor) -> np.ndarray:
    """Returns by how much two images of one size differ, (H, W, C)."""
    assert size_of(image) == size_of(pixels)
    return np.abs(both(image)[1].int().numpy() - pixels.int().numpy())


SHAPES = [
    (500, 375),
    (333, 500),
    (64, 64),
    (10, 7),
    (1, 1),
    (1, 300),
    (300, 1),
    (3, 400),
    (700, 9),
    (56, 90),
    (900, 50),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(56, 56), (224, 160), (1, 1), (1, 30)])
def test_resizing_is_that_of_pillow_but_for_rounding(size, interpolation, mode):
    means = []
    for shape in SHAPES:
        image, pixels = both(photo(*shape, seed=sum(shape)).convert(mode).convert(mode))
        if mode == "RGBA":
            image = Image.fromarray(pixels[..., :3].numpy())  # Pillow multiplies colours by their opacity
        found = resize(pixels, size, interpolation)
        assert found.dtype == torch.uint8
        by = differences(resize(image, size, interpolation), found[..., : 3 if mode == "RGBA" else None])
        assert by.max() <= MOST[interpolation], shape
        means.append(by.mean())
    assert np.mean(means) < 0.01


def test_resizing_to_its_own_size_changes_nothing():
    image, pixels = both(photo(40, 50, 0))
    assert torch.equal(resize(pixels, (40, 50), "bicubic"), pixels)
    assert resize(image, (40, 50), "bicubic").tobytes() == image.tobytes()


def test_a_part_of_an_image_is_resized_without_its_surroundings():
    _, pixels = both(photo(60, 70, 0))
    part = pixels[10:40, 20:65]
    assert torch.equal(resize(part, (24, 24), "bilinear"), resize(part.clone(), (24, 24), "bilinear"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("top", "left", "size"), [(0, 0, (20, 30)), (3, 4, (5, 6)), (-2, 5, (20, 30)), (4, -3, (30, 40)), (-9, -9, (9, 9))]
)
def test_boxes_may_reach_beyond_the_image(top, left, size, mode):
    image, pixels = both(photo(20, 30, 0).convert(mode))
    assert not differences(cut(image, top, left, size), cut(pixels, top, left, size)).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_flips(columns, rows, mode):
    image, pixels = both(photo(7, 9, 0).convert(mode))
    found = flip(pixels, columns=columns, rows=rows)
    assert not differences(flip(image, columns=columns, rows=rows), found).any()
    assert torch.equal(found, pixels.flip([axis for axis, flips in ((0, rows), (1, columns)) if flips]))


@pytest.mark.parametrize("mode", MODES)
def test_an_image_becomes_a_tensor_and_pillows_again(mode):
    image, pixels = both(photo(7, 9, 0).convert(mode))
    assert to_pillow(image) is image
    assert (to_pillow(pixels).mode, to_pillow(pixels).tobytes()) == (mode, image.tobytes())
    for kind in (image, pixels):
        assert torch.equal(to_tensor(kind), pixels.permute(2, 0, 1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [False, True])
def test_evaluation_is_the_published_one_but_for_rounding(crop, interpolation):
    """Of JPEG files of many sizes, subsamplings and qualities, and with Pillow bit for bit."""
    expected_transform = published.Compose(
        [
            published.Resize(256 if crop else 224, published.InterpolationMode(interpolation)),
            published.CenterCrop(224),
            published.PILToTensor(),
        ]
    )
    transform, means = eval_transform((224, 224), crop=crop, interpolation=interpolation), []
    for number, shape in enumerate([(375, 500), (500, 333), (224, 225), (30, 40), (100, 900), (1, 1), (640, 480)]):
        image = photo(*shape, seed=number)
        content = encoded(image.convert("L") if number == 5 else image, "JPEG", quality=60 + 5 * number)
        expected = expected_transform(build_decoder("pillow")(content))
        assert torch.equal(transform(build_decoder("pillow")(content)), expected)
        by = (transform(build_decoder("simplejpeg")(content)).int() - expected.int()).abs()
        assert by.max() <= MOST[interpolation], shape
        means.append(by.float().mean())
    assert np.mean(means) < 0.01
