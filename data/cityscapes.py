"""Cityscapes: street scenes with a class for each pixel."""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.files import user_path
from utils.text import printable

from .decode import decode_image, image_file
from .sources import IGNORED, SPLITS, Source

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


class CityscapesSource(Source):
    """The images in `root/leftImg8bit/<split>/<city>/` with their masks in `root/gtFine/<split>/<city>/`.

    Label ids become training ids; classes that are not evaluated become `IGNORED`.

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
        """Returns the image in `mode` and its mask, uint8 (H, W) of training ids; raises OSError or ValueError."""
        image = decode_image(self._images[index].read_bytes(), self.mode)
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
