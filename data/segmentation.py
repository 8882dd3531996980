"""Transforms of an image and its mask together, and the data set that applies them."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize

from utils.seed import keyed_rng

from .loaders import TransformedDataset
from .pixels import DecodedImage, Size, to_tensor
from .sources import IGNORED

# Image, uint8 mask of training ids, generator to draw from -> uint8 (C, H, W), int64 (H, W).
JointTransform = Callable[[DecodedImage, np.ndarray, random.Random], tuple[Tensor, Tensor]]


class MaskedDataset(TransformedDataset):
    """Images and masks under a `JointTransform`, whose random numbers depend on (seed, epoch, index) alone."""

    def transformed(self, image: DecodedImage, label: np.ndarray, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Returns the image, uint8 (C, H, W), and its mask, int64 (H, W)."""
        return self.transform(image, label, rng)


class RandomScale:
    """Resizes image and mask by a factor that is uniform in a range, as in the usual training on Cityscapes."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image, resized bilinearly, and the mask, resized to the nearest label."""
        factor = random.uniform(self.low, self.high)
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        return resize(image, size), resize(mask, size)


def segmentation_train_transform(
    size: Size, scale: tuple[float, float] = (0.5, 2.0), mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
) -> JointTransform:
    """Scales at random, crops `size` at random, and flips half of the time.

    Padding has the mean colour, given on a scale of 0 to 1, and `IGNORED` in the mask.
    """
    colour = [round(255 * channel) for channel in mean]
    fill: dict = {tv_tensors.Image: colour, tv_tensors.Mask: IGNORED}
    cut = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    return _joint(v2.Compose([RandomScale(*scale), cut, v2.RandomHorizontalFlip()]))


def segmentation_eval_transform(size: Size | None = None) -> JointTransform:
    """The whole image: as it is, or resized to exactly `size`, bilinearly, and its mask to the nearest label."""
    return _joint(v2.Identity() if size is None else v2.Resize(size))


def _joint(transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> JointTransform:
    """Applies a transform of torchvision's tensors to an image and a mask as a source returns them."""

    def apply(image: DecodedImage, mask: np.ndarray, rng: random.Random) -> tuple[Tensor, Tensor]:
        with keyed_rng(rng.getrandbits(64)):  # torchvision draws from the global generators
            pixels, labels = transform(tv_tensors.Image(to_tensor(image)), tv_tensors.Mask(torch.from_numpy(mask)))
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor).long()

    return apply
