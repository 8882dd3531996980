import pickle
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from pictures import photo
from PIL import Image
from settings import settings
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms as reference

from data import (
    DATASETS,
    INTERPOLATIONS,
    PRESETS,
    Normalize,
    eval_transform,
    is_auto_augment_policy,
    train_transform,
)
from data.randaugment import rand_augment_of
from data.transforms import RandomResizedCrop
from utils.seed import keyed_rng, local_rng


def augmentation(size, opts: str = "", **options):
    """Returns the training transform of the section AUG with these values; it draws from Python's generator."""
    return partial(train_transform(size, settings(opts).AUG, **options), rng=random)


def preset_named(name, size, **options):
    """Returns the training transform of a preset, or timm's pipeline for None."""
    return augmentation(size, "" if name is None else f"AUG.PRESET {name}", **options)


def numbered_image(height: int, width: int) -> Image.Image:
    """Returns an image whose pixel (y, x) is (y, x, 200)."""
    pixels = np.full((height, width, 3), 200, dtype=np.uint8)
    pixels[..., 0] = np.arange(height)[:, None]
    pixels[..., 1] = np.arange(width)
    return Image.fromarray(pixels)


def noise_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(16, 16), (48, 48), (24, 40)])
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_preset_gives_uint8_of_the_size(preset, size, interpolation):
    transform = pickle.loads(pickle.dumps(preset_named(preset, size, interpolation=interpolation).func))
    for shape in ((8, 8), (30, 70), (90, 20)):
        result = transform(noise_image(*shape), random)
        assert result.dtype == torch.uint8
        assert result.shape == (3, *size)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_draws_depend_on_the_key_alone(preset):
    transform = preset_named(preset, (24, 24))
    image = noise_image(40, 40)

    def draw(key: int) -> bytes:
        with keyed_rng(0, key):
            return transform(image).numpy().tobytes()

    first = [draw(key) for key in range(8)]
    assert [draw(key) for key in range(8)] == first
    assert (len(set(first)) == 1) == (preset == "none")


@pytest.mark.parametrize("policy", ["rand-x9", "augmix-x3"])
def test_policies_with_options_that_timm_does_not_know_are_refused(policy):
    assert is_auto_augment_policy(policy)
    with pytest.raises(ValueError, match=r"^AUG\.AUTO_AUGMENT '" + policy):
        augmentation((24, 24), f"AUG.AUTO_AUGMENT {policy}")


@pytest.mark.parametrize(
    "policy",
    [
        "rnd-m9",
        "rand-m9-foo",
        "rand-m",
        "rand-tfoo",
        "v1",
        "rand m9",
        "",
        "none-m9",
        "v0\n",
        "randm9",
        "NONE",
        "trivial-m9",
    ],
)
def test_what_is_no_policy(policy):
    assert not is_auto_augment_policy(policy)


@pytest.mark.parametrize(
    "policy",
    [
        *("rand-m9-mstd0.5-inc1", "rand-m10-n3-p1-mstd101", "rand-m5-tweights", "rand-t3aw", "rand"),
        *("augmix-m5-w4-d2", "v0", "v0r-mstd0.5", "original", "originalr", "3a", "none"),
        *("trivial", "cifar10", "svhn"),
    ],
)
def test_policies_survive_many_draws(policy):
    assert is_auto_augment_policy(policy)
    transform = augmentation((33, 33), f"AUG.AUTO_AUGMENT {policy}")
    image = noise_image(40, 40)
    for _ in range(60):
        transform(image)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("policy", ["trivial", "cifar10", "svhn"])
def test_a_policy_of_torchvision_is_applied_without_color_jitter(policy, interpolation):
    of = {
        "trivial": reference.TrivialAugmentWide,
        "cifar10": partial(reference.AutoAugment, reference.AutoAugmentPolicy.CIFAR10),
        "svhn": partial(reference.AutoAugment, reference.AutoAugmentPolicy.SVHN),
    }[policy]
    mode = reference.InterpolationMode.BICUBIC if interpolation == "bicubic" else reference.InterpolationMode.BILINEAR
    opts = f"AUG.AUTO_AUGMENT {policy} AUG.COLOR_JITTER 9"
    transform = augmentation((33, 33), opts, interpolation=interpolation)
    assert repr(of(interpolation=mode)) in repr(transform)
    assert "ColorJitter" not in repr(transform)
    image = Image.new("RGB", (40, 40), (100, 150, 200))
    assert len({tuple(transform(image)[:, 16, 16].tolist()) for _ in range(40)}) > 2


