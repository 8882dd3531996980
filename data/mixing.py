"""What is done to a training batch on the device, after normalisation: erasing, MixUp, CutMix."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from utils.seed import keyed_rng

MIXUP_MODES = ("batch", "pair", "elem")
ERASING_MODES = ("const", "rand", "pixel")
_STREAM = 1  # sets the keys apart from those of single images, (seed, epoch, index)


class Mixing:
    """Erases rectangles, then mixes each image with its mirror image in the batch; made by `build_mixing`.

    All draws are a function of (seed, epoch, step, rank), so that a resumed run draws what it would have drawn.
    `soft_targets` tells whether the targets are distributions over the classes or the labels as they came.
    """

    def __init__(
        self,
        mixup: Mixup | None,
        *,
        reprob: float = 0.0,
        remode: str = "pixel",
        recount: int = 1,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.soft_targets = mixup is not None
        self._mixup = mixup
        self._reprob, self._remode, self._recount = reprob, remode, recount
        self._seed, self._rank = seed, rank

    def __call__(self, images: Tensor, labels: Tensor, *, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Returns the images, changed in place, and the targets.

        `images` are normalised pixels (N, C, H, W), N even; `labels` (N,) are class numbers. With `soft_targets` the
        targets are float (N, classes), smoothed labels mixed like the images; otherwise they are `labels`.
        """
        with _device_rng(images.device, self._seed, epoch, step, self._rank, _STREAM):
            if self._reprob > 0:
                erase = RandomErasing(self._reprob, mode=self._remode, max_count=self._recount, device=images.device)
                images = erase(images)
            if self._mixup is not None:
                if self._mixup.cutmix_minmax is not None:
                    _check_box(self._mixup.cutmix_minmax, images)
                return self._mixup(images, labels)
        return images, labels


def _check_box(minmax: Sequence[float], images: Tensor) -> None:
    """Raises ValueError where both bounds of CutMix's box are the same number of pixels."""
    for side in images.shape[-2:]:
        low, high = (int(side * share) for share in minmax)
        if low == high:
            raise ValueError(
                f"AUG.CUTMIX_MINMAX is {list(minmax)}: both are {low} of {side} pixels, and CutMix draws a side from "
                "the first to below the second: set them further apart"
            )


@contextmanager
def _device_rng(device: torch.device, *key: int) -> Iterator[None]:
    """`keyed_rng` that also covers the generator of a CUDA device; none of it makes the host wait for the device."""
    with keyed_rng(*key):
        if device.type != "cuda":
            yield
            return
        with torch.random.fork_rng(devices=[device]), torch.cuda.device(device):
            torch.cuda.manual_seed(torch.initial_seed())  # the CPU generator has just been given the key
            yield


def build_mixing(
    *,
    num_classes: int,
    batch_size: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    cutmix_minmax: Sequence[float] | None = None,
    prob: float = 1.0,
    switch_prob: float = 0.5,
    mode: str = "batch",
    label_smoothing: float = 0.1,
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    seed: int = 0,
    rank: int = 0,
) -> Mixing | None:
    """Returns what the settings ask for, or None where they ask for nothing.

    `mixup` and `cutmix` are the alphas of the Beta distributions, 0 to leave either out; `cutmix_minmax` bounds the
    sides of the box, as fractions of the image's, in place of `cutmix`. A batch is mixed with probability `prob`, and
    by CutMix rather than MixUp, where both are on, with `switch_prob`. `mode` draws once a batch, a pair or an image.
    An image is erased with probability `reprob`, in 1 to `recount` rectangles of 0 (`const`), one random colour
    (`rand`) or noise (`pixel`). `batch_size` is that of one process.

    Raises ValueError for an odd batch where images would be mixed; the range of each value is checked by the caller.
    """
    assert mode in MIXUP_MODES
    assert remode in ERASING_MODES
    minmax = None if cutmix_minmax is None else tuple(cutmix_minmax)
    mixes = mixup > 0 or cutmix > 0 or minmax is not None
    if mixes and batch_size % 2:
        raise ValueError(
            f"--batch-size {batch_size} is odd, and AUG.MIXUP and AUG.CUTMIX mix pairs of images: "
            "make it even, or set both to 0"
        )
    if not mixes and reprob == 0:
        return None
    mixer = Mixup(mixup, cutmix, minmax, prob, switch_prob, mode, True, label_smoothing, num_classes) if mixes else None
    return Mixing(mixer, reprob=reprob, remode=remode, recount=recount, seed=seed, rank=rank)
