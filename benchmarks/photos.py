"""JPEG files for benchmarks that cost what ImageNet's photographs cost to read and decode: sizes, bytes, detail."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Width and height in pixels, and the share of the photographs: about those of ImageNet.
SIZES = {
    (500, 375): 0.46,
    (500, 333): 0.18,
    (375, 500): 0.14,
    (333, 500): 0.05,
    (500, 500): 0.05,
    (640, 480): 0.05,
    (400, 300): 0.05,
    (800, 600): 0.02,
}
QUALITY = 95
OBJECTS = 220  # overlapping shapes of a photograph, whose radii follow a power law
TEXTURE, GRAIN = 28.0, 7.0  # standard deviations of brightness, of 255, in a photograph of medium detail


def write_photos(folder: Path, count: int, classes: int = 10) -> None:
    """Writes `count` photographs to `folder/<class>/`, the same ones every time."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = list(SIZES)[rng.choice(len(SIZES), p=list(SIZES.values()))]
        path = folder / f"class{number % classes}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(rng, width, height, detail=rng.uniform(0.1, 2.1)).save(path, quality=QUALITY)


def photo(rng: np.random.Generator, width: int, height: int, detail: float) -> Image.Image:
    """Returns a picture with the statistics of a photograph.

    It has edges, of shapes of every size that hide each other ("dead leaves"), texture whose power falls with its
    frequency, grain, and the blur of a lens.
    """
    pixels = np.asarray(shapes(rng, width, height).filter(ImageFilter.GaussianBlur(0.7)), dtype=np.float32)
    brightness = TEXTURE * texture(rng, width, height) + GRAIN * rng.standard_normal((height, width), dtype=np.float32)
    return Image.fromarray((pixels + detail * brightness[..., None]).clip(0, 255).astype(np.uint8))


def shapes(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Returns polygons in muted colours, the large ones behind the small ones."""
    image = Image.new("RGB", (width, height), tuple(rng.integers(40, 216, 3).tolist()))
    draw = ImageDraw.Draw(image)
    radii = (8 * (1 - rng.random(OBJECTS)) ** -0.7).clip(max=height / 2)
    for radius in sorted(radii, reverse=True):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
        lengths = radius * rng.uniform(0.6, 1, len(angles))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        corners = np.stack([x + lengths * np.cos(angles), y + lengths * np.sin(angles)], 1)
        colour = (rng.uniform(15, 240) + rng.normal(0, 30, 3)).clip(0, 255).astype(int)
        draw.polygon([tuple(corner) for corner in corners.tolist()], fill=tuple(colour.tolist()))
    return image


def texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns noise (height, width) of standard deviation 1, on every scale, the weaker the finer."""
    total = np.zeros((height, width), dtype=np.float32)
    longest, side, strength = max(width, height), 4, 1.0
    while side < longest:
        rows, columns = (max(2, side * length // longest) for length in (height, width))
        coarse = strength * rng.standard_normal((rows, columns), dtype=np.float32)
        total += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        side, strength = 2 * side, 0.62 * strength
    return total / total.std()