@pytest.mark.parametrize("opts", ["AUG.PRESET raug15", "AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1"])
def test_randaugment_comes_last_or_is_left_to_the_device(opts):
    image = noise_image(40, 40)
    cfg = settings(opts).AUG
    for key in range(8):
        rng = local_rng(key)
        geometry = train_transform((36, 36), cfg, rand_augment=False)(image, rng)
        expected = rand_augment_of(cfg, "bilinear")(Image.fromarray(geometry.permute(1, 2, 0).numpy()), rng)
        result = train_transform((36, 36), cfg)(image, local_rng(key))
        assert np.array_equal(result.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_color_jitter_acts_only_without_a_policy():
    image = Image.new("RGB", (40, 40), (100, 150, 200))
    colours = {"jitter": "AUG.AUTO_AUGMENT none", "plain": "AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0"}
    seen = {
        name: {tuple(augmentation((33, 33), opts)(image)[:, 16, 16].tolist()) for _ in range(10)}
        for name, opts in colours.items()
    }
    assert seen["plain"] == {(100, 150, 200)}
    assert len(seen["jitter"]) > 5


def test_small_images_are_shifted_and_not_zoomed():
    image = numbered_image(32, 32)
    transform = augmentation((32, 32), "AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0")
    shifts = Counter()
    for _ in range(200):
        rows, inside = transform(image)[0, :, 16].tolist(), None
        inside = [(position, row) for position, row in enumerate(rows) if row]
        assert len({row - position for position, row in inside}) == 1, "rows keep their distance"
        shifts[inside[0][1] - inside[0][0]] += 1
    assert set(shifts) == set(range(-4, 5))
    transform = augmentation((33, 33), "AUG.AUTO_AUGMENT none")
    assert len({len(transform(image)[0, :, 16].unique()) for _ in range(20)}) > 1


class TestPresets:
    def test_flip_flips_half_of_the_images_and_does_no_more(self):
        image = Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3))
        plain, flip = eval_transform((6, 8))(image), preset_named("flip", (6, 8))
        results = [flip(image) for _ in range(40)]
        flipped = [torch.equal(result, plain.flip(2)) for result in results]
        assert all(f or torch.equal(result, plain) for f, result in zip(flipped, results, strict=True))
        assert 5 < sum(flipped) < 35

    def test_weak_zooms_and_flips(self):
        image = numbered_image(100, 100)
        rows, flips = [], 0
        for _ in range(300):
            result = preset_named("weak", (10, 10))(image).int()
            rows.append(int(result[0, -1, 0] - result[0, 0, 0]))
            flips += bool(result[1, 0, 0] > result[1, 0, -1])
        assert 110 < flips < 190
        assert min(rows) < 30 < 80 < max(rows)

    def test_shift_moves_by_an_eighth_and_never_flips(self):
        image = numbered_image(16, 24)
        transform = preset_named("shift", (16, 24))
        offsets = set()
        for _ in range(400):
            result = transform(image).int()
            row, column = result[0, 8, 12] - 8, result[1, 8, 12] - 12
            offsets.add((int(row), int(column)))
            assert result[1, 8, 13] > result[1, 8, 12]
        assert offsets == {(row, column) for row in range(-2, 3) for column in range(-3, 4)}

    def test_crop_flips_half_of_the_time(self):
        image = numbered_image(32, 32)
        transform = preset_named("crop", (32, 32))
        flips = sum(bool(result[1, 16, 15] > result[1, 16, 16]) for result in (transform(image) for _ in range(300)))
        assert 110 < flips < 190

    def test_none_is_what_evaluation_sees(self):
        image = noise_image(50, 70)
        expected = eval_transform((24, 24), interpolation="bicubic")(image)
        assert torch.equal(preset_named("none", (24, 24), interpolation="bicubic")(image), expected)

    @pytest.mark.parametrize("preset", ["weak", "raug15", "shift"])
    def test_interpolation_is_honoured(self, preset):
        image = noise_image(60, 60)
        results = {}
        for interpolation in ("bilinear", "bicubic"):
            with keyed_rng(3):
                results[interpolation] = preset_named(preset, (24, 24), interpolation=interpolation)(image)
        assert not torch.equal(results["bilinear"], results["bicubic"])


