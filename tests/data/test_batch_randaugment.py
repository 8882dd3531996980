"""RandAugment of batches: the pixels are those of Pillow, and the draws a function of seed, epoch and index."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling
from settings import settings
from torch import Tensor

from data import build_rand_augment, describe_place
from data.affine import MATRICES
from data.batch_operations import POINT_OPERATIONS
from data.batch_randaugment import APPLY_TABLES, BatchRandAugment, augment, plan
from data.randaugment import LEVELS, Operation, RandAugment, published_rand_augment, timm_rand_augment

CPU, META = torch.device("cpu"), torch.device("meta")
FILL = (124, 116, 104)
SIZES = [(1, 1), (2, 5), (3, 3), (17, 31), (32, 32), (24, 9)]
MAGNITUDES = [0.0, 0.4, 3.0, 7.7, 9.99, 10.0, 14.0, 24.0]
# The largest difference from Pillow, and the largest mean difference, in steps of 1 of 255. Where Pillow computes in
# integers or in float32, so do we, and where in float64, likewise, in the same order.
DIFFERENCES = {kind: (0, 0.0) for kind in sorted({kind for kind, _ in LEVELS.values()})}


def pictures(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise, a smooth image, few colours, a single one, little contrast, and two extremes: (7, H, W, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    images = [
        rng.integers(0, 256, (height, width, 3)),
        np.asarray(coarse.resize((width, height), Resampling.BICUBIC)),
        rng.integers(0, 3, (height, width, 3)) * 70 + 10,
        np.full((height, width, 3), rng.integers(0, 256, 3)),
        rng.integers(90, 130, (height, width, 3)),
        np.zeros((height, width, 3)),
        rng.integers(0, 2, (height, width, 3)) * 255,
    ]
    return np.stack(images).astype(np.uint8)


def batch(images: np.ndarray) -> Tensor:
    """In memory by pixels; results are the same for any order."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def with_pillow(images: np.ndarray, drawn: Sequence[Sequence[Operation]], fill=FILL) -> Tensor:
    results = []
    for pixels, operations in zip(images, drawn, strict=True):
        image = Image.fromarray(pixels)
        for operation in operations:
            image = operation.apply(image, fill)
        results.append(np.asarray(image))
    return batch(np.stack(results))


def operations(kind: str) -> list[Operation]:
    """An operation at many magnitudes, with both signs, by both interpolations, at several places."""
    found = []
    for own, argument in LEVELS.values():
        for number, magnitude in enumerate(MAGNITUDES if own == kind else ()):
            for sign in (-1, 1):
                for resample in (Resampling.BILINEAR, Resampling.BICUBIC) if kind in MATRICES else (None,):
                    place = (number / len(MAGNITUDES), magnitude / 25 if sign > 0 else 0.99)
                    place = place if kind == "Cutout" else (0.0, 0.0)
                    found.append(Operation(kind, argument and argument(magnitude / 10, sign), resample, place))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_operations_are_those_of_pillow(kind):
    largest, total, count = 0.0, 0.0, 0
    for seed, (height, width) in enumerate(SIZES):
        images = pictures(height, width, seed)
        for operation in operations(kind):
            drawn = [[operation]] * len(images)
            difference = (augment(batch(images), drawn, FILL).int() - with_pillow(images, drawn).int()).abs()
            largest, total = max(largest, float(difference.max())), total + float(difference.sum())
            count += difference.numel()
    assert (largest, total / count) <= DIFFERENCES[kind]


@pytest.mark.parametrize(
    "policy",
    [
        published_rand_augment(15),
        published_rand_augment(25),
        timm_rand_augment("rand-m9-mstd0.5-inc1-p1-n4", "random"),
        timm_rand_augment("rand-m15-n3-mmax20-tweights", "bicubic"),
    ],
    ids=["raug15", "raug25", "increasing, four layers", "weights, without some"],
)
@pytest.mark.parametrize("size", [(20, 20), (9, 30)])
def test_policies_are_those_of_pillow(policy, size):
    """Every combination of consecutive operations, each image of a batch with its own."""
    images = np.concatenate([pictures(*size, seed) for seed in range(40)])
    drawn = BatchRandAugment(policy, seed=0).draw(torch.arange(len(images)), epoch=0)
    result = augment(batch(images), drawn, policy.fill)
    assert torch.equal(result, with_pillow(images, drawn, policy.fill))
    assert torch.equal(result, augment(batch(images).contiguous(), drawn, policy.fill))


