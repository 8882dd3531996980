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

BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF

# Damaged metadata is no reason for lines on the console, one for each such image and worker.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Decoder:
    """Decodes image files, JPEG files with the library of this name; see `build_decoder`."""

    name: str = PILLOW
    mode: jpeg.Mode = "RGB"

    def __call__(self, content: bytes) -> DecodedImage:
        """Decodes the bytes of an image file; raises as `decode_image`, which decodes what simplejpeg leaves to it."""
        pixels = jpeg.decode_jpeg(content, self.mode) if self.name == SIMPLEJPEG else None
        return decode_image(content, self.mode) if pixels is None else pixels

    def __str__(self) -> str:
        hint = f" (simplejpeg would be faster: pip install -r {jpeg.REQUIREMENTS})"
        return self.name if self.name == SIMPLEJPEG or jpeg.is_installed() else self.name + hint


def build_decoder(name: str, mode: jpeg.Mode = "RGB") -> Decoder:
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
    return Decoder(name, mode)


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
    """Converts an image to a mode; raises ValueError for pixels of unknown range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _to_8_bits(image).convert(mode)
    if image.mode in ("I", "F"):
        kind = "32-bit float" if image.mode == "F" else "signed or 32-bit integer"
        raise ValueError(f"{kind} pixels have no known range: convert to 8 or 16 bit")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert(mode)  # Pillow warns of the direct way
    return image.convert(mode)


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
