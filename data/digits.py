"""The embedded digits."""

from pathlib import Path

import numpy as np
from PIL import Image

from .sources import SPLITS, ImageSource


class DigitsSource(ImageSource):
    """The 1,797 scanned digits of 8x8 pixels that come with the project; every fifth one is in `val`.

    They are the test part of the UCI data set "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak;
    CC BY 4.0) as scikit-learn ships it; `digits.npz` carries its origin and licence along.
    """

    FILE = Path(__file__).with_name("digits.npz")

    def __init__(self, split: str) -> None:
        assert split in SPLITS
        with np.load(self.FILE, allow_pickle=False) as stored:
            images, labels = stored["images"], stored["labels"]
        held_out = np.arange(len(labels)) % 5 == 4
        self._numbers = np.flatnonzero(held_out if split == "val" else ~held_out)
        self._images = np.rint(images[self._numbers] * (255 / 16)).astype(np.uint8)  # stored as 0..16
        self.labels = labels[self._numbers].astype(np.int64)
        self.classes = [str(digit) for digit in range(10)]

    def _image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def locate(self, index: int) -> str:
        """Returns the number of the image among all 1,797, from 0."""
        return f"digits image {self._numbers[index]}"
