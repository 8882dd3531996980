"""What every data set is: stored images with their labels."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from .decode import Decoder
from .pixels import DecodedImage

SPLITS = ("train", "val")
IGNORED = 255  # in a mask, a pixel without a class
# Data paths that are words: data sets that come with the project.
DIGITS, SHAPES = "digits", "shapes"


class Source(ABC):
    """Images as they are stored, each with what is known of it, before any transform.

    `classes` holds the class names in the order of the labels, so that its length is the number of classes. `notes` are
    lines for the log on how the images were found, where that needs saying. `decoder` is that of image files, if any.
    """

    classes: list[str]
    notes: tuple[str, ...] = ()
    decoder: Decoder | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[DecodedImage, Any]:
        """Returns the image in RGB, Pillow's or a uint8 tensor (H, W, C), and its label.

        Raises OSError or ValueError where it cannot be read or decoded.
        """

    @abstractmethod
    def locate(self, index: int) -> str:
        """Returns where the image comes from (`path/to/cat.jpg`, `digits image 17`), printable, for messages."""


class ImageSource(Source):
    """Images with one label each.

    `labels` is int64 (N,). A subclass sets it and `classes`, reads an image in `_image` and says in `locate` where it
    comes from.
    """

    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[DecodedImage, int]:
        """Returns the image in RGB and its label; raises OSError or ValueError where it cannot be read or decoded."""
        return self._image(index), int(self.labels[index])

    @abstractmethod
    def _image(self, index: int) -> DecodedImage:
        """Returns the image in RGB; raises as `load` does."""


class EncodedSource(ImageSource):
    """Images that are stored as files of an image format, wherever; a subclass returns the bytes of one in `_read`."""

    decoder = Decoder()  # `open_source` chooses

    @abstractmethod
    def _read(self, index: int) -> bytes:
        """Returns the bytes of an image file; raises OSError or ValueError where they can't be read."""

    def _image(self, index: int) -> DecodedImage:
        return self.decoder(self._read(index))


class PackedStrings:
    """Many strings in two objects instead of a million: forked workers share them, and others receive them quickly."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.fromiter(accumulate(map(len, encoded), initial=0), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self._bytes[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))
