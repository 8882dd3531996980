"""From the image of a source to a uint8 tensor, with or without augmentation, and on to normalised pixels.

Batches travel as uint8, which is a quarter of the memory traffic of float32; `Normalize` runs on the device.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, TrivialAugmentWide
from yacs.config import CfgNode

from utils.seed import keyed_rng

from .pixels import DecodedImage, Size, cut, flip, resize, size_of, to_pillow, to_tensor
from .randaugment import RandAugment, is_rand_augment, rand_augment_of, unknown_policy

Range = tuple[float, float]
Step = Callable[[DecodedImage, random.Random], DecodedImage]

INTERPOLATIONS = ("bilinear", "bicubic", "random")
TRIES = 10  # of a random box to lie within the image
SMALL = 32  # images of at most this side are shifted rather than cropped and zoomed, as published for CIFAR
SMALL_SHIFT = 4  # pixels

# Policies of torchvision, by their names in AUG.AUTO_AUGMENT: TrivialAugment (Mueller, Hutter, arXiv:2103.10158), and
# what AutoAugment (Cubuk et al., arXiv:1805.09501) found on two data sets besides ImageNet.
_OF_TORCHVISION: dict[str, Callable[..., nn.Module]] = {
    "trivial": TrivialAugmentWide,
    "cifar10": partial(AutoAugment, AutoAugmentPolicy.CIFAR10),
    "svhn": partial(AutoAugment, AutoAugmentPolicy.SVHN),
}
# What a policy is called, or begins with.
POLICIES = ("none", *_OF_TORCHVISION, "rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
_POLICY = re.compile(r"(rand|augmix|original|originalr|v0|v0r|3a)(-(t(weights|3aw?)|[a-z]+\d+(\.\d+)?))*")


@dataclass(frozen=True)
class Transform:
    """Steps from the image of a source to a uint8 tensor (C, H, W), each of which may draw random numbers."""

    steps: tuple[Step, ...]

    def __call__(self, image: DecodedImage, rng: random.Random | None = None) -> Tensor:
        """Transforms an image by what it draws from `rng`, by default from a generator that the system seeds."""
        rng = rng or random.Random()
        for step in self.steps:
            image = step(image, rng)
        return to_tensor(image)


@dataclass(frozen=True)
class CentreOf:
    """Resizes an image, keeping its aspect ratio, so that it just covers `cover`, and cuts `size` out of its centre.

    For squares that is torchvision's `Resize(side)`, by which the shorter side becomes `side`, and `CenterCrop`.
    """

    size: Size
    cover: Size
    interpolation: str

    def __call__(self, image: DecodedImage, _rng: random.Random) -> DecodedImage:
        """Returns the centre."""
        height, width = self.cover
        old_height, old_width = size_of(image)
        if height * old_width >= width * old_height:
            width = height * old_width // old_height
        else:
            height = width * old_height // old_width
        top, left = (round((whole - part) / 2) for whole, part in zip((height, width), self.size, strict=True))
        return cut(resize(image, (height, width), self.interpolation), top, left, self.size)


@dataclass(frozen=True)
class RandomResizedCrop:
    """Cuts a random part out of an image and resizes it, as the transform of timm and torchvision of this name.

    Attributes:
        size: of the result.
        interpolation: an entry of `INTERPOLATIONS`; `random` is one of the two for each image.
        scale: smallest and largest area of the part, as a fraction of the image's.
        ratio: smallest and largest width of the part over its height.
    """

    size: Size
    interpolation: str
    scale: Range
    ratio: Range

    def __call__(self, image: DecodedImage, rng: random.Random) -> DecodedImage:
        """Returns the part."""
        top, left, *size = self.box(size_of(image), rng)
        names = INTERPOLATIONS[:2]
        name = rng.choice(names) if self.interpolation == "random" else self.interpolation
        return resize(cut(image, top, left, (size[0], size[1])), self.size, name)

    def box(self, size: Size, rng: random.Random) -> tuple[int, int, int, int]:
        """Draws a part of an image of this size: first row, first column, height and width.

        The area is uniform and the ratio log-uniform. After `TRIES` draws that do not fit it is the largest part in the
        centre whose ratio is allowed.
        """
        height, width = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(TRIES):
            area = rng.uniform(*self.scale) * (height * width)
            ratio = math.exp(rng.uniform(low, high))
            w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
            if w <= width and h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class RandomShift:
    """Moves an image by up to so many rows and columns, either way; what was not part of it is black."""

    rows: int
    columns: int

    def __call__(self, image: DecodedImage, rng: random.Random) -> DecodedImage:
        """Returns the moved image."""
        top, left = rng.randint(-self.rows, self.rows), rng.randint(-self.columns, self.columns)
        return cut(image, top, left, size_of(image))


@dataclass(frozen=True)
class RandomFlip:
    """Swaps left and right, and top and bottom, each with its probability."""

    horizontal: float
    vertical: float

    def __call__(self, image: DecodedImage, rng: random.Random) -> DecodedImage:
        """Returns the image or its mirror image."""
        return flip(image, columns=rng.random() < self.horizontal, rows=rng.random() < self.vertical)


@dataclass(frozen=True)
class Augment:
    """Applies RandAugment to a single image."""

    policy: RandAugment

    def __call__(self, image: DecodedImage, rng: random.Random) -> DecodedImage:
        """Returns the augmented image."""
        return self.policy(to_pillow(image), rng)


@dataclass(frozen=True)
class OnPillow:
    """Applies a transform of Pillow's images that draws from the global generators, as timm's and torchvision's do.

    They are seeded within it and have their former state afterwards.
    """

    transform: Callable[[Image.Image], Image.Image]

    def __call__(self, image: DecodedImage, rng: random.Random) -> DecodedImage:
        """Returns the transformed image."""
        with keyed_rng(rng.getrandbits(64)):
            return self.transform(to_pillow(image))


def none(size: Size, interpolation: str, _cfg: CfgNode) -> Transform:
    """No augmentation, as in evaluation."""
    return eval_transform(size, interpolation=interpolation)


def flipped(size: Size, interpolation: str, cfg: CfgNode) -> Transform:
    """Flips, by default horizontally half of the time, and nothing else."""
    return Transform((_whole(size, interpolation), _flip(cfg)))


def weak(size: Size, interpolation: str, cfg: CfgNode) -> Transform:
    """A random part, by default of 8 to 100 % of the area, resized, and flipped, by default half of the time."""
    return Transform((_crop(size, interpolation, cfg), _flip(cfg)))


def shift(size: Size, interpolation: str, _cfg: CfgNode) -> Transform:
    """Shifts by up to an eighth of the size, for images that must not be mirrored, such as digits."""
    return Transform((_whole(size, interpolation), _shift(size)))


def crop(size: Size, interpolation: str, cfg: CfgNode) -> Transform:
    """Shifts by up to an eighth of the size and flips, as usual for CIFAR (4 of 32 pixels, half of the time)."""
    return Transform((_whole(size, interpolation), _shift(size), _flip(cfg)))


# Those named raug* also apply the published RandAugment.
PRESETS: dict[str, Callable[[Size, str, CfgNode], Transform]] = {
    "none": none,
    "flip": flipped,
    "weak": weak,
    "raug10": weak,
    "raug15": weak,
    "raug20": weak,
    "raug25": weak,
    "shift": shift,
    "crop": crop,
}
# Those that never mirror, and those that show the whole image, or nearly so.
WITHOUT_FLIP = ("none", "shift")
WITHOUT_CROP = ("none", "flip", "shift", "crop")


def _whole(size: Size, interpolation: str) -> CentreOf:
    return CentreOf(size, size, "bilinear" if interpolation == "random" else interpolation)


def _crop(size: Size, interpolation: str, cfg: CfgNode) -> RandomResizedCrop:
    return RandomResizedCrop(size, interpolation, cfg.SCALE, cfg.RATIO)


def _flip(cfg: CfgNode) -> RandomFlip:
    return RandomFlip(cfg.HFLIP, cfg.VFLIP)


def _shift(size: Size) -> RandomShift:
    return RandomShift(size[0] // 8, size[1] // 8)


def train_transform(
    size: Size, cfg: CfgNode, *, interpolation: str = "bilinear", rand_augment: bool = True
) -> Transform:
    """Returns the augmentation of a training image: a preset, or timm's pipeline where PRESET is None.

    `cfg` is the section AUG. timm's pipeline crops (SCALE, RATIO), flips (HFLIP, VFLIP), and then either follows the
    policy AUTO_AUGMENT or, where that is `none`, jitters brightness, contrast and saturation by up to COLOR_JITTER;
    with `3a` it does both. Up to 32 pixels it shifts by up to 4 pixels where it would crop and zoom. Erasing happens
    later, on normalised batches. RandAugment comes last; without `rand_augment` it is left to the device.

    Raises ValueError for a policy that timm does not know.
    """
    if cfg.PRESET is not None:
        transform = PRESETS[cfg.PRESET](size, interpolation, cfg)
    else:
        transform = Transform((*_timm_geometry(size, interpolation, cfg), *_policy(size, interpolation, cfg)))
    policy = rand_augment_of(cfg, interpolation)
    if policy is None or not rand_augment:
        return transform
    return Transform((*transform.steps, Augment(policy)))


def _timm_geometry(size: Size, interpolation: str, cfg: CfgNode) -> tuple[Step, ...]:
    """Returns what timm's pipeline begins with."""
    if max(size) > SMALL:
        return _crop(size, interpolation, cfg), _flip(cfg)
    # The published code shifts alone; its images already have this size.
    return _whole(size, interpolation), RandomShift(SMALL_SHIFT, SMALL_SHIFT), _flip(cfg)


def is_auto_augment_policy(text: str) -> bool:
    """Returns whether `text` has the form of a policy of timm, names one of torchvision, or is `none`.

    timm's parsers refuse some of what they do not know, and ignore the rest of it silently.
    """
    return text == "none" or text in _OF_TORCHVISION or _POLICY.fullmatch(text) is not None


def _policy(size: Size, interpolation: str, cfg: CfgNode) -> list[OnPillow]:
    """Returns what follows crop and flip in timm's pipeline, or torchvision's policy there, but for RandAugment."""
    auto_augment = cfg.AUTO_AUGMENT
    assert is_auto_augment_policy(auto_augment)
    if is_rand_augment(auto_augment):
        return []
    if auto_augment in _OF_TORCHVISION:
        resample = InterpolationMode.BICUBIC if interpolation == "bicubic" else InterpolationMode.BILINEAR
        return [OnPillow(_OF_TORCHVISION[auto_augment](interpolation=resample))]
    try:
        _crop_and_flip, policy, _finish = create_transform(
            size,
            is_training=True,
            color_jitter=cfg.COLOR_JITTER,
            auto_augment=None if auto_augment == "none" else auto_augment,
            interpolation=interpolation,
            separate=True,
        )
    except (AssertionError, ValueError) as error:
        raise unknown_policy(auto_augment, str(error)) from error
    return [OnPillow(policy)] if policy.transforms else []


