"""Pictures that tests draw: streets with their masks, patterns that tell classes apart, photographs; and files."""

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

ROAD, PERSON, CAR, RECTIFICATION = 7, 24, 26, 3  # label ids of Cityscapes; the last one is not evaluated


def write_street(root: Path, split: str, city: str, number: int, size: tuple[int, int] = (64, 96)) -> None:
    """Writes a grey background with a red rectangle and a blue disc, and its mask, as Cityscapes names them."""
    rng, (height, width) = np.random.default_rng([number, len(split)]), size
    mask = np.full(size, ROAD, dtype=np.uint8)
    y, x = np.mgrid[:height, :width]
    side = rng.integers(16, 28)
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2 - side)
    mask[top : top + side, left : left + side] = CAR
    centre = rng.integers(16, height - 16), rng.integers(width // 2 + 14, width - 14)
    mask[np.hypot(y - centre[0], x - centre[1]) < rng.integers(8, 14)] = PERSON
    mask[:2] = RECTIFICATION
    colours = {ROAD: (110, 110, 110), CAR: (200, 40, 40), PERSON: (40, 60, 200), RECTIFICATION: (0, 0, 0)}
    image = np.zeros((*size, 3), dtype=np.uint8)
    for label, colour in colours.items():
        image[mask == label] = colour
    noisy = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    name = f"{city}_{number:06}_000019"
    for kind, suffix, content in (("leftImg8bit", "leftImg8bit", noisy), ("gtFine", "gtFine_labelIds", mask)):
        folder = root / kind / split / city
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(folder / f"{name}_{suffix}.png")


def write_patterns(folder: Path, seed: int, count: int, side: int = 32) -> None:
    """Writes noisy images of a pattern of 4 x 4 colours that belongs to this folder alone."""
    rng = np.random.default_rng(seed)
    pattern = rng.integers(40, 216, (4, 4, 3)).repeat(side // 4, 0).repeat(side // 4, 1)
    folder.mkdir(parents=True)
    for number in range(count):
        noise = rng.normal(rng.normal(0, 10), 12, pattern.shape)
        Image.fromarray((pattern + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")


def photo(height: int, width: int, seed: int) -> Image.Image:
    """Returns what a photograph has: detail of every size, the finer the weaker, and hard edges."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0)
    side = max(height, width)
    for octave in range(1, 1 + int(np.log2(side + 1))):
        rows, columns = (max(1, round(2**octave * length / side)) for length in (height, width))
        for channel in range(3):
            layer = Image.fromarray(rng.normal(0, 90 / octave, (rows, columns)).astype(np.float32))
            pixels[..., channel] += layer.resize((width, height), Image.Resampling.BICUBIC)
    top, left = rng.integers(0, height), rng.integers(0, width)
    pixels[top : top + height // 3 + 1, left : left + width // 3 + 1] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """Returns the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Cuts off, overwrites, inserts or repeats; half of the damage is in the first bytes, where the structure is."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(min(len(damaged), rng.choice((64, len(damaged)))) or 1)
        match rng.randrange(5):
            case 0:
                del damaged[at:]
            case 1:
                damaged[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))])
            case 2:
                damaged[at : at + 4] = rng.randbytes(4)
            case 3:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 20))
            case _:
                damaged[at:at] = damaged[at : at + rng.randrange(1, 40)]
    return bytes(damaged)
