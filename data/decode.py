"""Decodes image files: which formats are read, by which library, and the errors for other bytes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from . import jpeg
from .pixels import DecodedImage

# The formats that are decoded, by content, and the extensions of the images in an image folder.
# Pillow knows many more, among them EPS, for which it starts another program.
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),  # and several in one file, MPO
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
if "avif" in features.get_supported_modules():
    FORMATS["AVIF"] = (".avif",)
EXTENSIONS = tuple(ending for endings in FORMATS.values() for ending in endings)

AUTO, SIMPLEJPEG, PILLOW = "auto", "simplejpeg", "pillow"
JPEG_DECODERS = (AUTO, SIMPLEJPEG, PILLOW)

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO, SAMPLES_PER_PIXEL = 258, 262, 0, 277  # tags of TIFF

# Pillow's mode for images of 1, 3 and 4 channels. Of RGBA it would resize the first three bands weighted by the fourth,
# which need not be transparency.
MODES: dict[int, jpeg.Mode] = {1: "L", 3: "RGB", 4: "RGBX"}

# Damaged metadata is no reason for lines on the console, one for each such image and worker.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Decoder:
    """Decodes image files, JPEG files with the library of this name; see `build_decoder`."""

    name: str = PILLOW

    def __call__(self, content: bytes, mode: jpeg.Mode = "RGB") -> DecodedImage:
        """Decodes the bytes of an image file; raises as `decode_image`, which decodes what simplejpeg leaves to it."""
        pixels = jpeg.decode_jpeg(content, mode) if self.name == SIMPLEJPEG else None
        return decode_image(content, mode) if pixels is None else pixels

    def __str__(self) -> str:
        hint = f" (simplejpeg would be faster: pip install -r {jpeg.REQUIREMENTS})"
        return self.name if self.name == SIMPLEJPEG or jpeg.is_installed() else self.name + hint


def build_decoder(name: str) -> Decoder:
    """Builds the decoder of this name in `JPEG_DECODERS`; `auto` is simplejpeg where it is installed.

    Raises:
        ValueError: simplejpeg is not installed.
    """
    if name == SIMPLEJPEG and not jpeg.is_installed():
        raise ValueError(
            f"DATA.DECODER {SIMPLEJPEG} needs the package simplejpeg: pip install -r {jpeg.REQUIREMENTS}, or set it "
            f"to {AUTO} or {PILLOW}"
        )
    if name == AUTO:
        name = SIMPLEJPEG if jpeg.is_installed() else PILLOW
    return Decoder(name)


@contextmanager
def image_file(file: BinaryIO) -> Iterator[Image.Image]:
    """Opens an image, of an animation the first one; its pixels are to be decoded within the `with`.

    Raises:
        OSError, ValueError: the image can't be decoded.
    """
    try:
        with Image.open(file, formats=list(FORMATS)) as image:
            yield image
    except UnidentifiedImageError:  # its text is not reproducible
        raise ValueError(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except (OSError, ValueError):
        raise
    except Exception as error:  # a decoder may raise anything for damaged bytes
        raise ValueError(f"not a readable image ({type(error).__name__}: {error})") from error


def decode_image(content: bytes, mode: jpeg.Mode = "RGB") -> Image.Image:
    """Decodes the bytes of an image file with Pillow; raises as `image_file` and `to_mode`."""
    with image_file(BytesIO(content)) as image:
        return to_mode(image, mode)


def to_mode(image: Image.Image, mode: jpeg.Mode = "RGB") -> Image.Image:
    """Converts an image to a mode.

    Raises:
        ValueError: its pixels have an unknown range, or Pillow has not decoded its fourth band.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _to_8_bits(image)
    if image.mode in ("I", "F"):
        kind = "32-bit float" if image.mode == "F" else "signed or 32-bit integer"
        raise ValueError(f"{kind} pixels have no known range: convert to 8 or 16 bit")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way to others
    return _to_four_bands(image) if mode == MODES[4] else image.convert(mode)


def _to_four_bands(image: Image.Image) -> Image.Image:
    """Returns the four bands of an image as they are, or its colours and, as the fourth, its opacity."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "RGB" and tags.get(SAMPLES_PER_PIXEL, 3) > 3:
        raise ValueError("a fourth band of unspecified kind can't be read: store the image as RGBA")
    if image.mode not in ("RGBA", MODES[4]):
        image = (image.convert("RGB") if image.mode == "CMYK" else image).convert("RGBA")
    return Image.merge(MODES[4], image.split())


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Converts grey pixels of up to 16 bits to 8 bits, rounded."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    values: np.ndarray = np.asarray(image).astype(np.uint16)
    if tags.get(BITS_PER_SAMPLE) == (12,):
        values = values << 4 | values >> 8
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = ~values
    steps, rest = np.divmod(values, 257)  # 65535 = 255 * 257
    return Image.fromarray((steps + (rest > 128)).astype(np.uint8))