def eval_transform(size: Size, *, crop: bool = False, interpolation: str = "bilinear") -> Transform:
    """Returns the transform of a test image: resize so that it covers `size`, then cut out the centre.

    With `crop` it covers 256/224 of the size instead, so that the centre is about 3/4 of the image; the published
    accuracies are without. `random` interpolation is for training and means bilinear here.
    """
    height, width = size
    centre = _whole(size, interpolation)
    return Transform((replace(centre, cover=(height * 256 // 224, width * 256 // 224)) if crop else centre,))


class Normalize(nn.Module):
    """uint8 pixels (N, C, H, W) to `(x / 255 - mean) / std` in `dtype`, on the device of the module.

    Its buffers are not persistent: they belong to the data, not to a checkpoint.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("mean", torch.tensor(mean, dtype=dtype).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=dtype).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the normalised pixels, a new contiguous tensor of the same shape."""
        assert images.dtype == torch.uint8
        assert images.shape[1] == self.mean.shape[1]
        # Batches are ordered by pixels, which no result of a network is to depend on.
        pixels = images.to(self.dtype, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(self.mean).div_(self.std)

    def undo(self, images: Tensor) -> Tensor:
        """Returns the pixels, uint8, of normalised images (N, C, H, W); values beyond those of pixels are clipped."""
        pixels = (images.float() * self.std + self.mean).mul_(255)
        return pixels.nan_to_num_().round_().clamp_(0, 255).to(torch.uint8)
