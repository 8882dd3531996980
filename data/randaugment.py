"""The RandAugment policy of the published recipes, on timm's implementation."""

import random
from typing import Any

from PIL import Image, ImageOps
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, RandAugment, rand_augment_transform

GREY = (128, 128, 128)
FULL_SCALE = 10  # the magnitude at which timm's operations reach their nominal range
CUTOUT_PIXELS = 40  # the side of the square at full scale

PUBLISHED_OPERATIONS = [
    *("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
    *("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
    "Cutout",
]


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps the `bits` most significant bits of each channel: none leaves black, eight or more the image itself."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def cutout(image: Image.Image, side: int, **_: Any) -> Image.Image:
    """Paints a grey square of `side` pixels around a pixel drawn uniformly; what lies outside the image is cut off."""
    left = random.randrange(image.width) - side // 2
    top = random.randrange(image.height) - side // 2
    image = image.copy()
    image.paste(GREY, (left, top, left + side, top + side))
    return image


def _cutout_side(magnitude: float, _hparams: dict[str, Any]) -> tuple[int]:
    """Returns the side in pixels, at least 2, of the square at a magnitude."""
    return (max(2, int(magnitude / FULL_SCALE * CUTOUT_PIXELS)),)


# Pillow 13 refuses to keep 0 bits, which timm's policies ask for at the end of their range, the default one included.
for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    NAME_TO_OP[_name] = posterize
NAME_TO_OP["Cutout"], LEVEL_TO_ARG["Cutout"] = cutout, _cutout_side


def published_rand_augment(magnitude: int) -> RandAugment:
    """Returns the published policy `raug<magnitude>`: two operations an image, always applied.

    Each is drawn uniformly from sixteen (with replacement), as is its magnitude from 0 to `magnitude` - 1, where 10
    is full scale and nothing is clipped at it. Pixels from outside the image are grey; geometric operations
    interpolate bilinearly or bicubically at random, independently of the crop.

    It differs from the published policy in these points. Magnitudes are real numbers where the published ones are
    integers (same range, same mean). SolarizeAdd adds at most 128; the published one adds 11 per magnitude without a
    limit. The published Cutout was never released: colour and placement of the square are chosen here. Posterizing
    to 0 bits, on which the published code fails under Pillow 13, gives black, as it did under older versions.
    """
    last = magnitude - 1
    config = f"rand-m{last}-n2-p1.0-mstd101-mmax{max(last, FULL_SCALE)}-inc0"  # mstd > 100: uniform, not normal
    return rand_augment_transform(config, {"img_mean": GREY}, transforms=PUBLISHED_OPERATIONS)
