"""The published way from files to batches: torchvision's image folder, Pillow, float32 in the workers, torch's collate.

The images come as the published recipes have them: `weak`, `raug15`, or as they are for an evaluation.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

GREY = (128, 128, 128)
FULL_SCALE = 10


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Maps an image, bilinearly or bicubically at random, with grey from outside."""
    resample = random.choice((Resampling.BILINEAR, Resampling.BICUBIC))
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=GREY)


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotates an image as `affine` maps it."""
    resample = random.choice((Resampling.BILINEAR, Resampling.BICUBIC))
    return image.rotate(degrees, resample=resample, fillcolor=GREY)


def posterize(image: Image.Image, bits: int) -> Image.Image:
    """Keeps so many bits; none is black."""
    return ImageOps.posterize(image, min(bits, 8)) if bits else Image.new(image.mode, image.size)


def solarize_add(image: Image.Image, added: int) -> Image.Image:
    """Adds to the dark half of the values."""
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def cutout(image: Image.Image, side: int) -> Image.Image:
    """Paints a grey square around a random pixel."""
    left, top = random.randrange(image.width) - side // 2, random.randrange(image.height) - side // 2
    image = image.copy()
    image.paste(GREY, (left, top, left + side, top + side))
    return image


def signed(value: float) -> float:
    """Returns a value with a random sign."""
    return value if random.random() < 0.5 else -value


# Each takes an image and a magnitude, of which 1 is full scale.
OPERATIONS: list[Callable[[Image.Image, float], Image.Image]] = [
    lambda image, _: ImageOps.autocontrast(image),
    lambda image, _: ImageOps.equalize(image),
    lambda image, _: ImageOps.invert(image),
    lambda image, level: rotate(image, signed(30 * level)),
    lambda image, level: posterize(image, int(4 * level)),
    lambda image, level: ImageOps.solarize(image, int(256 * level)),
    lambda image, level: solarize_add(image, int(110 * level)),
    lambda image, level: ImageEnhance.Color(image).enhance(0.1 + 1.8 * level),
    lambda image, level: ImageEnhance.Contrast(image).enhance(0.1 + 1.8 * level),
    lambda image, level: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    lambda image, level: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    lambda image, level: affine(image, 1, signed(0.3 * level), 0, 0, 1, 0),
    lambda image, level: affine(image, 1, 0, 0, signed(0.3 * level), 1, 0),
    lambda image, level: affine(image, 1, 0, signed(0.45 * level) * image.width, 0, 1, 0),
    lambda image, level: affine(image, 1, 0, 0, 0, 1, signed(0.45 * level) * image.height),
    lambda image, level: cutout(image, max(2, int(40 * level))),
]


def raug15(image: Image.Image) -> Image.Image:
    """Applies two of the sixteen operations, each with a whole magnitude from 0 to 14."""
    for _ in range(2):
        image = random.choice(OPERATIONS)(image, random.randrange(15) / FULL_SCALE)
    return image


TO_PIXELS = (transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def transform(recipe: str, size: int) -> transforms.Compose:
    """Returns the transform of `weak`, `raug15` or `evaluation`, to float32 (3, size, size)."""
    if recipe == "evaluation":
        return transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), *TO_PIXELS])
    policy = [raug15] if recipe == "raug15" else []
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*crop, *policy, *TO_PIXELS])


def open_folder(folder: Path, recipe: str, size: int) -> ImageFolder:
    """Opens an image folder."""
    return ImageFolder(folder, transform(recipe, size))


def loader(dataset: Any, batch_size: int, *, train: bool, workers: int = 0) -> DataLoader:
    """Returns a loader of batches of images, float32 (N, 3, H, W), and labels."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
