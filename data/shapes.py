"""Ten geometric shapes, rendered on demand: a data set without files, classified by local structure."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .sources import SPLITS, ImageSource

SIDE = 32  # of an image, in pixels
SUPERSAMPLING = 4  # edges are drawn this many times larger and averaged down
COUNTS = {"train": 4000, "val": 2000}


class Shape(NamedTuple):
    """A polygon whose corners lie on a circle; lengths are in units of its radius.

    Attributes:
        corners: how many, evenly spaced.
        waist: where the middle of each side is drawn in to, which makes a star; 0 leaves the sides straight.
        hole: size of the same polygon that is cut out of the middle, which leaves an outline; 0 cuts nothing.
    """

    corners: int
    waist: float = 0.0
    hole: float = 0.0

    def outline(self, radius: float, angle: float) -> np.ndarray:
        """Returns the corners (N, 2) of the polygon around the origin, turned by `angle` in radians."""
        radii = [radius, radius * self.waist] if self.waist else [radius]
        turns = angle + np.linspace(0, 2 * np.pi, self.corners * len(radii), endpoint=False)
        return np.tile(radii, self.corners)[:, None] * np.stack([np.cos(turns), np.sin(turns)], axis=1)


ROUND = 64  # corners that make a circle at this resolution
CLASSES = {
    "disc": Shape(ROUND),
    "triangle": Shape(3),
    "square": Shape(4),
    "pentagon": Shape(5),
    "hexagon": Shape(6),
    "star4": Shape(4, waist=0.4),
    "star5": Shape(5, waist=0.4),
    "ring": Shape(ROUND, hole=0.6),
    "triangle outline": Shape(3, hole=0.6),
    "square outline": Shape(4, hole=0.6),
}


def coverage(shape: Shape, centre: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Returns the fraction of each pixel that a shape covers, (SIDE, SIDE); centre (x, y) and radius in pixels."""
    mask = Image.new("L", (SIDE * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(mask)
    for size, fill in ((1.0, 255), (shape.hole, 0)):
        if size:
            corners = SUPERSAMPLING * (centre + shape.outline(radius * size, angle))
            draw.polygon(corners.ravel().tolist(), fill=fill)
    return np.asarray(mask.reduce(SUPERSAMPLING)) / 255


def render(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Draws a shape at a random place, size and angle, in random colours and with noise: uint8 (SIDE, SIDE, 3)."""
    radius, angle = rng.uniform(6, 12), rng.uniform(0, 2 * np.pi)
    centre = rng.uniform(radius, SIDE - radius, 2)
    background = rng.uniform(0, 1, 3)
    foreground = (background + rng.uniform(0.3, 0.7, 3)) % 1  # so that they differ by 0.3 or more in each channel
    pixels = background + coverage(shape, centre, radius, angle)[..., None] * (foreground - background)
    pixels += rng.normal(0, 0.1, pixels.shape)
    return np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)


class ShapesSource(ImageSource):
    """4,000 images of 32x32 pixels, equally many of each of ten shapes; `val` has 2,000.

    An image depends on its split and its number alone, so that the data set is the same wherever it is rendered. All
    images of a split are rendered at once when it is opened, within a second or two: less than a cache would be worth.
    """

    def __init__(self, split: str) -> None:
        assert split in SPLITS
        self.classes = list(CLASSES)
        self.labels = np.arange(COUNTS[split], dtype=np.int64) % len(CLASSES)
        shapes = [CLASSES[self.classes[label]] for label in self.labels]
        seed = SPLITS.index(split)
        self._images = np.stack([render(shape, np.random.default_rng((seed, i))) for i, shape in enumerate(shapes)])
        self._name = f"shapes {split}"

    def _image(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])

    def locate(self, index: int) -> str:
        """Returns the number of the image in its split."""
        return f"{self._name} image {index}"
