"""What is done to the pixels of one image, whoever holds them: Pillow, or a uint8 tensor (H, W, C).

Each function returns the kind of image that it is given. What Pillow does is bit for bit what the published pipeline
does; what torch does instead differs from it by rounding, 1 of 255.
"""

from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int]  # height, width in pixels
DecodedImage = Image.Image | Tensor
Kind = TypeVar("Kind", Image.Image, Tensor, DecodedImage)

FLIP_COLUMNS, FLIP_ROWS = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM


def size_of(image: DecodedImage) -> Size:
    """Returns height and width."""
    if isinstance(image, Tensor):
        return image.shape[0], image.shape[1]
    return image.height, image.width


def resize(image: Kind, size: Size, interpolation: str) -> Kind:
    """Resizes an image, with antialiasing; `interpolation` is `bilinear` or `bicubic`.

    The two kinds differ by at most 1 of 255 for `bilinear` and by rarely more, at hard edges, for `bicubic`.
    """
    if not isinstance(image, Tensor):
        return image.resize(size[::-1], Image.Resampling[interpolation.upper()])
    if _is_vertical_first(size_of(image), size):
        image = _resized(image, (size[0], image.shape[1]), interpolation)
    return _resized(image, size, interpolation)


def _resized(image: Tensor, size: Size, interpolation: str) -> Tensor:
    pixels = image[None].permute(0, 3, 1, 2)  # in this order torch knows it as channels last, which is faster
    return functional.interpolate(pixels, size, mode=interpolation, antialias=True)[0].permute(1, 2, 0)


def _is_vertical_first(old: Size, new: Size) -> bool:
    """Returns whether Pillow 13 resizes vertically before horizontally; torch always begins horizontally.

    The result of the first pass is rounded, and for `bicubic` clipped, so that the order shows in the pixels.
    """
    height, width = (after / before for before, after in zip(old, new, strict=True))
    return height < 1 and 2 * width > 1 + height


def cut(image: Kind, top: int, left: int, size: Size) -> Kind:
    """Cuts out a box; what of it lies outside the image is black."""
    bottom, right = top + size[0], left + size[1]
    if not isinstance(image, Tensor):
        return image.crop((left, top, right, bottom))
    height, width, _ = image.shape
    if min(top, left) >= 0 and bottom <= height and right <= width:
        return image[top:bottom, left:right]
    return functional.pad(image, (0, 0, -left, right - width, -top, bottom - height))


def flip(image: Kind, *, columns: bool, rows: bool) -> Kind:
    """Mirrors an image: its columns, which swaps left and right, its rows, which swaps top and bottom, or both."""
    if isinstance(image, Tensor):
        dims = [dim for dim, flips in enumerate((rows, columns)) if flips]
        return image.flip(dims) if dims else image
    for flips, method in ((columns, FLIP_COLUMNS), (rows, FLIP_ROWS)):
        image = image.transpose(method) if flips else image
    return image


def to_pillow(image: DecodedImage) -> Image.Image:
    """Returns an image as Pillow's."""
    return (
        Image.fromarray(image.numpy().squeeze(2) if image.shape[2] == 1 else image.numpy())
        if isinstance(image, Tensor)
        else image
    )


def to_tensor(image: DecodedImage) -> Tensor:
    """Returns an image as uint8 (C, H, W); its memory is ordered as Pillow's, by pixels."""
    if not isinstance(image, Tensor):
        pixels = torch.from_numpy(np.array(image))  # Pillow's memory is read-only
        image = pixels if pixels.ndim == 3 else pixels[..., None]
    return image.permute(2, 0, 1)
