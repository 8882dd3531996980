"""Batch augmentation on the device, after normalisation: random erasing, Mixup, CutMix."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from yacs.config import CfgNode

from utils.seed import keyed_rng

from .erasing import BatchErasing
from .mixing import BatchMixup

MIXUP_MODES = ("batch", "pair", "elem")
ERASING_MODES = ("const", "rand", "pixel")
_STREAM = 1  # makes the keys differ from those of single images, (seed, epoch, index)


class BatchTransform(Protocol):
    """What a batch goes through on the device; `soft_targets` says whether the targets are distributions."""

    soft_targets: bool

    def __call__(self, images: Tensor, labels: Tensor, *, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Maps normalised images and class numbers to images and targets, the same for the same position of a run."""


class BatchAugmentation:
    """Random erasing, then Mixup or CutMix of the batch with itself in reverse order.

    All random numbers are a function of (seed, epoch, step, rank), so that a resumed run draws the same ones.
    `soft_targets` says whether the targets are distributions over the classes or class numbers.
    """

    def __init__(self, erasing: BatchErasing | None, mixup: BatchMixup | None, *, seed: int, rank: int) -> None:
        self.soft_targets = mixup is not None
        self._erasing, self._mixup = erasing, mixup
        self._seed, self._rank = seed, rank

    def __call__(self, images: Tensor, labels: Tensor, *, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Returns the images, changed in place, and the targets.

        `images` are normalised pixels (N, C, H, W), N even; `labels` (N,) are class numbers. With `soft_targets` the
        targets are float (N, classes), smoothed labels mixed like the images; otherwise they are `labels`.
        """
        with _device_rng(images.device, self._seed, epoch, step, self._rank, _STREAM):
            if self._erasing is not None:
                images = self._erasing(images)
            if self._mixup is not None:
                if self._mixup.cutmix_minmax is not None:
                    _check_box(self._mixup.cutmix_minmax, images)
                return self._mixup(images, labels)
        return images, labels


def _check_box(minmax: Sequence[float], images: Tensor) -> None:
    """Raises ValueError if both bounds of CutMix's box are the same number of pixels."""
    for side in images.shape[-2:]:
        low, high = (int(side * share) for share in minmax)
        if low == high:
            raise ValueError(
                f"AUG.CUTMIX_MINMAX is {list(minmax)}: both are {low} of {side} pixels, and CutMix draws a side from "
                "the first to below the second: set them further apart"
            )


@contextmanager
def _device_rng(device: torch.device, *key: int) -> Iterator[None]:
    """`keyed_rng` that also seeds the generator of a CUDA device, without making the host wait for it."""
    with keyed_rng(*key):
        if device.type != "cuda":
            yield
            return
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
            torch.cuda.manual_seed(torch.initial_seed())  # the CPU generator has just been seeded
            yield


def build_batch_augmentation(
    cfg: CfgNode, *, num_classes: int, batch_size: int, label_smoothing: float, seed: int, rank: int = 0
) -> BatchAugmentation | None:
    """Returns the batch augmentation of the section AUG, or None for none.

    MIXUP, CUTMIX or CUTMIX_MINMAX turn on mixing; REPROB turns on random erasing, except with a PRESET: the presets
    were published without it. `batch_size` is that of one process.

    Raises ValueError for an odd batch with mixing.
    """
    erases = cfg.PRESET is None and cfg.REPROB > 0
    erasing = BatchErasing(cfg.REPROB, mode=cfg.REMODE, max_count=cfg.RECOUNT) if erases else None
    mixup = _build_mixup(cfg, num_classes, batch_size, label_smoothing)
    if mixup is None and erasing is None:
        return None
    return BatchAugmentation(erasing, mixup, seed=seed, rank=rank)


def _build_mixup(cfg: CfgNode, num_classes: int, batch_size: int, label_smoothing: float) -> BatchMixup | None:
    """Returns Mixup and CutMix, None if both are off; raises ValueError for an odd batch."""
    if cfg.MIXUP == 0 and cfg.CUTMIX == 0 and cfg.CUTMIX_MINMAX is None:
        return None
    if batch_size % 2:
        raise ValueError(
            f"DATA.BATCH_SIZE {batch_size} is odd, and AUG.MIXUP and AUG.CUTMIX mix pairs of images: "
            "make it even, or set both to 0"
        )
    return BatchMixup(
        mixup_alpha=cfg.MIXUP,
        cutmix_alpha=cfg.CUTMIX,
        cutmix_minmax=cfg.CUTMIX_MINMAX,
        prob=cfg.MIXUP_PROB,
        switch_prob=cfg.MIXUP_SWITCH_PROB,
        mode=cfg.MIXUP_MODE,
        label_smoothing=label_smoothing,
        num_classes=num_classes,
    )
