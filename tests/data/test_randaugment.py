"""RandAugment with Pillow: what is drawn, and what it does, beside timm's."""

import math
import pickle
import random
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Resampling
from settings import settings
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, rand_augment_transform

from data import is_rand_augment
from data.randaugment import (
    GREY,
    LEVELS,
    PUBLISHED_MAGNITUDES,
    PUBLISHED_OPERATIONS,
    Operation,
    RandAugment,
    cutout,
    posterize,
    published_rand_augment,
    rand_augment_of,
    timm_rand_augment,
)
from utils.seed import keyed_rng, keyed_uniforms

POLICIES = [
    "rand",
    "rand-m9-mstd0.5-inc1",
    "rand-m15-n3-p1-mstd101-mmax30",
    "rand-m5-tweights",
    "rand-n4-tweights-inc1",
]
ODDS = {"Invert": 0.6, "Equalize": 0.3, "Rotate": 0.1}
TIMM_NAMES = LEVELS.keys() - {"Cutout"}


def noise_image(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def drawn(policy: RandAugment, count: int) -> list[list[Operation]]:
    """What is drawn for the first images of a data set."""
    return [policy.draw(row) for row in keyed_uniforms(policy.numbers, 0, 0, np.arange(count)).tolist()]


@pytest.mark.parametrize("name", sorted(TIMM_NAMES))
def test_arguments_are_those_of_timm(name):
    """For all magnitudes of the presets and policies, and both signs."""
    kind, argument = LEVELS[name]
    assert name in (kind, f"{kind}Increasing")
    signs = set()
    for step in range(0, 241, 3):
        magnitude = step / 10
        with keyed_rng(step):
            sign = -1 if random.random() > 0.5 else 1
        with keyed_rng(step):
            level = LEVEL_TO_ARG[name]
            expected = () if level is None else level(magnitude, {})
        assert expected == (() if argument is None else (argument(magnitude / 10, sign),))
        signs.add(sign)
    assert signs == {-1, 1}


@pytest.mark.parametrize("resample", [Resampling.BILINEAR, Resampling.BICUBIC])
@pytest.mark.parametrize("name", sorted(TIMM_NAMES))
def test_pillow_is_asked_as_timm_asks_it(name, resample):
    image, (kind, argument) = noise_image(13, 17), LEVELS[name]
    hparams = {"img_mean": (1, 2, 3), "interpolation": resample, "magnitude_max": 24}
    for magnitude in (0.0, 3.3, 10.0, 24.0):
        with keyed_rng(7):
            sign = -1 if random.random() > 0.5 else 1
        with keyed_rng(7):
            expected = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)(image)
        own = Operation(kind, argument and argument(magnitude / 10, sign), resample, (0, 0)).apply(image, (1, 2, 3))
        assert own.tobytes() == expected.tobytes()


@pytest.mark.parametrize("text", POLICIES)
def test_timm_policies_are_parsed_by_timm(text):
    own, theirs = timm_rand_augment(text, "random"), rand_augment_transform(text)
    assert list(own.operations) == [operation.name for operation in theirs.ops]
    assert own.layers == theirs.num_layers
    assert (own.weights is None) == (theirs.choice_weights is None)
    assert own.weights is None or list(own.weights) == list(theirs.choice_weights)
    for operation in theirs.ops:
        assert (own.probability, own.magnitude, own.std) == (
            *(operation.prob, operation.magnitude),
            operation.magnitude_std,
        )
        assert own.largest == (operation.magnitude_max or 10)
    assert own.fill == (124, 116, 104)  # ImageNet's mean
    assert len(own.resamples) == 2
    assert timm_rand_augment(text, "bicubic").resamples == (Resampling.BICUBIC,)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("rand", True), ("rand-m9-inc1", True), ("rand-tweights", True), ("rand-m9-t3a", False), ("rand-t3aw", False)]
    + [(other, False) for other in ("none", "original", "augmix-m3", "3a", "v0")],
)
def test_which_policies_are_randaugment(text, is_one):
    assert is_rand_augment(text) == is_one
    assert (rand_augment_of(settings(f"AUG.AUTO_AUGMENT {text}").AUG, "bilinear") is not None) == is_one


def test_more_layers_than_operations_to_draw_without_replacement():
    assert timm_rand_augment("rand-n15-tweights", "random").layers == 15
    with pytest.raises(ValueError, match="'rand-n16-tweights' .*16 different operations of 15"):
        timm_rand_augment("rand-n16-tweights", "random")


@pytest.mark.parametrize("preset", [*PUBLISHED_MAGNITUDES, "weak", "none"])
def test_presets(preset):
    policy = rand_augment_of(settings(f"AUG.PRESET {preset} AUG.AUTO_AUGMENT rand-m1").AUG, "bilinear")
    assert (policy is None) == (preset not in PUBLISHED_MAGNITUDES)
    if policy is not None:
        assert policy == published_rand_augment(int(preset.removeprefix("raug")))


