"""Mixing of a whole batch at once against timm, which mixes image after image."""

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch import Tensor

from data import MIXUP_MODES
from data.mixing import BatchMixup

CLASSES = 5
KINDS = {
    "mixup": {"mixup_alpha": 0.4},
    "cutmix": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    "cutmix, uncorrected shares": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "correct_lam": False},
    "either": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    "either, at times neither": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "prob": 0.5, "switch_prob": 0.3},
    "boxes between two sizes": {"cutmix_minmax": (0.2, 0.8)},
    "nothing": {"mixup_alpha": 0.4, "prob": 0.0},
}
SHAPES = [(8, 3, 16, 16), (6, 2, 7, 13), (2, 3, 5, 5)]


def mixed(kind: type[Mixup], seed: int, images: Tensor, labels: Tensor, **settings: object) -> tuple:
    """The images, which are those that were given, the targets, and what is drawn next."""
    np.random.seed(seed)
    found, targets = kind(num_classes=CLASSES, **settings)(images, labels)
    assert found is images
    return found, targets, np.random.rand()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MIXUP_MODES)
def test_images_targets_and_draws_are_those_of_timm_bit_for_bit(mode, kind, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    changed = False
    for seed in range(6):
        settings = {"mode": mode, "label_smoothing": 0.1 * (seed % 2), **KINDS[kind]}
        images = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(0, CLASSES, shape[:1], generator=generator)
        ours, theirs = (mixed(k, seed, images.clone(), labels, **settings) for k in (BatchMixup, Mixup))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[1].dtype == theirs[1].dtype
        assert ours[2] == theirs[2]
        changed |= not torch.equal(ours[0], images)
    assert changed == (kind != "nothing")


def test_odd_batches_are_refused_as_by_timm():
    with pytest.raises(AssertionError, match="even"):
        BatchMixup(mode="elem", num_classes=CLASSES)(torch.ones(3, 3, 4, 4), torch.zeros(3, dtype=torch.long))
