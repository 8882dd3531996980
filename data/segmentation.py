"""Images with a class for each pixel: Cityscapes from its folders, and transforms of image and mask together."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resize, to_image

from utils.files import user_path
from utils.text import printable

from .decode import decode_rgb, image_file
from .loaders import TransformedDataset
from .sources import SPLITS, Source
from .transforms import Size

IGNORED = 255  # in a mask, a pixel that neither trains nor counts
# The label id of each class that is evaluated, in the order of the training ids 0 to 18.
CITYSCAPES = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
IMAGE_SUFFIX, MASK_SUFFIX = "_leftImg8bit.png", "_gtFine_labelIds.png"
# RGB image, uint8 mask of training ids -> uint8 (3, H, W), int64 (H, W).
JointTransform = Callable[[Image.Image, np.ndarray], tuple[Tensor, Tensor]]


class CityscapesSource(Source):
    """The images in `root/leftImg8bit/<split>/<city>/` with their masks in `root/gtFine/<split>/<city>/`.

    Label ids become training ids, those that are not evaluated `IGNORED`.

    Raises ValueError for a missing or empty folder, and for an image without a mask.
    """

    def __init__(self, root: str | Path, split: str) -> None:
        assert split in SPLITS
        self.classes = list(CITYSCAPES)
        root = user_path(root)
        folder = root / "leftImg8bit" / split
        self._images = sorted(folder.glob(f"[!.]*/[!.]*{IMAGE_SUFFIX}"))
        if not self._images:
            raise ValueError(
                f"no images at {folder}/<city>/*{IMAGE_SUFFIX}: a Cityscapes folder holds leftImg8bit/ and gtFine/"
            )
        self._masks = [
            root / "gtFine" / split / path.parent.name / f"{path.name.removesuffix(IMAGE_SUFFIX)}{MASK_SUFFIX}"
            for path in self._images
        ]
        missing = [path for path in self._masks if not path.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self._masks)} images have no mask, the first is {missing[0]}")
        self._training_ids = np.full(256, IGNORED, dtype=np.uint8)
        self._training_ids[list(CITYSCAPES.values())] = np.arange(len(CITYSCAPES))

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """Returns the image in RGB and its mask, uint8 (H, W) of training ids; raises OSError or ValueError."""
        with self._images[index].open("rb") as file:
            image = decode_rgb(file)
        with self._masks[index].open("rb") as file, image_file(file) as mask:
            if mask.mode != "L":
                raise ValueError(f"{printable(self._masks[index])} holds {mask.mode} pixels instead of 8-bit label ids")
            ids = self._training_ids[np.asarray(mask)]
        if ids.shape != (image.height, image.width):
            raise ValueError(f"its mask is {ids.shape[0]}x{ids.shape[1]}, the image {image.height}x{image.width}")
        return image, ids

    def locate(self, index: int) -> str:
        """Returns the path of the image."""
        return printable(self._images[index])


class MaskedDataset(TransformedDataset):
    """Images and masks under a `JointTransform`, whose random draws depend on (seed, epoch, index) alone."""

    def transformed(self, image: Image.Image, label: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns the image, uint8 (3, H, W), and its mask, int64 (H, W)."""
        return self.transform(image, label)


class RandomScale:
    """Resizes image and mask by a factor that is uniform in a range, as in the usual training on Cityscapes."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image, resized bilinearly, and the mask, resized to the nearest label."""
        factor = random.uniform(self.low, self.high)
        size = [max(1, round(side * factor)) for side in image.shape[-2:]]
        return resize(image, size), resize(mask, size)


def segmentation_train_transform(size: Size, scale: tuple[float, float] = (0.5, 2.0)) -> JointTransform:
    """Scales at random, cuts out a part of `size` at random, and flips half of the time.

    What lies outside of the image is the mean colour, and `IGNORED` in the mask.
    """
    colour = [round(255 * channel) for channel in IMAGENET_DEFAULT_MEAN]
    fill: dict = {tv_tensors.Image: colour, tv_tensors.Mask: IGNORED}
    cut = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    return _joint(v2.Compose([RandomScale(*scale), cut, v2.RandomHorizontalFlip()]))


def segmentation_eval_transform() -> JointTransform:
    """The whole image as it is."""
    return _joint(lambda image, mask: (image, mask))


def _joint(transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> JointTransform:
    """Applies a transform of torchvision's tensors to an image and a mask as a source gives them."""

    def apply(image: Image.Image, mask: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels, labels = transform(to_image(image), tv_tensors.Mask(torch.from_numpy(mask)))
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor).long()

    return apply
