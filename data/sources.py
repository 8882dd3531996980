"""What every data set is: stored images with their labels."""

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.text import printable

from .decode import Decoder, to_mode
from .jpeg import Mode
from .pixels import DecodedImage

SPLITS = ("train", "val")
WHOLE = "whole"  # in place of a split: all training images, to be divided (`splits.py`)
IGNORED = 255  # in a mask, a pixel without a class
# Data paths that are words: data sets that come with the project.
DIGITS, SHAPES = "digits", "shapes"


def stored_split(split: str) -> str:
    """Returns the split whose files are read: of the whole, that of the training images."""
    return "train" if split == WHOLE else split


class Source(ABC):
    """Images as they are stored, each with what is known of it, before any transform.

    `classes` holds the class names in the order of the labels, so that its length is the number of classes. `notes` are
    lines for the log on how the images were found, where that needs saying. `decoder` is that of image files, if any.
    """

    classes: list[str]
    mode: Mode = "RGB"  # of the images, one of `decode.MODES`; `open_source` sets it
    notes: tuple[str, ...] = ()
    decoder: Decoder | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[DecodedImage, Any]:
        """Returns the image in `mode`, Pillow's or a uint8 tensor (H, W, C), and its label.

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
        """Returns the image in `mode` and its label; raises OSError or ValueError if it cannot be read or decoded."""
        image = self._image(index)
        if isinstance(image, Image.Image) and image.mode != self.mode:
            image = to_mode(image, self.mode)
        return image, int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns what identifies the image wherever the data set lies: its path within that, or its number."""
        return str(index)

    @abstractmethod
    def _image(self, index: int) -> DecodedImage:
        """Returns the image, Pillow's in any mode that can be converted; raises as `load` does."""


class EncodedSource(ImageSource):
    """Images that are stored as files of an image format, wherever; a subclass returns the bytes of one in `read`."""

    decoder = Decoder()  # `open_source` chooses

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file; raises OSError or ValueError where they can't be read."""

    def _image(self, index: int) -> DecodedImage:
        return self.decoder(self.read(index), self.mode)


class FileSource(EncodedSource):
    """Images in files of their own. `paths` are theirs, relative to `folder` or absolute."""

    folder: Path
    paths: "PackedStrings"

    def read(self, index: int) -> bytes:
        """Returns the bytes of the file."""
        # pathlib takes 5 us longer
        with open(os.path.join(self.folder, self.paths[index]), "rb", buffering=0) as file:
            return file.read()

    def name(self, index: int) -> str:
        """Returns the path of the file below the folder."""
        return self.paths[index]

    def locate(self, index: int) -> str:
        """Returns the path of the file."""
        return printable(os.path.join(self.folder, self.paths[index]))  # pathlib keeps every name for ever


class PackedStrings:
    """Many strings in two arrays instead of a million objects: forked workers share them, and others receive them fast.

    `content`, uint8, has them one after the other in UTF-8, and `ends`, int64, where each one begins and the last ends.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        content, ends = bytearray(), array("q", [0])
        for string in strings:
            content += string.encode("utf-8", "surrogatepass")
            ends.append(len(content))
        self.content, self.ends = np.frombuffer(content, dtype=np.uint8), np.frombuffer(ends, dtype=np.int64)

    @classmethod
    def of(cls, content: np.ndarray, ends: np.ndarray) -> "PackedStrings":
        """Returns the strings that these arrays hold, which are not copied."""
        packed = cls()
        packed.content, packed.ends = content, ends
        return packed

    @classmethod
    def split(cls, content: bytes | bytearray) -> "PackedStrings":
        """Returns the strings that each end with a NUL character, without making one object of each."""
        terminated = np.frombuffer(content, dtype=np.uint8)
        is_end = terminated == 0
        ends = np.flatnonzero(is_end)
        return cls.of(terminated[~is_end], np.concatenate(([0], ends - np.arange(len(ends)))))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.content[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))
