"""From a PIL image to a uint8 tensor, with or without augmentation, and on to normalised pixels.

Batches travel as uint8, which is a quarter of the memory traffic of float32; `Normalize` runs on the device.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor, nn
from torchvision.transforms import (
    AutoAugment,
    AutoAugmentPolicy,
    CenterCrop,
    Compose,
    InterpolationMode,
    PILToTensor,
    RandomCrop,
    RandomHorizontalFlip,
    TrivialAugmentWide,
)
from yacs.config import CfgNode

from .randaugment import published_rand_augment

Size = tuple[int, int]  # height, width in pixels
Transform = Callable[[Image.Image], Tensor]  # image -> uint8 (C, height, width)

INTERPOLATIONS = ("bilinear", "bicubic", "random")
SMALL = 32  # images of at most this side are shifted rather than cropped and zoomed, as published for CIFAR

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


class ResizeToCover:
    """Resizes an image, keeping its aspect ratio, so that it just covers `size`.

    For a square size that is torchvision's `Resize(side)`: the shorter side becomes `side`.
    """

    def __init__(self, size: Size, interpolation: str) -> None:
        self.size = size
        self.resample = str_to_pil_interp("bilinear" if interpolation == "random" else interpolation)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Returns the resized image."""
        height, width = self.size
        if height * image.width >= width * image.height:
            width = height * image.width // image.height
        else:
            height = width * image.height // image.width
        return image.resize((width, height), self.resample)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size}, interpolation={self.resample.name})"


def weak(size: Size, interpolation: str) -> Transform:
    """A random part of 8 to 100 % of the area, resized, and flipped horizontally half of the time."""
    return Compose([*_crop_and_flip(size, interpolation), PILToTensor()])


def raug(size: Size, interpolation: str, *, magnitude: int) -> Transform:
    """`weak`, then the published RandAugment with magnitudes below `magnitude`."""
    return Compose([*_crop_and_flip(size, interpolation), published_rand_augment(magnitude), PILToTensor()])


def none(size: Size, interpolation: str) -> Transform:
    """No augmentation, as in evaluation."""
    return eval_transform(size, interpolation=interpolation)


def flip(size: Size, interpolation: str) -> Transform:
    """Flips horizontally half of the time, nothing else."""
    return Compose([eval_transform(size, interpolation=interpolation), RandomHorizontalFlip()])


def shift(size: Size, interpolation: str) -> Transform:
    """Shifts by up to an eighth of the size, for images that must not be mirrored, such as digits."""
    return Compose([*_shift(size, interpolation), PILToTensor()])


def crop(size: Size, interpolation: str) -> Transform:
    """Shifts by up to an eighth of the size and flips half of the time, as usual for CIFAR (4 of 32 pixels)."""
    return Compose([*_shift(size, interpolation), RandomHorizontalFlip(), PILToTensor()])


PRESETS: dict[str, Callable[[Size, str], Transform]] = {
    "none": none,
    "flip": flip,
    "weak": weak,
    "raug10": partial(raug, magnitude=10),
    "raug15": partial(raug, magnitude=15),
    "raug20": partial(raug, magnitude=20),
    "raug25": partial(raug, magnitude=25),
    "shift": shift,
    "crop": crop,
}


def _crop_and_flip(size: Size, interpolation: str) -> list[Callable]:
    return [RandomResizedCropAndInterpolation(size, interpolation=interpolation), RandomHorizontalFlip()]


def _shift(size: Size, interpolation: str) -> list[Callable]:
    height, width = size
    return [
        ResizeToCover(size, interpolation),
        CenterCrop(size),
        RandomCrop(size, padding=[width // 8, height // 8]),
    ]


def train_transform(size: Size, cfg: CfgNode, *, interpolation: str = "bilinear") -> Transform:
    """Returns the augmentation of a training image: a preset, or timm's pipeline where PRESET is None.

    `cfg` is the section AUG. timm's pipeline crops, flips, and then either follows the policy AUTO_AUGMENT or, where
    that is `none`, jitters brightness, contrast and saturation by up to COLOR_JITTER; with `3a` it does both. Up to 32
    pixels it shifts by up to 4 pixels where it would crop and zoom. Erasing happens later, on normalised batches.

    Raises ValueError for a policy that timm does not know.
    """
    if cfg.PRESET is not None:
        return PRESETS[cfg.PRESET](size, interpolation)
    return _timm_transform(size, interpolation, cfg.COLOR_JITTER, cfg.AUTO_AUGMENT)


def is_auto_augment_policy(text: str) -> bool:
    """Returns whether `text` has the form of a policy of timm, names one of torchvision, or is `none`.

    timm's parsers refuse some of what they do not know, and ignore the rest of it silently.
    """
    return text == "none" or text in _OF_TORCHVISION or _POLICY.fullmatch(text) is not None


def _timm_transform(size: Size, interpolation: str, color_jitter: float, auto_augment: str) -> Transform:
    assert is_auto_augment_policy(auto_augment)
    of_torchvision = _OF_TORCHVISION.get(auto_augment)
    try:
        pipeline = create_transform(
            size,
            is_training=True,
            use_prefetcher=True,  # in timm: stop at uint8; erasing and normalisation are done on the device
            color_jitter=None if of_torchvision else color_jitter,  # type: ignore[arg-type]  # None: no jitter
            auto_augment=None if of_torchvision or auto_augment == "none" else auto_augment,
            interpolation=interpolation,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"AUG.AUTO_AUGMENT {auto_augment!r} is no policy that timm knows ({error}): "
            "write one like rand-m9-mstd0.5-inc1, augmix-m3-w3, original-mstd0.5, 3a, or none"
        ) from error
    if of_torchvision:
        *before, to_tensor = pipeline.transforms
        resample = InterpolationMode.BICUBIC if interpolation == "bicubic" else InterpolationMode.BILINEAR
        pipeline = Compose([*before, of_torchvision(interpolation=resample), to_tensor])
    if max(size) <= SMALL:
        # The published code starts with RandomCrop alone; its images already have this size.
        shift_by_4 = [ResizeToCover(size, interpolation), CenterCrop(size), RandomCrop(size, padding=4)]
        pipeline = Compose([*shift_by_4, *pipeline.transforms[1:]])
    return pipeline


def eval_transform(size: Size, *, crop: bool = False, interpolation: str = "bilinear") -> Transform:
    """Returns the transform of a test image: resize so that it covers `size`, then cut out the centre.

    With `crop` it covers 256/224 of the size instead, so that the centre is about 3/4 of the image; the published
    accuracies are without. `random` interpolation is for training and means bilinear here.
    """
    height, width = size
    cover = (height * 256 // 224, width * 256 // 224) if crop else size
    return Compose([ResizeToCover(cover, interpolation), CenterCrop(size), PILToTensor()])


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
        """Returns the normalised pixels, a new tensor of the same shape."""
        assert images.dtype == torch.uint8
        assert images.shape[1] == self.mean.shape[1]
        return images.to(self.dtype).div_(255).sub_(self.mean).div_(self.std)

    def undo(self, images: Tensor) -> Tensor:
        """Returns the pixels, uint8, of normalised images (N, C, H, W); values beyond those of pixels are clipped."""
        pixels = (images.float() * self.std + self.mean).mul_(255)
        return pixels.nan_to_num_().round_().clamp_(0, 255).to(torch.uint8)
