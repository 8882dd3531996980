"""A batch as the network sees it, for TensorBoard: augmented, mixed and erased."""

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid

from data import IGNORED, Normalize
from utils.text import printable

COUNT, COLUMNS = 16, 4  # images that are shown
LARGEST_SHARES, LEAST_SHARE = 3, 0.05  # classes that a caption names
OVERLAY = 0.4  # weight of the colour of a class over a pixel of it


class Sample(NamedTuple):
    """The first images of a batch, on the device."""

    update: int  # the number of the update that they are part of, from 1
    images: Tensor  # uint8 (N, C, H, W)
    targets: Tensor  # class numbers (N,) or (N, H, W), or shares of the classes (N, K)


def take_sample(images: Tensor, targets: Tensor, normalize: Normalize, update: int) -> Sample:
    """Copies the first images, as the network gets them, and their targets; the host does not wait for the device."""
    return Sample(update, normalize.undo(images[:COUNT]), targets[:COUNT].clone())


def picture(sample: Sample) -> Tensor:
    """Returns the images side by side in rows of `COLUMNS`, uint8 (3, H, W), on the CPU.

    One channel is shown as grey, and of four the first three. Masks lie over their images in the colours of `colour`.
    """
    images, targets = sample.images.cpu(), sample.targets.cpu()
    images = images[:, :3].expand(-1, 3, -1, -1)
    if targets.dim() == 3:
        known = targets != IGNORED
        colours = torch.tensor([colour(number) for number in range(int(targets.where(known, 0).max()) + 1)])
        overlay = colours[targets.where(known, 0)].permute(0, 3, 1, 2)
        images = images.where(~known[:, None], images.float().lerp(overlay, OVERLAY).round().byte())
    grid: Tensor = make_grid(images, COLUMNS, pad_value=255)
    return grid


def colour(number: int) -> tuple[float, float, float]:
    """Returns red, green and blue, 0 to 255, of a class; hues follow each other by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 1, 1)
    return 255 * red, 255 * green, 255 * blue


def captions(sample: Sample, classes: Sequence[str]) -> str:
    """Returns a Markdown table of the labels of the images, by row and column of the picture.

    Of a mixed label, or the pixels of a mask, it names the classes with the largest shares.
    """
    lines = ["| row | column | label |", "|---|---|---|"]
    for i, shares in enumerate(_shares(sample.targets.cpu())):
        largest = shares.topk(min(LARGEST_SHARES, len(shares)))
        named = [
            (classes[number] if number < len(classes) else str(number)) + f" {share:.2f}" * (share < 1)
            for share, number in zip(largest.values.tolist(), largest.indices.tolist(), strict=True)
            if share >= LEAST_SHARE
        ]
        label = printable(", ".join(named)).replace("|", "\\|")
        lines.append(f"| {i // COLUMNS + 1} | {i % COLUMNS + 1} | {label} |")
    return "\n".join(lines)


def _shares(targets: Tensor) -> Tensor:
    """Returns the share of each class in each target, (N, classes)."""
    if targets.is_floating_point():
        return targets.float()
    if targets.dim() == 1:
        return F.one_hot(targets).float()
    pixels = torch.stack([mask.flatten().bincount(minlength=IGNORED + 1)[:IGNORED] for mask in targets])
    return pixels / pixels.sum(1, keepdim=True).clamp(min=1)
