"""RandAugment: what is drawn for an image, and how Pillow applies it; `batch_randaugment` applies it to batches."""

import math
import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Any, NamedTuple, cast

from PIL import Image, ImageOps
from PIL.Image import Resampling
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform
from timm.data.transforms import str_to_pil_interp
from yacs.config import CfgNode

Colour = tuple[int, int, int]

BOTH = (Resampling.BILINEAR, Resampling.BICUBIC)
GREY = (128, 128, 128)
FULL_SCALE = 10  # the magnitude at which timm's operations reach their nominal range
CUTOUT_PIXELS = 40  # the side of the square at full scale
PER_LAYER = 7  # the random numbers of an operation
SMALLEST = (
    2.0**-54
)  # stands for the 0 that a generator gives once in 2**53 numbers: a normal quantile is infinite there

PUBLISHED_MAGNITUDES = {"raug10": 10, "raug15": 15, "raug20": 20, "raug25": 25}  # by preset
ENHANCEMENTS = ("Color", "Contrast", "Brightness", "Sharpness")
PUBLISHED_OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd"),
    *ENHANCEMENTS,
    *("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
    "Cutout",
)


def posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keeps the `bits` most significant bits of each channel: none leaves black, eight or more the image itself."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


# Pillow 13 refuses to keep 0 bits, which timm's policies ask for at the end of their range, the default one included.
for _name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
    NAME_TO_OP[_name] = posterize


class Operation(NamedTuple):
    """What is done to one image.

    Attributes:
        kind: `Cutout`, or a name that timm has an operation for.
        argument: of that operation; None for one without.
        resample: of a geometric operation, bilinear or bicubic.
        place: of a cutout, its centre as shares of the width and the height.
    """

    kind: str
    argument: float | None
    resample: Resampling
    place: tuple[float, float]

    def apply(self, image: Image.Image, fill: Colour) -> Image.Image:
        """Returns the RGB image after the operation; `fill` is the colour of pixels from outside."""
        if self.kind == "Cutout":
            assert self.argument is not None
            return cutout(image, int(self.argument), self.place)
        arguments = () if self.argument is None else (self.argument,)
        function: Any = NAME_TO_OP[self.kind]
        return cast(Image.Image, function(image, *arguments, fillcolor=fill, resample=self.resample))


# An operation's kind, and its argument as a function of the magnitude, in units of full scale, and of a random sign.
Level = tuple[str, Callable[[float, int], float] | None]


def _signed(most: float) -> Callable[[float, int], float]:
    return lambda level, sign: sign * (level * most)


def _enhancement(level: float, _sign: int) -> float:
    return level * 1.8 + 0.1


def _increasing_enhancement(level: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * (level * 0.9))


# timm's, by its names, and Cutout's. `Increasing` means that a larger magnitude changes the image more.
LEVELS: dict[str, Level] = {
    "AutoContrast": ("AutoContrast", None),
    "Equalize": ("Equalize", None),
    "Invert": ("Invert", None),
    "Rotate": ("Rotate", _signed(30.0)),  # degrees
    "ShearX": ("ShearX", _signed(0.3)),
    "ShearY": ("ShearY", _signed(0.3)),
    "TranslateXRel": ("TranslateXRel", _signed(0.45)),  # of the width
    "TranslateYRel": ("TranslateYRel", _signed(0.45)),
    "Posterize": ("Posterize", lambda level, _: int(level * 4)),
    "PosterizeIncreasing": ("Posterize", lambda level, _: 4 - int(level * 4)),
    "Solarize": ("Solarize", lambda level, _: min(256, int(level * 256))),
    "SolarizeIncreasing": ("Solarize", lambda level, _: 256 - min(256, int(level * 256))),
    "SolarizeAdd": ("SolarizeAdd", lambda level, _: min(128, int(level * 110))),
    **{kind: (kind, _enhancement) for kind in ENHANCEMENTS},
    **{f"{kind}Increasing": (kind, _increasing_enhancement) for kind in ENHANCEMENTS},
    "Cutout": ("Cutout", lambda level, _: max(2, int(level * CUTOUT_PIXELS))),  # pixels, the side of the square
}


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """A policy: a few random operations an image, of random strength (Cubuk et al., arXiv:1909.13719).

    Attributes:
        operations: the names to choose from, keys of `LEVELS`.
        weights: of the choice, which is then without replacement; None for a uniform one, with replacement.
        layers: how many operations an image gets.
        probability: that one of them is applied.
        magnitude: of the operations; `FULL_SCALE` is full scale.
        std: the standard deviation of the magnitude; infinite: uniform from 0 to `magnitude`.
        largest: the magnitude at which it is clipped.
        resamples: to choose the interpolation of a geometric operation from.
        fill: the colour of pixels from outside the image.
    """

    operations: Sequence[str]
    weights: Sequence[float] | None = None
    layers: int = 2
    probability: float = 1.0
    magnitude: float = FULL_SCALE
    std: float = 0.0
    largest: float = FULL_SCALE
    resamples: Sequence[Resampling] = BOTH
    fill: Colour = GREY

    @property
    def numbers(self) -> int:
        """How many random numbers `draw` takes."""
        return self.layers * PER_LAYER

    def draw(self, numbers: Sequence[float]) -> list[Operation]:
        """Returns the operations of an image, in order, for `self.numbers` uniform numbers from 0 to 1."""
        assert len(numbers) == self.numbers
        layers = [numbers[start : start + PER_LAYER] for start in range(0, self.numbers, PER_LAYER)]
        chosen = zip(self._choose([choice for choice, *_ in layers]), layers, strict=True)
        return [self._operation(name, *rest) for name, (_, applied, *rest) in chosen if applied <= self.probability]

    def _operation(self, name: str, size: float, sign: float, resample: float, *place: float) -> Operation:
        kind, argument = LEVELS[name]
        level = self._magnitude(size) / FULL_SCALE
        return Operation(
            kind,
            argument and argument(level, -1 if sign > 0.5 else 1),
            self.resamples[int(resample * len(self.resamples))],
            cast(tuple[float, float], place),
        )

    def _choose(self, numbers: Sequence[float]) -> list[str]:
        if self.weights is None:
            return [self.operations[int(number * len(self.operations))] for number in numbers]
        left, names = dict(zip(self.operations, self.weights, strict=True)), []
        for number in numbers:
            *bounds, total = accumulate(left.values())
            names.append(list(left)[bisect(bounds, number * total)])
            del left[names[-1]]
        return names

    def _magnitude(self, number: float) -> float:
        """Returns the magnitude at which the distribution function has this value."""
        magnitude = self.magnitude
        if math.isinf(self.std):
            magnitude *= number
        elif self.std > 0:
            magnitude = NormalDist(magnitude, self.std).inv_cdf(max(number, SMALLEST))
        return max(0.0, min(magnitude, self.largest))

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        """Draws from a generator, by default Python's own, and applies what was drawn to an RGB image."""
        draw = rng.random if rng else random.random
        for operation in self.draw([draw() for _ in range(self.numbers)]):
            image = operation.apply(image, self.fill)
        return image