class TestDraws:
    def test_two_of_sixteen_operations_uniformly(self):
        assert len(set(PUBLISHED_OPERATIONS)) == 16
        layers = list(zip(*drawn(published_rand_augment(15), 4000), strict=True))
        assert len(layers) == 2
        for layer in layers:
            kinds = Counter(operation.kind for operation in layer)
            assert set(kinds) == set(PUBLISHED_OPERATIONS)
            assert all(190 < count < 310 for count in kinds.values())

    def test_magnitudes_of_a_preset_are_uniform_and_pass_full_scale(self):
        operations = list(chain(*drawn(published_rand_augment(25), 20_000)))
        sides = np.array([o.argument for o in operations if o.kind == "Cutout"])  # 4 pixels per unit of magnitude
        assert sides.min() == 2
        assert 94 <= sides.max() <= 96
        assert abs(sides.mean() - 48) < 2
        angles = np.array([o.argument for o in operations if o.kind == "Rotate"])  # 3 degrees per unit
        assert abs(angles.mean()) < 3
        assert abs(angles.std() - 72 / math.sqrt(3)) < 1.5
        assert 71 < np.abs(angles).max() < 72

    def test_normal_magnitudes_and_their_probability(self):
        operations = list(chain(*drawn(timm_rand_augment("rand-m9-mstd0.5-inc1", "random"), 20_000)))
        assert abs(len(operations) - 20_000) < 500  # half of 40,000
        magnitudes = np.array([abs(o.argument) / 3 for o in operations if o.kind == "Rotate"])
        assert abs(np.median(magnitudes) - 9) < 0.06
        assert abs(np.quantile(magnitudes, 0.159) - 8.5) < 0.06  # a standard deviation below
        assert magnitudes.max() == 10
        assert 0.01 < (magnitudes == 10).mean() < 0.04  # two standard deviations above: 0.023

    def test_signs_interpolations_and_places_are_uniform_and_independent(self):
        operations = [
            o for o in list(chain.from_iterable(drawn(published_rand_augment(15), 20_000))) if o.kind == "ShearX"
        ]
        columns = [(o.argument > 0, o.resample is Resampling.BICUBIC, *o.place, abs(o.argument)) for o in operations]
        table = np.array(columns, dtype=float)
        np.testing.assert_allclose(table[:, :4].mean(0), 0.5, atol=0.04)
        assert np.abs(np.corrcoef(table.T) - np.eye(5)).max() < 0.08

    def test_weights_without_replacement(self):
        policy = RandAugment(operations=tuple(ODDS), weights=tuple(ODDS.values()))
        pairs = Counter(tuple(o.kind for o in operations) for operations in drawn(policy, 20_000))
        expected = {(a, b): p * q / (1 - p) for a, p in ODDS.items() for b, q in ODDS.items() if a != b}
        assert set(pairs) == set(expected)
        assert all(abs(pairs[pair] / 20_000 - expected[pair]) < 0.012 for pair in pairs)

    def test_the_ends_of_the_numbers(self):
        for policy in (timm_rand_augment(text, "random") for text in POLICIES):
            for end in (0.0, 1 - 2.0**-53):
                for operation in policy.draw([end] * policy.numbers):
                    operation.apply(noise_image(5, 6), GREY)

    def test_a_policy_draws_from_the_generator_that_it_is_given(self):
        policy, image = pickle.loads(pickle.dumps(published_rand_augment(15))), noise_image(20, 30)
        results = [policy(image, random.Random(seed)).tobytes() for seed in (1, 1, *range(9))]
        assert results[0] == results[1]
        assert len(set(results)) > 5


def test_cutout_paints_a_grey_square():
    covered = []
    for row in keyed_uniforms(2, np.arange(200)).tolist():
        result = np.asarray(cutout(Image.new("RGB", (30, 20)), 8, (row[0], row[1])))
        grey = (result == GREY).all(-1)
        assert (grey == result.any(-1)).all()
        covered.append(grey.sum())
    assert max(covered) == 64
    assert min(covered) >= 16


def test_posterize():
    image = noise_image(8, 8)
    pixels = np.asarray(image)
    for bits in range(12):
        expected = pixels & (256 - (1 << max(0, 8 - bits)))
        assert (np.asarray(posterize(image, bits)) == expected).all(), bits


def test_timm_may_posterize_to_nothing():
    """Pillow 13 raises for 0 bits, which a magnitude of 10 asks for."""
    image = noise_image(4, 4)
    for operation in ("Posterize", "PosterizeIncreasing"):
        for magnitude in (0, 10):
            AugmentOp(operation, prob=1.0, magnitude=magnitude)(image)
    assert not np.asarray(AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)(image)).any()