def test_consecutive_tables_join():
    invert, cut = Operation("Invert", None, None, (0, 0)), Operation("Cutout", 2, None, (0.5, 0.5))
    for first in POINT_OPERATIONS.keys() - {"Contrast"}:
        steps = plan([[Operation(first, 3, None, (0, 0)), invert]], 4, 4, FILL)
        assert [step.kind for step in steps] == [first, "Invert", APPLY_TABLES]
    steps = plan([[invert, cut], [invert, invert], []], 4, 4, FILL)
    assert [(step.kind, [row[0] for row in step.rows]) for step in steps] == [
        *(("Invert", [0, 1]), (APPLY_TABLES, [0]), ("Cutout", [0]), ("Invert", [1])),
        (APPLY_TABLES, [1]),
    ]


class TestDraws:
    images = batch(pictures(16, 16))
    indices = torch.tensor([3, 1, 4, 15, 9, 2, 6])
    augmentation = BatchRandAugment(published_rand_augment(15), seed=3)

    def test_depend_on_seed_epoch_and_index_alone(self):
        whole = self.augmentation(self.images, self.indices, epoch=2)
        torch.rand(3)
        order = torch.tensor([5, 0, 3])
        part = self.augmentation(self.images[order], self.indices[order], epoch=2)
        assert torch.equal(part, whole[order])
        one = self.augmentation(self.images[:1], self.indices[:1], epoch=2)
        assert torch.equal(one, whole[:1])

    def test_change_with_each_of_them(self):
        same = self.images[:1].expand(64, -1, -1, -1)
        results = [
            self.augmentation(same, torch.arange(64), epoch=0),
            self.augmentation(same, torch.arange(64) + 64, epoch=0),
            self.augmentation(same, torch.arange(64), epoch=1),
            BatchRandAugment(published_rand_augment(15), seed=4)(same, torch.arange(64), epoch=0),
        ]
        assert len(torch.cat(results).flatten(1).unique(dim=0)) > 200

    def test_leave_the_batch_as_it_is(self):
        before = self.images.clone()
        for policy in (published_rand_augment(15), RandAugment(operations=("Invert",), probability=0)):
            result = BatchRandAugment(policy, seed=0)(self.images, self.indices, epoch=0)
            assert torch.equal(self.images, before)
            assert result.data_ptr() != self.images.data_ptr()
        assert torch.equal(result, before)

    def test_need_three_channels(self):
        with pytest.raises(ValueError, match="images of 3 channels, these have 4"):
            self.augmentation(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), torch.zeros(1), epoch=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_pixels():
    images, augmentation = batch(pictures(33, 47)), BatchRandAugment(published_rand_augment(25), seed=0)
    for epoch in range(50):
        expected = augmentation(images, torch.arange(7), epoch=epoch)
        assert torch.equal(augmentation(images.cuda(), torch.arange(7), epoch=epoch).cpu(), expected)


@pytest.mark.parametrize(
    ("opts", "device", "by_batch", "said"),
    [
        ("AUG.PRESET raug15", CPU, False, "AUG.DEVICE auto: raug15 with Pillow on the CPU"),
        ("AUG.PRESET raug15", META, True, "AUG.DEVICE auto: raug15 on meta, for whole batches"),
        ("AUG.PRESET raug15 AUG.DEVICE cpu", META, False, "AUG.DEVICE cpu: raug15 with Pillow on the CPU"),
        ("AUG.PRESET raug15 AUG.DEVICE gpu", CPU, True, "AUG.DEVICE gpu: raug15 on cpu, for whole batches"),
        ("AUG.AUTO_AUGMENT rand-m9", META, True, "AUG.DEVICE auto: rand-m9 on meta, for whole batches"),
        (
            "AUG.AUTO_AUGMENT original",
            META,
            False,
            "AUG.DEVICE auto: original with Pillow on the CPU, since only RandAugment has a form for batches",
        ),
        ("AUG.PRESET weak", META, False, ""),
        ("AUG.AUTO_AUGMENT none AUG.DEVICE gpu", META, False, ""),
    ],
)
def test_where_a_policy_is_applied(opts, device, by_batch, said):
    cfg = settings(opts).AUG
    built = build_rand_augment(cfg, device, interpolation="bilinear", seed=0)
    assert (built is not None) == by_batch
    assert describe_place(cfg, built, device) == said