def cutout(image: Image.Image, side: int, place: tuple[float, float]) -> Image.Image:
    """Paints a grey square of `side` pixels; what lies outside the image is cut off."""
    top, bottom, left, right = cutout_box(side, place, image.height, image.width)
    image = image.copy()
    image.paste(GREY, (left, top, right, bottom))
    return image


def cutout_box(side: int, place: tuple[float, float], height: int, width: int) -> tuple[int, int, int, int]:
    """Returns the square of `side` pixels around the pixel at a place: its top, bottom, left and right."""
    left, top = int(place[0] * width) - side // 2, int(place[1] * height) - side // 2
    return top, top + side, left, left + side


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
    return RandAugment(
        operations=PUBLISHED_OPERATIONS, magnitude=last, std=math.inf, largest=max(last, FULL_SCALE), fill=GREY
    )


def timm_rand_augment(text: str, interpolation: str) -> RandAugment:
    """Returns a policy in timm's notation, such as rand-m9-mstd0.5-inc1, as in timm's pipeline.

    Pixels from outside the image have ImageNet's mean colour; `interpolation` is that of the crop.

    Raises ValueError if timm does not know an option, or if more operations are drawn without replacement than there
    are.
    """
    try:
        parsed = rand_augment_transform(text)
    except (AssertionError, ValueError) as error:
        raise unknown_policy(text, str(error)) from error
    first, names, weights = parsed.ops[0], tuple(operation.name for operation in parsed.ops), parsed.choice_weights
    if weights is not None and parsed.num_layers > len(weights):
        raise unknown_policy(text, f"it draws {parsed.num_layers} different operations of {len(weights)}")
    red, green, blue = (round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
    return RandAugment(
        operations=names,
        weights=None if weights is None else tuple(weights),
        layers=parsed.num_layers,
        probability=first.prob,
        magnitude=first.magnitude,
        std=first.magnitude_std,
        largest=first.magnitude_max or FULL_SCALE,
        resamples=BOTH if interpolation == "random" else (str_to_pil_interp(interpolation),),
        fill=(red, green, blue),
    )


def is_rand_augment(policy: str) -> bool:
    """Returns whether a policy in timm's notation is a `RandAugment`.

    The operations of 3-Augment (rand-t3a, rand-t3aw) are not: they blur, and timm jitters the colours after them.
    """
    name, *options = policy.split("-")
    return name == "rand" and not {*options} & {"t3a", "t3aw"}


def rand_augment_of(cfg: CfgNode, interpolation: str) -> RandAugment | None:
    """Returns the policy of the section AUG, a preset raug* or AUTO_AUGMENT rand-*; None where it has another or none.

    Raises ValueError as `timm_rand_augment`.
    """
    if cfg.PRESET is not None:
        magnitude = PUBLISHED_MAGNITUDES.get(cfg.PRESET)
        return None if magnitude is None else published_rand_augment(magnitude)
    return timm_rand_augment(cfg.AUTO_AUGMENT, interpolation) if is_rand_augment(cfg.AUTO_AUGMENT) else None


def unknown_policy(text: str, reason: str) -> ValueError:
    """Returns the error for a policy that timm refuses."""
    return ValueError(
        f"AUG.AUTO_AUGMENT {text!r} is no policy that timm knows ({reason}): "
        "write one like rand-m9-mstd0.5-inc1, augmix-m3-w3, original-mstd0.5, 3a, or none"
    )
