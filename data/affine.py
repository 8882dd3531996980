"""Affine maps of uint8 batches, with the results of Pillow's `Image.transform` and `Image.rotate`."""

import math
from collections.abc import Callable, Sequence

import torch
from PIL.Image import Resampling
from torch import Tensor

# From pixel centres (x, y) of the result to positions (a x + b y + c, d x + e y + f) in the image: a, b, c, d, e, f.
Matrix = tuple[float, float, float, float, float, float]


def rotation(degrees: float, height: int, width: int) -> Matrix:
    """Returns a rotation counter-clockwise around the centre, of which Pillow rounds sine and cosine to 15 digits."""
    angle = -math.radians(degrees % 360.0)
    cos, sin, minus_sin = round(math.cos(angle), 15), round(math.sin(angle), 15), round(-math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, minus_sin, cos, minus_sin * -x + cos * -y + y


# By the names of timm's operations; an argument is in degrees, a slope, or a share of the side.
MATRICES: dict[str, Callable[[float, int, int], Matrix]] = {
    "Rotate": rotation,
    "ShearX": lambda slope, height, width: (1, slope, 0, 0, 1, 0),
    "ShearY": lambda slope, height, width: (1, 0, 0, slope, 1, 0),
    "TranslateXRel": lambda share, height, width: (1, 0, share * width, 0, 1, 0),
    "TranslateYRel": lambda share, height, width: (1, 0, 0, 0, 1, share * height),
}


def linear(pixels: Sequence[Tensor], share: Tensor) -> Tensor:
    """Interpolates two pixels; `share` of the second."""
    first, second = pixels
    return first + (second - first) * share


def cubic(pixels: Sequence[Tensor], share: Tensor) -> Tensor:
    """Interpolates four pixels, between the inner two, by a cubic convolution of parameter -1, as Pillow does.

    Pillow resizes with the parameter -1/2 instead.
    """
    before, first, second, after = pixels
    slope, square, cube = second - before, 2 * (before - first) + second - after, first - before - second + after
    return first + share * (slope + share * (square + share * cube))


# And the pixels that they take, relative to the one left of, or above, a position.
KERNELS = {Resampling.BILINEAR: (linear, range(2)), Resampling.BICUBIC: (cubic, range(-1, 3))}


def sample(images: Tensor, matrices: Tensor, fill: Tensor, resample: Resampling) -> Tensor:
    """Returns images seen through affine maps.

    Positions are computed in float64 and in Pillow's order, so that the same ones lie outside; what lies within half a
    pixel of the border gets the pixels of the border. Values are cut off to integers, as Pillow does.

    Args:
        images: uint8 (N, C, H, W).
        matrices: float64 (N, 6), of a `Matrix` each.
        fill: uint8 (N, C), the colour outside.
        resample: bilinear or bicubic.
    """
    interpolate, taps = KERNELS[resample]
    height, width = images.shape[2:]
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)
    x, y = (torch.arange(side, dtype=torch.float64, device=images.device) + 0.5 for side in (width, height))
    columns, rows = a * x + b * y[:, None] + c, d * x + e * y[:, None] + f  # (N, H, W)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    columns, rows = columns - 0.5, rows - 0.5
    left, top = columns.floor(), rows.floor()
    right_share, lower_share = (columns - left)[:, None], (rows - top)[:, None]
    left, top = left.long(), top.long()
    pixels = images.flatten(2).double()
    across = [(left + tap).clamp_(0, width - 1) for tap in taps]

    def row(tap: int) -> Tensor:
        start = (top + tap).clamp_(0, height - 1) * width
        positions = [(start + column).flatten(1)[:, None].expand_as(pixels) for column in across]
        return interpolate([pixels.gather(2, index).view_as(images) for index in positions], right_share)

    values = interpolate([row(tap) for tap in taps], lower_share).clamp_(0, 255).to(torch.uint8)
    return values.where(inside[:, None], fill[:, :, None, None])
