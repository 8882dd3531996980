"""JPEG files by simplejpeg, which is optional: the pixels that Pillow decodes, bit for bit, in four fifths of the time.

Both use libjpeg-turbo; here the pixels are a tensor without another copy.
"""

from importlib.util import find_spec
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

Mode = Literal["L", "RGB", "RGBX"]  # of Pillow: grey, colour, four bands

REQUIREMENTS = "requirements-fast.txt"
COLOUR_SPACES: dict[Mode, str] = {"L": "GRAY", "RGB": "RGB", "RGBX": "RGBA"}
START_OF_IMAGE = b"\xff\xd8"
HUFFMAN_FRAMES = (0xC0, 0xC1)  # baseline and extended sequential
# Markers of any frame: 0xC4, 0xC8 and 0xCC lie among them and are others.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def is_installed() -> bool:
    """Returns whether simplejpeg is there."""
    return find_spec("simplejpeg") is not None


def decode_jpeg(content: bytes, mode: Mode) -> Tensor | None:
    """Decodes a common JPEG file, sequential, of 8 bits, grey or YCbCr, without a fault.

    Returns:
        uint8 (H, W, C), or None for everything else, which is left to Pillow: to decode it or to say what is wrong.
    """
    from simplejpeg import decode_jpeg, decode_jpeg_header

    if not _is_sequential(content):
        return None
    try:
        height, width, stored, _ = decode_jpeg_header(content)
        if not _is_common(stored, mode) or _is_too_large(int(height), int(width)):
            return None
        # Never `fastdct` and `fastupsample`: they change pixels. Warnings are errors by default.
        return torch.from_numpy(decode_jpeg(content, COLOUR_SPACES[mode]))
    except ValueError:
        return None


def _is_sequential(content: bytes) -> bool:
    """Returns whether the first frame is a sequential one with Huffman codes and 8 bits."""
    at = len(START_OF_IMAGE)
    while content[at : at + 1] == b"\xff" and at + 4 < len(content):
        marker = content[at + 1]
        if marker in FRAMES:
            return marker in HUFFMAN_FRAMES and content[at + 4] == 8
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return False


def _is_common(stored: str, mode: Mode) -> bool:
    # Pillow makes grey of red, green and blue, which is not always the brightness that a file in colour stores.
    return stored == "Gray" or (stored == "YCbCr" and mode != "L")


def _is_too_large(height: int, width: int) -> bool:
    """Returns whether Pillow has something to say about the number of pixels."""
    return Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS
