"""From a PIL image to a uint8 tensor, with or without augmentation, and on to normalised pixels.

Batches travel as uint8, which is a quarter of the memory traffic of float32; `Normalize` runs on the device.
"""

import re
from collections.abc import Callable, Sequence
from typing import cast

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor, nn
from torchvision.transforms import CenterCrop, Compose, PILToTensor, RandomCrop, RandomHorizontalFlip
from yacs.config import CfgNode

from .randaugment import rand_augment_of, unknown_policy

Size = tuple[int, int]  # height, width in pixels
Transform = Callable[[Image.Image], Tensor]  # RGB image -> uint8 (3, height, width)

INTERPOLATIONS = ("bilinear", "bicubic", "random")
SMALL = 32  # images of at most this side are shifted rather than cropped and zoomed, as published for CIFAR

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


# Those named raug* also apply the published RandAugment.
PRESETS: dict[str, Callable[[Size, str], Transform]] = {
    "none": none,
    "flip": flip,
    "weak": weak,
    "raug10": weak,
    "raug15": weak,
    "raug20": weak,
    "raug25": weak,
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


def train_transform(
    size: Size, cfg: CfgNode, *, interpolation: str = "bilinear", rand_augment: bool = True
) -> Transform:
    """Returns the augmentation of a training image: a preset, or timm's pipeline where PRESET is None.

    `cfg` is the section AUG. timm's pipeline crops, flips, and then either follows the policy AUTO_AUGMENT or, where
    that is `none`, jitters brightness, contrast and saturation by up to COLOR_JITTER. Up to 32 pixels it shifts by up
    to 4 pixels where it would crop and zoom. Erasing happens later, on normalised batches. RandAugment comes last;
    without `rand_augment` it is left to the device.

    Raises ValueError for a policy that timm does not know.
    """
    policy = rand_augment_of(cfg, interpolation)
    if cfg.PRESET is not None:
        pipeline = PRESETS[cfg.PRESET](size, interpolation)
    elif policy is not None:
        pipeline = _timm_transform(size, interpolation, None, "none")
    else:
        pipeline = _timm_transform(size, interpolation, cfg.COLOR_JITTER, cfg.AUTO_AUGMENT)
    if policy is None or not rand_augment:
        return pipeline
    *geometry, to_tensor = cast(Compose, pipeline).transforms
    return Compose([*geometry, policy, to_tensor])


def is_auto_augment_policy(text: str) -> bool:
    """Returns whether `text` has the form of a policy of timm, or is `none`.

    timm's parsers refuse some of what they do not know, and ignore the rest of it silently.
    """
    return text == "none" or _POLICY.fullmatch(text) is not None


def _timm_transform(size: Size, interpolation: str, color_jitter: float | None, auto_augment: str) -> Transform:
    assert is_auto_augment_policy(auto_augment)
    try:
        pipeline = create_transform(
            size,
            is_training=True,
            use_prefetcher=True,  # in timm: stop at uint8; erasing and normalisation are done on the device
            color_jitter=color_jitter,  # type: ignore[arg-type]  # timm's annotation lacks its None
            auto_augment=None if auto_augment == "none" else auto_augment,
            interpolation=interpolation,
        )
    except (AssertionError, ValueError) as error:
        raise unknown_policy(auto_augment, str(error)) from error
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
        return images.to(self.dtype).div_(255).sub_(self.mean).div_(self.std)
