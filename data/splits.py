"""Divides the images of one split into train and val: a function of their names, their classes and a seed."""

import hashlib

import numpy as np
from yacs.config import CfgNode

from utils.text import shortened

from .pixels import DecodedImage
from .sources import EncodedSource, ImageSource


def is_divided(cfg: CfgNode) -> bool:
    """Returns whether `train` and `val` are parts of the training images; `cfg` is the section DATA."""
    return cfg.VAL_FRACTION > 0 or cfg.FOLDS > 0


def divide(source: ImageSource, cfg: CfgNode, split: str) -> ImageSource:
    """Returns the part of the images that is `train` or `val` under VAL_FRACTION, or under FOLDS and FOLD.

    Each class is divided on its own. Which images are held out depends on SPLIT_SEED and on the names of the images in
    the class: not on their order, their number in other classes, or where they lie.

    Raises:
        ValueError: a class is too small to be in both parts.
    """
    held_out = hold_out(source, cfg)
    return part_of(source, np.flatnonzero(held_out if split == "val" else ~held_out))


def hold_out(source: ImageSource, cfg: CfgNode) -> np.ndarray:
    """Returns which images are in `val`, bool (N,); raises ValueError as `divide`."""
    needed = cfg.FOLDS or 2
    held_out = np.zeros(len(source), dtype=bool)
    order = np.lexsort((_ranks(source, cfg.SPLIT_SEED), source.labels))
    ends = np.cumsum(np.bincount(source.labels))
    for label, images in enumerate(np.split(order, ends[:-1])):
        if 0 < len(images) < needed:
            raise ValueError(
                f"the class {shortened(repr(source.classes[label]))} is too small to divide, it has {len(images)} of "
                f"the {needed} images that it needs: add some, or leave the class out"
            )
        if cfg.FOLDS:
            first = (label + cfg.FOLD) % cfg.FOLDS
            held_out[images[first :: cfg.FOLDS]] = True
        elif len(images):
            held_out[images[: min(max(round(cfg.VAL_FRACTION * len(images)), 1), len(images) - 1)]] = True
    return held_out


def _ranks(source: ImageSource, seed: int) -> np.ndarray:
    """Returns random numbers, uint64 (N,), each a function of the seed and of the name of an image."""
    key = seed.to_bytes(8, "little")
    digests = (
        hashlib.blake2b(source.name(index).encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
        for index in range(len(source))
    )
    return np.frombuffer(b"".join(digests), dtype="<u8")


def part_of(source: ImageSource, indices: np.ndarray) -> ImageSource:
    """Returns the images of a source at these indices, int64 (M,), in this order."""
    return (EncodedPart if isinstance(source, EncodedSource) else Part)(source, indices)


class _Indexed(ImageSource):
    """Images of another source, at `indices`."""

    def __init__(self, whole: ImageSource, indices: np.ndarray) -> None:
        self._whole: ImageSource = whole
        self._indices = indices
        self.labels, self.classes = whole.labels[indices], whole.classes

    def name(self, index: int) -> str:
        """Returns the name of the image in the other source."""
        return self._whole.name(int(self._indices[index]))

    def locate(self, index: int) -> str:
        """Returns where the image comes from."""
        return self._whole.locate(int(self._indices[index]))


class Part(_Indexed):
    """A part of images that are decoded already."""

    def _image(self, index: int) -> DecodedImage:
        return self._whole._image(int(self._indices[index]))


class EncodedPart(_Indexed, EncodedSource):
    """A part of images that are stored as files of an image format."""

    _whole: EncodedSource

    def read(self, index: int) -> bytes:
        """Returns the bytes of an image file."""
        return self._whole.read(int(self._indices[index]))
