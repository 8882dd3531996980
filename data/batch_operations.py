"""The operations of RandAugment on uint8 batches, with arguments for each image and the results of Pillow.

A point operation is a table of 256 values for each channel of each image, so that consecutive ones become one table. No
operator makes the host wait for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from PIL.Image import Resampling
from torch import Tensor

from .affine import sample
from .boxes import box_masks

CHANNELS = 3
VALUES = 256  # of a pixel in a channel
RED, GREEN, BLUE, HALF = 19595, 38470, 7471, 1 << 15  # of Pillow's grey, in units of 2**-16


class Group(NamedTuple):
    """The images of a batch that one operation is for.

    Attributes:
        images: uint8 (N, 3, H, W).
        tables: that are still to be applied to them, uint8 (N, 3, 256).
        arguments: of the operation, float64 (N, A).
    """

    images: Tensor
    tables: Tensor
    arguments: Tensor

    @property
    def values(self) -> Tensor:
        """The values of a pixel, int64 (N, 1, 256)."""
        return torch.arange(VALUES, device=self.images.device).expand(len(self.images), 1, -1)

    @property
    def argument(self) -> Tensor:
        """The argument of an operation that has one, float64 (N, 1, 1)."""
        return self.arguments[:, :1, None]


def identity(count: int, device: torch.device) -> Tensor:
    """Returns tables that change nothing, uint8 (N, 3, 256)."""
    return torch.arange(VALUES, dtype=torch.uint8, device=device).repeat(count, CHANNELS, 1)


def look_up(tables: Tensor, values: Tensor) -> Tensor:
    """Returns what tables (N, 3, 256) make of uint8 values (N, 3, ...)."""
    return tables.gather(2, values.flatten(2).long()).view_as(values)


def blend(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Returns first + share * (second - first), in float32, cut off to uint8; shares beyond 0 and 1 extrapolate."""
    first = first.float()
    return (first + share.float() * (second.float() - first)).clamp_(0, 255).to(torch.uint8)


def grey(images: Tensor) -> Tensor:
    """Returns the luma of images (N, 3, H, W) as Pillow rounds it, int32 (N, 1, H, W)."""
    red, green, blue = images.int().split(1, 1)
    return red * RED + green * GREEN + blue * BLUE + HALF >> 16


def smooth(images: Tensor) -> Tensor:
    """Returns Pillow's filter SMOOTH: means of 3 x 3 pixels, the inner one with a weight of 5; the border stays."""
    if min(images.shape[2:]) < 3:
        return images
    pixels = images.short()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smoothed = images.clone()
    smoothed[:, :, 1:-1, 1:-1] = (total.float() / 13).round_().to(torch.uint8)  # thirteenths are never half-way
    return smoothed


def histogram(group: Group) -> Tensor:
    """Returns how often each value occurs in a channel, int64 (N, 3, 256), once the tables are applied."""
    pixels = group.images.flatten(2)
    counts = torch.zeros(group.tables.shape, dtype=torch.int64, device=pixels.device)
    stored = counts.scatter_add(2, pixels.long(), counts.new_ones(()).expand_as(pixels))
    return counts.scatter_add(2, group.tables.long(), stored)


def invert(group: Group) -> Tensor:
    """Mirrors the values."""
    return (255 - group.values).to(torch.uint8)


def posterize(group: Group) -> Tensor:
    """Keeps the most significant bits, as many as the argument says."""
    dropped = 8 - group.argument.long().clamp(0, 8)
    return (group.values >> dropped << dropped).to(torch.uint8)


def solarize(group: Group) -> Tensor:
    """Mirrors the values from the argument on."""
    return group.values.where(group.values < group.argument, 255 - group.values).to(torch.uint8)


def solarize_add(group: Group) -> Tensor:
    """Adds the argument to the lower half of the values."""
    raised = (group.values + group.argument.long()).clamp_(max=255)
    return raised.where(group.values < VALUES // 2, group.values).to(torch.uint8)


def brightness(group: Group) -> Tensor:
    """Multiplies the values."""
    return blend(torch.zeros_like(group.values), group.values, group.argument)


def contrast(group: Group) -> Tensor:
    """Multiplies the distance of the values from the mean grey of the image."""
    height, width = group.images.shape[2:]
    mean = (grey(group.images).sum((2, 3)).double() / (height * width) + 0.5).floor()
    return blend(mean[..., None], group.values, group.argument)


def auto_contrast(group: Group) -> Tensor:
    """Spreads the values of each channel over 0 to 255; a single one stays."""
    values, occurs = group.values, histogram(group) > 0
    least, most = values.where(occurs, VALUES).amin(2, True), values.where(occurs, -1).amax(2, True)
    distance = (most - least).clamp(min=1).double()
    scale = torch.full_like(distance, 255) / distance  # for a number, torch multiplies by the reciprocal
    spread = (values * scale + -least * scale).clamp_(0, 255)
    return spread.to(torch.uint8).where(most > least, values.to(torch.uint8))


def equalize(group: Group) -> Tensor:
    """Makes the values of each channel equally frequent, as far as that goes."""
    values, counts = group.values, histogram(group)
    last = values.where(counts > 0, -1).amax(2, True)
    step = (counts.sum(2, keepdim=True) - counts.gather(2, last)) // 255  # 0 for a single value
    spread = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return spread.clamp_(max=255).where(step > 0, values).to(torch.uint8)


def color(group: Group) -> Tensor:
    """Multiplies the distance of the pixels from their grey."""
    return blend(grey(group.images), group.images, group.argument[..., None])


def sharpness(group: Group) -> Tensor:
    """Multiplies the distance of the pixels from the smoothed image."""
    return blend(smooth(group.images), group.images, group.argument[..., None])


def cutout(group: Group) -> Tensor:
    """Paints boxes; the arguments are a box, as `box_masks` takes it, and a colour."""
    boxes, fill = group.arguments[:, :4], group.arguments[:, 4:7].to(torch.uint8)
    return fill[..., None, None].where(box_masks(boxes, *group.images.shape[2:]), group.images)


def bilinear(group: Group) -> Tensor:
    """Applies an affine map; the arguments are a matrix and the colour outside."""
    return sample(group.images, group.arguments[:, :6], group.arguments[:, 6:9].to(torch.uint8), Resampling.BILINEAR)


def bicubic(group: Group) -> Tensor:
    """Likewise, with smoother interpolation."""
    return sample(group.images, group.arguments[:, :6], group.arguments[:, 6:9].to(torch.uint8), Resampling.BICUBIC)


# Operations that return tables, uint8 (N, 3, 256), or (N, 1, 256) for all channels alike.
POINT_OPERATIONS: dict[str, Callable[[Group], Tensor]] = {
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Brightness": brightness,
    "Contrast": contrast,
    "AutoContrast": auto_contrast,
    "Equalize": equalize,
}
# Operations that return images, uint8 (N, 3, H, W).
PIXEL_OPERATIONS: dict[str, Callable[[Group], Tensor]] = {
    "Color": color,
    "Sharpness": sharpness,
    "Cutout": cutout,
    "Bilinear": bilinear,
    "Bicubic": bicubic,
}
# Those that depend on more than the tables and the histograms: pending tables are applied to their images first.
NEED_PIXELS = {*PIXEL_OPERATIONS, "Contrast"}
