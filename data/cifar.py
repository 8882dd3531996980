"""CIFAR-10 and CIFAR-100, read by torchvision."""

from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from utils.files import user_path

from .sources import SPLITS, ImageSource


class CifarSource(ImageSource):
    """CIFAR-10 or CIFAR-100 in its python version, 32x32 pixels; `val` is its test part.

    `reader` is torchvision's, which checks the files. With `download` missing files are downloaded; let one process do
    so before the others.
    """

    def __init__(self, reader: type[CIFAR10], root: str | Path, split: str, *, download: bool = False) -> None:
        assert split in SPLITS
        folder = user_path(root) / reader.base_folder
        name = reader.__name__.replace("CIFAR", "CIFAR-")
        try:
            cifar = reader(folder.parent, train=split == "train", download=download)
        except RuntimeError as error:  # torchvision raises it for missing and damaged files
            raise ValueError(
                f"{name} is missing or damaged in {folder}: "
                "set DATA.DATA_PATH to the folder that holds it, or DATA.DOWNLOAD True to fetch it"
            ) from error
        self.classes = list(cifar.classes)
        self._images: np.ndarray = cifar.data
        self.labels = np.array(cifar.targets, dtype=np.int64)
        self._name = f"{name} {split}"

    def _image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def locate(self, index: int) -> str:
        """Returns the number of the image in its part of CIFAR."""
        return f"{self._name} image {index}"