class TestRandomResizedCrop:
    """timm's transform of this name, drawing from a generator of its own."""

    @pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0), (0.001, 0.01)])
    @pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.2, 0.4), (2.0, 5.0)])
    def test_boxes_are_those_of_timm(self, scale, ratio):
        """From the same random numbers, with the central ones where none fits."""
        own = RandomResizedCrop((8, 8), "bilinear", scale, ratio)
        draw = RandomResizedCropAndInterpolation.get_params
        for size in ((375, 500), (500, 375), (90, 20), (10, 300), (32, 32)):
            image = noise_image(*size)
            for seed in range(100):
                random.seed(seed)
                top, left, height, width = draw(image, scale, ratio)
                box = own.box(size, random.Random(seed))
                assert box == (top, left, max(1, height), max(1, width)) or 0 in (height, width)

    @pytest.mark.parametrize("size", [(1, 1), (1, 2), (300, 1), (2, 1)])
    def test_the_smallest_images_have_a_box_too(self, size):
        for seed in range(50):
            top, left, height, width = RandomResizedCrop((8, 8), "bilinear", (0.08, 1.0), (0.2, 0.3)).box(
                size, random.Random(seed)
            )
            assert 0 <= top < top + height <= size[0]
            assert 0 <= left < left + width <= size[1]

    def test_pixels_are_those_of_timm(self):
        image = photo(150, 200, 0)
        pixels = torch.from_numpy(np.array(image))
        for seed in range(20):
            random.seed(seed)
            expected = np.asarray(RandomResizedCropAndInterpolation(56, interpolation="random")(image)).astype(int)
            own = RandomResizedCrop((56, 56), "random", (0.08, 1.0), (3 / 4, 4 / 3))
            assert (np.asarray(own(image, random.Random(seed))) == expected).all()
            differences = np.abs(own(pixels, random.Random(seed)).numpy() - expected)
            assert differences.max() <= 2
            assert differences.mean() < 0.03

    @pytest.mark.parametrize("preset", ["AUG.PRESET weak", "AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0"])
    def test_area_ratio_and_flips_are_keys(self, preset):
        opts = f"{preset} AUG.SCALE 0.2,0.3 AUG.RATIO 1.9,2.1 AUG.HFLIP 0 AUG.VFLIP 1"
        transform = augmentation((40, 40), opts)
        for _ in range(20):
            result = transform(numbered_image(200, 200)).int()
            height, width = result[0, 0, 20] - result[0, -1, 20], result[1, 20, -1] - result[1, 20, 0]
            assert 0.15 < height * width / 200**2 < 0.33
            assert 1.8 < width / height < 2.2


@pytest.mark.parametrize("preset", ["flip", "weak", "crop"])
@pytest.mark.parametrize(("horizontal", "vertical"), [(1.0, 0.0), (0.0, 1.0), (0.25, 0.75)])
def test_flips_have_their_probabilities(preset, horizontal, vertical):
    transform = augmentation((32, 32), f"AUG.PRESET {preset} AUG.HFLIP {horizontal} AUG.VFLIP {vertical}")
    results = [transform(numbered_image(32, 32)).int() for _ in range(200)]
    for share, found in (
        (horizontal, sum(bool(result[1, 16, 12] > result[1, 16, 20]) for result in results)),
        (vertical, sum(bool(result[0, 12, 16] > result[0, 20, 16]) for result in results)),
    ):
        assert abs(found - 200 * share) <= (25 if 0 < share < 1 else 0)


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_a_tensor_is_augmented_as_pillows_image(preset):
    """By the same draws; what follows the resizing may make more of a difference of 1 of 255."""
    transform, image = preset_named(preset, (40, 40)).func, photo(60, 80, 0)
    pixels = torch.from_numpy(np.array(image))
    means = []
    for seed in range(20):
        found, expected = (transform(kind, local_rng(seed)).int() for kind in (pixels, image))
        means.append((found - expected).abs().float().mean())
    assert np.mean(means) < (0.03 if preset in ("none", "flip", "weak", "shift", "crop") else 1)


class TestEvalTransform:
    @pytest.mark.parametrize(
        ("image", "size", "rows", "columns"),
        [
            ((4, 8), (4, 4), slice(0, 4), slice(2, 6)),
            ((9, 4), (4, 4), slice(2, 6), slice(0, 4)),
            ((4, 8), (4, 8), slice(0, 4), slice(0, 8)),
            ((8, 8), (4, 8), slice(2, 6), slice(0, 8)),
            ((8, 8), (8, 4), slice(0, 8), slice(2, 6)),
        ],
    )
    def test_covers_and_cuts_out_the_centre(self, image, size, rows, columns):
        """Images that already cover the size exactly are not resized, so that the pixels tell the crop."""
        image = numbered_image(*image)
        expected = np.asarray(image)[rows, columns].transpose(2, 0, 1)
        assert eval_transform(size)(image).numpy().tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("image", "size", "rows", "columns"),
        [
            ((16, 24), (14, 14), slice(1, 15), slice(5, 19)),
            ((24, 16), (14, 14), slice(5, 19), slice(1, 15)),
            ((16, 32), (14, 28), slice(1, 15), slice(2, 30)),
        ],
    )
    def test_crop_covers_8_sevenths_of_the_size(self, image, size, rows, columns):
        image = numbered_image(*image)
        expected = np.asarray(image)[rows, columns].transpose(2, 0, 1)
        assert eval_transform(size, crop=True)(image).numpy().tolist() == expected.tolist()

    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    @pytest.mark.parametrize("shape", [(37, 61), (500, 375), (100, 100), (20, 19)])
    @pytest.mark.parametrize("side", [24, 56])
    @pytest.mark.parametrize("crop", [False, True])
    def test_square_sizes_are_as_in_torchvision(self, side, shape, interpolation, crop):
        image = noise_image(*shape)
        expected = reference.Compose(
            [
                reference.Resize(int(256 / 224 * side) if crop else side, reference.InterpolationMode(interpolation)),
                reference.CenterCrop(side),
                reference.PILToTensor(),
            ]
        )(image)
        assert torch.equal(eval_transform((side, side), crop=crop, interpolation=interpolation)(image), expected)

    def test_random_interpolation_is_bilinear(self):
        image = noise_image(40, 50)
        assert torch.equal(eval_transform((24, 24), interpolation="random")(image), eval_transform((24, 24))(image))


class TestNormalize:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("name", DATASETS)
    def test_values(self, name, dtype):
        spec = DATASETS[name]
        images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5) * 2
        result = Normalize(spec.mean, spec.std, dtype=dtype)(images)
        mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (spec.mean, spec.std))
        assert result.dtype == dtype
        np.testing.assert_allclose(result.numpy(), (images.numpy() / 255 - mean) / std, rtol=0, atol=2e-6)
        if dtype == torch.float64:
            np.testing.assert_allclose(result.numpy(), (images.numpy() / 255 - mean) / std, rtol=1e-12, atol=1e-12)

    def test_results_do_not_depend_on_the_order_in_memory(self):
        normalize, images = Normalize((0.5,) * 3, (0.25,) * 3), torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
        by_pixels = images.contiguous(memory_format=torch.channels_last)
        assert normalize(by_pixels).is_contiguous()
        assert torch.equal(normalize(by_pixels), normalize(images))

    def test_leaves_its_input_and_checkpoints_alone(self):
        normalize = Normalize((0.5,) * 3, (0.25,) * 3)
        images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
        assert (normalize(images) == 2).all()
        assert (images == 255).all()
        assert not normalize.state_dict()
